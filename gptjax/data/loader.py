"""Batches: in random order for training, and in order for evaluation.

The training batch of a step depends only on the data, the seed, the step and the batch size. A
resumed run therefore gets the same batches as an uninterrupted run, on any number of hosts.

The library `grain` is used for two things. One is an endless shuffled order of examples, of which
only single positions are read. The other is a pipeline over steps, which prepares batches in
advance. They cannot be the same pipeline, because a balanced batch is chosen from a whole epoch.
"""

import abc
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from gptjax.batch import Batch
from gptjax.data.packing import Packer, RowMask, all_rows, balance_batches, first_fit
from gptjax.data.tasks import Examples
from gptjax.errors import require

# These numbers are enough to prepare the next batches during a step. Each waiting batch takes
# memory.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
# The number of examples that are packed together in evaluation. The time for packing grows with the
# square of this number.
_POOL = 2048


def lm_batch(windows: list[np.ndarray], window: int, rows: int) -> Batch:
    """Returns a batch with one window in each row. A window is a series of adjacent tokens.

    Args:
      windows: the token ids of at most `rows` windows, integers [length] each.
      window: T, the row length in tokens. Shorter windows are padded.
      rows: B, the number of rows. Rows without a window contain only padding.
    """
    tokens = np.zeros((rows, window), np.int32)
    segments = np.zeros((rows, window), np.int32)
    weights = np.zeros((rows, window), np.float32)
    for row, ids in enumerate(windows):
        tokens[row, : len(ids)] = ids
        segments[row, : len(ids)] = 1
        weights[row, : max(0, len(ids) - 1)] = 1.0
    positions = np.where(segments, np.arange(window, dtype=np.int32), 0)
    return Batch(tokens, segments, positions, np.zeros_like(tokens), weights)


def _window_batch(
    stream: np.ndarray, starts: Sequence[int], window: int, rows: int, row_mask: RowMask
) -> Batch:
    """Returns a batch of the windows of the stream that begin at `starts`.

    Only the rows in `row_mask` get tokens. The other rows get only their segment ids.
    """
    filled = row_mask(rows)
    windows = [
        stream[start : start + window] if filled[row] else stream[:0]
        for row, start in enumerate(starts)
    ]
    batch = lm_batch(windows, window, rows)
    for row, start in enumerate(starts):
        batch.segment_ids[row, : len(stream) - start] = 1
    return batch


def _shuffled(count: int, seed: int) -> grain.MapDataset:
    """Returns an endless sequence of indices in [0, count).

    Each epoch of `count` indices is in a new random order.
    """
    return grain.MapDataset.range(count).shuffle(seed=seed % 2**32).repeat(None)


