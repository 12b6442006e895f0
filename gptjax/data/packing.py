"""Packing: several examples to a row of fixed length, so that short texts waste no compute.

Whatever the packing, losses, gradients and predictions are those of one sequence per row: segments
separate the attention, positions restart, and sums are divided by their weights once, globally.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from gptjax.batch import Batch, TokenType
from gptjax.data.tasks import Examples

# Row lengths are multiples of this.
_STEP = 8
# Share of a batch that may be padding.
_WASTE = 0.045


def first_fit(lengths: Sequence[int], row_length: int, max_per_row: int) -> list[list[int]]:
    """First-fit decreasing: the longest example first, each into the first row with room.

    >>> first_fit([4, 3, 5, 2], row_length=8, max_per_row=4)
    [[2, 1], [0, 3]]

    Args:
      lengths: tokens of each example, none above `row_length`.
      row_length: tokens of a row.
      max_per_row: examples of a row.

    Returns:
      The examples (indices into `lengths`) of each row.
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


def deal(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Deals examples to batches of about the same number of tokens: int [batches, batch_size].

    In rounds, one example to each batch, from the longest to the shortest; in each round the batch
    with the fewest tokens gets the longest. Lengths are blurred by two standard deviations where
    they are sorted, so that chance decides which examples come together.

    Args:
      lengths: int [batches * batch_size], tokens of each example.
      batch_size: examples of a batch.
      rng: decides the order.
    """
    batches = len(lengths) // batch_size
    if not batches:
        return np.zeros((0, batch_size), np.int64)
    blurred = lengths + rng.uniform(0, 2 * lengths.std(), len(lengths))
    totals = np.zeros(batches, np.int64)
    dealt = []
    for chosen in np.argsort(-blurred, kind="stable").reshape(batch_size, batches):
        chosen = chosen[np.argsort(-lengths[chosen], kind="stable")]
        fewest_first = np.argsort(totals, kind="stable")
        column = np.empty_like(chosen)
        column[fewest_first] = chosen
        totals += lengths[column]
        dealt.append(column)
    return rng.permutation(np.stack(dealt, axis=1))


class Packer:
    """Examples -> batches of one shape (where a batch does not fit, of a few more rows).

    Attributes:
      row_length: T, at least the longest example.
      rows: rows of a batch, but for padding to a multiple of the divisor.
      slots: E, examples of a row at most.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        row_length: int = 0,
        divisor: int = 1,
        sequence_means: bool = False,
    ):
        """Chooses the shapes by packing some batches of these examples.

        Args:
          lengths: int [n], tokens of the examples to come.
          batch_size: examples of a batch.
          row_length: wanted T; 0: the shortest that leaves less than 4.5% to padding, or
            else the one that leaves least.
          divisor: B is a multiple of this (devices along the batch, micro-batches). Rows of padding
            are added for it and nothing else changes: the examples lie where they lay, so that
            another number of devices sees the same dropout masks.
          sequence_means: the LM weights of each sequence add up to 1 instead of being 1.
        """
        self._sequence_means, self._divisor = sequence_means, divisor
        longest, mean = int(lengths.max()), float(lengths.mean())
        sample = _sample(lengths, batch_size)
        if row_length:
            self.row_length = _round_up(max(longest, row_length), _STEP)
            self.slots = _slots(self.row_length, mean, batch_size)
            rows = [len(first_fit(each, self.row_length, self.slots)) for each in sample]
            self.rows = max(rows)
            return
        self.rows, self.row_length = _shape(sample, longest, mean)
        self.slots = _slots(self.row_length, mean, batch_size)

    def pack(
        self,
        examples: Examples,
        chosen: np.ndarray,
        local: Callable[[int], np.ndarray] | None = None,
    ) -> tuple[Batch, np.ndarray]:
        """Packs the examples with the indices `chosen` (int [n]); `local` is as in `fill`.

        Returns:
          The batch, and int32 [B, E]: which example (index) lies in each slot, -1 for none.
        """
        lengths = examples.lengths[chosen].tolist()
        rows = first_fit(lengths, self.row_length, self.slots)
        return self.fill(examples, [[int(chosen[i]) for i in row] for row in rows], local)

    def fill(
        self,
        examples: Examples,
        rows: list[list[int]],
        local: Callable[[int], np.ndarray] | None = None,
    ) -> tuple[Batch, np.ndarray]:
        """As `pack`, of examples that are in rows already.

        `local` says which of a number of rows to fill (bool [rows]); None: all. Of the others only
        the index is filled, and `segment_ids`, with ones, for who counts the tokens.
        """
        height = self.rows
        if len(rows) > height:  # in few steps: each number of rows is compiled
            height = _round_up(len(rows), math.ceil(height / 4))
        height = _round_up(height, self._divisor)
        batch = _empty(height, self.row_length, self.slots, examples)
        index = np.full((height, self.slots), -1, np.int32)
        mine = local(height) if local else None
        for b, row in enumerate(rows):
            if mine is not None and not mine[b]:
                index[b, : len(row)] = row
                batch.segment_ids[b, : int(examples.lengths[row].sum())] = 1
                continue
            cursor = _Cursor()
            for e, i in enumerate(row):
                index[b, e] = i
                _place(batch, examples, i, b, e, cursor, self._sequence_means)
        return batch, index


