"""Packing: several examples share a row of fixed length, so short texts cause little padding.

An example consists of one or more sequences of tokens, for example one for each answer.

Except for rounding, packing does not change any loss, gradient or prediction. A token attends only
to tokens of its own sequence, positions restart in each sequence, and sums over the whole batch are
divided by their weights only once.

The packing of the library `grain` is not used, because it packs single sequences. Here all
sequences of an example must be in the same row.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from gptjax.batch import Batch, TokenType
from gptjax.data.tasks import Examples

# Row lengths are multiples of this number of tokens.
_LENGTH_STEP = 8
# The fraction of a batch that may be padding.
_MAX_PADDING = 0.045

RowMask = Callable[[int], np.ndarray]
"""A function from the number of rows in a batch to bool [rows]: the rows that this process fills.

In the other rows this process writes only `segment_ids`, so that every process knows the number of
tokens in the whole batch."""


def all_rows(rows: int) -> np.ndarray:
    """Returns the `RowMask` of a single process, which fills all rows."""
    return np.ones(rows, bool)


def first_fit(lengths: Sequence[int], row_length: int, max_per_row: int) -> list[list[int]]:
    """Assigns examples to rows, from the longest to the shortest.

    Each example is put into the first row that has room for it.

    >>> first_fit([4, 3, 5, 2], row_length=8, max_per_row=4)
    [[2, 1], [0, 3]]

    Args:
      lengths: the number of tokens of each example, at most `row_length`.
      row_length: the row length in tokens.
      max_per_row: the largest number of examples in a row.

    Returns:
      The indices (into `lengths`) of the examples in each row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row, free in enumerate(room):
            if free >= lengths[i] and len(rows[row]) < max_per_row:
                rows[row].append(i)
                room[row] -= lengths[i]
                break
        else:
            rows.append([i])
            room.append(row_length - lengths[i])
    return rows


def balance_batches(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Assigns examples to batches with about equal numbers of tokens.

    The examples are sorted by their length plus noise, from the longest to the shortest, and
    distributed in rounds. In each round every batch gets one example, and the batch with the fewest
    tokens so far gets the longest example of the round. The noise is uniform between 0 and two
    standard deviations of the lengths. So chance decides which examples share a batch, and every
    epoch has other batches.

    Args:
      lengths: int [batches * batch_size], the number of tokens of each example.
      batch_size: the number of examples in a batch.
      rng: the random generator of the noise and of the order of the batches.

    Returns:
      int [batches, batch_size], indices into `lengths`.
    """
    batches = len(lengths) // batch_size
    if not batches:
        return np.zeros((0, batch_size), np.int64)
    noisy = lengths + rng.uniform(0, 2 * lengths.std(), len(lengths))
    totals = np.zeros(batches, np.int64)
    rounds = []
    for chosen in np.argsort(-noisy, kind="stable").reshape(batch_size, batches):
        chosen = chosen[np.argsort(-lengths[chosen], kind="stable")]
        fewest_first = np.argsort(totals, kind="stable")
        by_batch = np.empty_like(chosen)
        by_batch[fewest_first] = chosen
        totals += lengths[by_batch]
        rounds.append(by_batch)
    return rng.permutation(np.stack(rounds, axis=1))


class Packer:
    """Packs examples into batches of one shape.

    If the examples of a batch do not fit into this shape, that batch gets more rows.

    Attributes:
      row_length: T, the row length in tokens, at least the length of the longest example.
      rows: the number of rows in a batch, before it is rounded up to a multiple of `divisor`.
      slots: E, the number of slots in a row. A slot is the place of one example.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        row_length: int = 0,
        divisor: int = 1,
        sequence_means: bool = False,
        row_limit: int = 0,
    ):
        """Chooses the shape of the batches by packing a sample of these examples.

        Args:
          lengths: int [n], the number of tokens of each example that will be packed.
          batch_size: the number of examples in a batch.
          row_length: the wanted T. 0 means that T is chosen. It is then the shortest T with at most
            4.5% of padding in a batch or, if there is no such T, the T with the least padding.
          divisor: the number of rows is rounded up to a multiple of this. It is the number of
            devices that share the rows, times the number of micro-batches. Rows of padding are
            added at the end of a batch. The examples keep their rows, so the dropout masks do not
            depend on the number of devices.
          sequence_means: whether the LM weights in each sequence add up to 1. Otherwise the weight
            of each predicted token is 1.
          row_limit: the largest T that is chosen, before it is rounded up to a multiple of 8. T is
            never less than the length of the longest example. 0 means no limit. `row_length` is not
            limited.
        """
        self._sequence_means, self._divisor = sequence_means, divisor
        longest, mean = int(lengths.max()), float(lengths.mean())
        sample = _sample(lengths, batch_size)
        self.rows, self.row_length = _shape(sample, longest, mean, row_length, row_limit)
        self.slots = _slots(self.row_length, mean, batch_size)

    def pack(
        self, examples: Examples, chosen: np.ndarray, row_mask: RowMask = all_rows
    ) -> tuple[Batch, np.ndarray]:
        """Packs some of the examples.

        Args:
          examples: all examples.
          chosen: int [n], the indices of the examples to pack.
          row_mask: the rows that this process fills (see `RowMask`).

        Returns:
          The batch, and int32 [B, E]: the index of the example in each slot, -1 for an empty slot.
        """
        lengths = examples.lengths[chosen].tolist()
        rows = first_fit(lengths, self.row_length, self.slots)
        indices = [[int(chosen[i]) for i in row] for row in rows]
        return self.fill(examples, indices, row_mask)

    def fill(
        self, examples: Examples, rows: list[list[int]], row_mask: RowMask = all_rows
    ) -> tuple[Batch, np.ndarray]:
        """Packs examples whose rows are already chosen.

        Args:
          examples: all examples.
          rows: the indices of the examples in each row.
          row_mask: the rows that this process fills (see `RowMask`).

        Returns:
          The batch, and int32 [B, E]: the index of the example in each slot, -1 for an empty slot.
        """
        height = self.rows
        # Each new number of rows needs another compilation. Therefore a batch that does not fit
        # gets more rows in steps of a quarter of `self.rows`.
        if len(rows) > height:
            height = _round_up(len(rows), math.ceil(height / 4))
        height = _round_up(height, self._divisor)
        batch = _empty(height, self.row_length, self.slots, examples)
        index = np.full((height, self.slots), -1, np.int32)
        filled = row_mask(height)
        for b, row in enumerate(rows):
            index[b, : len(row)] = row
            if filled[b]:
                self._fill_row(batch, b, examples, row)
            else:
                batch.segment_ids[b, : int(examples.lengths[row].sum())] = 1
        return batch, index

    def _fill_row(self, batch: Batch, b: int, examples: Examples, row: list[int]) -> None:
        """Writes the examples with the indices `row` into row `b` of the batch."""
        start = segment = 0
        for e, i in enumerate(row):
            first = start
            for c in range(examples.num_candidates):
                sequence = i * examples.num_candidates + c
                tokens = examples.tokens[sequence]
                if not len(tokens):  # the example does not have this candidate
                    continue
                stop, segment = start + len(tokens), segment + 1
                second = start + int(examples.second_start[sequence])
                padding = stop  # the start of the padding inside the sequence
                if examples.padding_start is not None:
                    padding = start + int(examples.padding_start[sequence])
                weight = 1 / (padding - start - 1) if self._sequence_means else 1.0
                batch.tokens[b, start:stop] = tokens
                batch.segment_ids[b, start:stop] = segment
                batch.positions[b, start:stop] = np.arange(len(tokens))
                batch.token_types[b, second:stop] = TokenType.SECOND_TEXT
                batch.token_types[b, padding:stop] = TokenType.PADDING
                batch.lm_weights[b, start : padding - 1] = weight
                batch.extract[b, e, c] = stop - 1
                batch.candidate_mask[b, e, c] = 1.0
                start = stop
            batch.example_mask[b, e] = 1.0
            if examples.hidden is not None:
                place = int(examples.starts[i])
                batch.hidden[b, first:start] = examples.hidden[place : place + start - first]
            if examples.labels is not None:
                batch.labels[b, e] = examples.labels[i]