class Batches(abc.ABC):
    """The endless training batches. `batches[step]` is the batch of a step, counted from 0."""

    @abc.abstractmethod
    def __getitem__(self, step: int) -> Batch: ...

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields the batches of the steps [start, stop). They are prepared in advance."""
        steps = grain.MapDataset.range(start, stop).map(lambda step: self[int(step)])
        return iter(steps.to_iter_dataset(_READ))


@dataclasses.dataclass(eq=False)
class TextBatches(Batches):
    """Random contiguous windows of a token stream.

    Each epoch has a random offset. From this offset on, the stream is divided into windows that do
    not overlap, and the windows are used in random order. So each token is used at most once in an
    epoch, and its window is another one in each epoch. The tokens before the offset and after the
    last window, fewer than two windows in all, are used in other epochs.

    Attributes:
      stream: integers [n], token ids.
      window: the number of tokens in a window.
      batch_size: the number of windows in a batch.
      seed: the seed of the offsets and of the order.
      row_mask: the rows that this process fills (see `packing.RowMask`).
      windows: the number of windows in an epoch.

    Raises:
      UserError: the stream has fewer tokens than one window.
    """

    stream: np.ndarray
    window: int
    batch_size: int
    seed: int
    row_mask: RowMask = all_rows

    def __post_init__(self) -> None:
        require(
            len(self.stream) >= self.window,
            f"`pretrain`: the training text has {len(self.stream)} tokens, fewer than one window "
            f"of {self.window}; give more text or a smaller `pretrain.window`",
        )
        # An epoch has one window fewer than the stream could hold. The random offset can then be
        # any number from 0 to at least the length of one window.
        self.windows = max(1, len(self.stream) // self.window - 1)
        self._order = _shuffled(self.windows, self.seed)

    def _start(self, position: int) -> int:
        """Returns the start in the stream of the window at a position of the shuffled order."""
        # With the largest offset, the last window ends at the end of the stream. So no token is
        # left out in all epochs.
        offsets = len(self.stream) - self.windows * self.window + 1
        data = f"{self.seed}:{position // self.windows}".encode()
        digest = hashlib.blake2b(data, digest_size=8).digest()
        offset = int.from_bytes(digest, "little") % offsets
        return offset + int(self._order[position]) * self.window

    def __getitem__(self, step: int) -> Batch:
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        starts = [self._start(position) for position in positions]
        return _window_batch(self.stream, starts, self.window, self.batch_size, self.row_mask)


@dataclasses.dataclass(eq=False)
class TaskBatches(Batches):
    """Packed batches of shuffled examples, all with the same number of examples.

    The two subclasses divide an epoch into batches in different ways.

    Attributes:
      examples: all training examples.
      packer: the packer, which was made for `batch_size` of these examples.
      batch_size: the number of examples in a batch.
      seed: the seed of the order of the examples.
      row_mask: the rows that this process fills (see `packing.RowMask`).
    """

    examples: Examples
    packer: Packer
    batch_size: int
    seed: int
    row_mask: RowMask = all_rows

    def __post_init__(self) -> None:
        self._order = _shuffled(len(self.examples), self.seed)

    @abc.abstractmethod
    def chosen(self, step: int) -> np.ndarray:
        """Returns int [batch_size]: the indices of the examples of a step."""

    def __getitem__(self, step: int) -> Batch:
        return self.packer.pack(self.examples, self.chosen(step), self.row_mask)[0]

    def _at(self, start: int, stop: int) -> np.ndarray:
        """Returns the indices of the examples at positions [start, stop) of the shuffled order."""
        return np.array([self._order[position] for position in range(start, stop)], np.int64)


class BalancedBatches(TaskBatches):
    """Batches with about equal numbers of tokens. No example of an epoch is left out.

    If the batch size does not divide the number of examples, a batch can hold the end of one epoch
    and the start of the next epoch. So all batches have equally many examples. The other batches of
    an epoch are made by `packing.balance_batches`.
    """

    def chosen(self, step: int) -> np.ndarray:
        """Returns int [batch_size]: the indices of the examples of a step."""
        count, size = len(self.examples), self.batch_size
        epoch = step * size // count
        if (step + 1) * size > (epoch + 1) * count:  # the batch goes on in the next epoch
            return self._at(step * size, (step + 1) * size)
        first, batches = self._epoch(epoch)
        return batches[step - first]

    @functools.cached_property
    def _epoch(self) -> Callable[[int], tuple[int, np.ndarray]]:
        """The function `_balanced`, with its last two results kept in memory.

        Two are enough, because batches are prepared in advance for at most two epochs.
        """
        return functools.lru_cache(maxsize=2)(self._balanced)

    def _balanced(self, epoch: int) -> tuple[int, np.ndarray]:
        """Returns the first step whose batch lies wholly in an epoch, and the batches from it on.

        Only batches that lie wholly in the epoch are returned, as int [steps, batch_size]: the
        indices of the examples of each step.
        """
        count, size = len(self.examples), self.batch_size
        first, last = -(-epoch * count // size), (epoch + 1) * count // size
        indices = self._at(first * size, max(first, last) * size)
        rng = np.random.default_rng((self.seed % 2**32, epoch))
        return first, indices[balance_batches(self.examples.lengths[indices], size, rng)]


class WholeEpochBatches(TaskBatches):
    """Batches in plain shuffled order, as in OpenAI's finetune-transformer-lm.

    A batch never holds examples of two epochs. The examples after the last whole batch of an epoch
    are left out.
    """

    def chosen(self, step: int) -> np.ndarray:
        """Returns int [batch_size]: the indices of the examples of a step."""
        epoch, batch = divmod(step, len(self.examples) // self.batch_size)
        start = epoch * len(self.examples) + batch * self.batch_size
        return self._at(start, start + self.batch_size)


def text_in_order(
    stream: np.ndarray, window: int, rows: int, limit: int = 0, row_mask: RowMask = all_rows
) -> Iterator[Batch]:
    """Yields all windows of a stream in order.

    Args:
      stream: integers [n], token ids.
      window: the number of tokens in a window. The last window may be shorter.
      rows: the number of windows in a batch.
      limit: the largest number of batches. 0 means no limit.
      row_mask: the rows that this process fills (see `packing.RowMask`).
    """
    starts = range(0, len(stream), window)
    if limit:
        starts = starts[: limit * rows]
    for first in range(0, len(starts), rows):
        yield _window_batch(stream, starts[first : first + rows], window, rows, row_mask)


def every_example(
    examples: Examples, packer: Packer, row_mask: RowMask = all_rows
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yields packed batches in which every example occurs once.

    Args:
      examples: the examples.
      packer: the packer, which decides the shape of the batches.
      row_mask: the rows that this process fills (see `packing.RowMask`).

    Yields:
      A batch, and int32 [B, E]: the index of the example in each slot, -1 for an empty slot. A slot
      is the place of one example in a row. The last batch may have rows without examples.
    """
    lengths = examples.lengths
    rows: list[list[int]] = []
    for start in range(0, len(examples), _POOL):
        pool = lengths[start : start + _POOL].tolist()
        fitted = first_fit(pool, packer.row_length, packer.slots)
        rows += [[start + i for i in row] for row in fitted]
    chunks = grain.MapDataset.source(rows).batch(packer.rows, batch_fn=list)
    batches = chunks.map(lambda chunk: packer.fill(examples, chunk, row_mask))
    return iter(batches.to_iter_dataset(_READ))