def _sample(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Lengths of the examples of up to 32 batches, as `deal` makes them."""
    rng = np.random.default_rng(0)
    lengths = rng.permutation(lengths)[: max(1, len(lengths) // batch_size) * batch_size]
    if len(lengths) < 2 * batch_size:
        return [lengths.tolist()]
    return lengths[deal(lengths, batch_size, rng)[:32]].tolist()


def _slots(row_length: int, mean: float, batch_size: int) -> int:
    """A power of two, so that other data of about the same lengths has the same shape."""
    return min(batch_size, 1 << max(2, math.ceil(math.log2(2 * row_length / mean))))


def _shape(sample: list[list[int]], longest: int, mean: float) -> tuple[int, int]:
    """Returns rows and row length: see `Packer`."""
    batch_size = len(sample[0])
    total = batch_size * mean
    best = (math.inf, 0, 0)
    rows = 1 << (batch_size.bit_length() - 1)
    while rows:
        length = _round_up(max(longest, math.ceil(total / rows)), _STEP)
        slots = _slots(length, mean, batch_size)
        while any(len(first_fit(each, length, slots)) > rows for each in sample):
            length += _STEP
        if rows * length <= total / (1 - _WASTE):
            return rows, length
        best = min(best, (rows * length, rows, length))
        rows //= 2
    return best[1:]


class _Cursor:
    """Where the next sequence of a row goes."""

    def __init__(self) -> None:
        self.offset = 0
        self.segment = 0


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _empty(height: int, length: int, slots: int, examples: Examples) -> Batch:
    tokens = np.zeros((height, length), np.int32)
    candidates = examples.num_candidates
    labels = examples.labels
    return Batch(
        tokens=tokens,
        segment_ids=np.zeros_like(tokens),
        positions=np.zeros_like(tokens),
        token_types=np.zeros_like(tokens),
        lm_weights=np.zeros(tokens.shape, np.float32),
        extract=np.zeros((height, slots, candidates), np.int32),
        candidate_mask=np.zeros((height, slots, candidates), np.float32),
        example_mask=np.zeros((height, slots), np.float32),
        labels=None if labels is None else np.zeros((height, slots), labels.dtype),
    )


def _place(
    batch: Batch,
    examples: Examples,
    i: int,
    b: int,
    e: int,
    cursor: _Cursor,
    sequence_means: bool,
) -> None:
    """Writes example `i` into slot `e` of row `b`."""
    for c in range(examples.num_candidates):
        sequence = i * examples.num_candidates + c
        tokens = examples.tokens[sequence]
        length, start = len(tokens), cursor.offset
        cursor.offset += length
        cursor.segment += 1
        span = slice(start, start + length)
        batch.tokens[b, span] = tokens
        batch.segment_ids[b, span] = cursor.segment
        batch.positions[b, span] = np.arange(length)
        second = start + examples.second_start[sequence]
        batch.token_types[b, second : start + length] = TokenType.SECOND_TEXT
        end = length
        if examples.padding_start is not None:
            end = int(examples.padding_start[sequence])
            batch.token_types[b, start + end : start + length] = TokenType.PADDING
        batch.lm_weights[b, start : start + end - 1] = 1 / (end - 1) if sequence_means else 1.0
        batch.extract[b, e, c] = start + length - 1
        batch.candidate_mask[b, e, c] = 1.0
    batch.example_mask[b, e] = 1.0
    if examples.labels is not None:
        batch.labels[b, e] = examples.labels[i]