def _sample(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Returns the lengths of the examples in up to 32 balanced batches."""
    rng = np.random.default_rng(0)
    lengths = rng.permutation(lengths)[: max(1, len(lengths) // batch_size) * batch_size]
    if len(lengths) < 2 * batch_size:
        return [lengths.tolist()]
    return lengths[balance_batches(lengths, batch_size, rng)[:32]].tolist()


def _slots(row_length: int, mean: float, batch_size: int) -> int:
    """Returns E, at least twice the mean number of examples in a row, but at most the batch size.

    If E is less than the batch size, it is a power of two and at least 4. So data with slightly
    other lengths gets the same shape.
    """
    return min(batch_size, 1 << max(2, math.ceil(math.log2(2 * row_length / mean))))


def _shape(
    sample: list[list[int]], longest: int, mean: float, wanted: int, limit: int
) -> tuple[int, int]:
    """Returns the number of rows and the row length of a batch.

    Args:
      sample: the lengths of the examples in some batches.
      longest: the number of tokens of the longest example.
      mean: the mean number of tokens of an example.
      wanted: the wanted row length, which is rounded up. 0 means that the row length is chosen (see
        `Packer.__init__`).
      limit: the largest row length that is chosen; 0 means no limit.
    """
    batch_size = len(sample[0])
    if wanted:
        length = _round_up(max(longest, wanted), _LENGTH_STEP)
        slots = _slots(length, mean, batch_size)
        return max(len(first_fit(batch, length, slots)) for batch in sample), length
    total = batch_size * mean
    best = (math.inf, 0, 0)
    rows = 1 << (batch_size.bit_length() - 1)
    while rows:
        length = _round_up(max(longest, math.ceil(total / rows)), _LENGTH_STEP)
        slots = _slots(length, mean, batch_size)
        while any(len(first_fit(batch, length, slots)) > rows for batch in sample):
            length += _LENGTH_STEP
        if limit and length > _round_up(limit, _LENGTH_STEP) and best[1]:
            break  # rows become longer from here on
        if rows * length <= total / (1 - _MAX_PADDING):
            return rows, length
        best = min(best, (rows * length, rows, length))
        rows //= 2
    return best[1:]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _empty(height: int, length: int, slots: int, examples: Examples) -> Batch:
    """Returns a batch that contains only padding, with the types of these examples."""
    tokens = np.zeros((height, length), np.int32)
    extract = np.zeros((height, slots, examples.num_candidates), np.int32)
    labels, hidden = examples.labels, examples.hidden
    return Batch(
        tokens=tokens,
        segment_ids=np.zeros_like(tokens),
        positions=np.zeros_like(tokens),
        token_types=np.zeros_like(tokens),
        lm_weights=np.zeros_like(tokens, np.float32),
        extract=extract,
        candidate_mask=np.zeros_like(extract, np.float32),
        example_mask=np.zeros((height, slots), np.float32),
        labels=None if labels is None else np.zeros((height, slots), labels.dtype),
        hidden=None if hidden is None else np.zeros((*tokens.shape, hidden.shape[1]), hidden.dtype),
    )
