"""Batches of training, in a random order that can start at any step, and of evaluation, in order.

Batch number `step` is a function of (data, seed, step, batch size) alone. A resumed run therefore
gets the same batches as an uninterrupted run, on any number of hosts.

`grain` makes two things: an endless shuffled order, which is only indexed, and a pipeline over
steps, which prefetches. They cannot be one pipeline, because a balanced batch is chosen from a
whole epoch.
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

# Enough to prepare the next batches during a step. Each batch that waits takes its memory.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
# Examples that are packed together in evaluation. The time of packing grows with their square.
_POOL = 2048


def lm_batch(windows: list[np.ndarray], window: int, rows: int) -> Batch:
    """Returns a batch with one token window in each row.

    Args:
      windows: integers [length] each, at most `rows` of them.
      window: T, tokens of a row; shorter windows are padded.
      rows: B; rows without a window are padding.
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
    """Returns a batch of the windows of the stream that begin at `starts`."""
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
    """Returns position -> index in [0, count): endless epochs, each in a new random order."""
    return grain.MapDataset.range(count).shuffle(seed=seed % 2**32).repeat(None)


class Batches(abc.ABC):
    """The batches of a training. `batches[step]` is that of a step, from 0 without end."""

    @abc.abstractmethod
    def __getitem__(self, step: int) -> Batch: ...

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields the batches of steps [start, stop), prefetched."""
        steps = grain.MapDataset.range(start, stop).map(lambda step: self[int(step)])
        return iter(steps.to_iter_dataset(_READ))


@dataclasses.dataclass(eq=False)
class TextBatches(Batches):
    """Random contiguous windows of a token stream.

    In each epoch the stream is divided into windows that do not overlap, from a random offset on,
    and these are visited in random order. A token is seen at most once an epoch, and in other
    windows each time. The tokens before the offset and after the last window, fewer than two
    windows in all, are seen in other epochs.

    Attributes:
      stream: integers [n], token ids.
      window: tokens of a window.
      batch_size: windows of a batch.
      seed: decides the windows and their order.
      row_mask: the rows to fill, see `packing.RowMask`.
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
        # An epoch has one window fewer than fit into the stream. The random offset of the windows
        # can therefore be larger than a window.
        self.windows = max(1, len(self.stream) // self.window - 1)
        self._order = _shuffled(self.windows, self.seed)

    def _start(self, position: int) -> int:
        """Returns the first token of the window at a position of the shuffled order."""
        # With the largest offset the last window ends at the end of the stream. Therefore every
        # token is in a window of some epoch.
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

    The two subclasses differ in how an epoch is divided into batches.

    Attributes:
      examples: all of them.
      packer: for batches of `batch_size` of these examples.
      batch_size: examples of a batch.
      seed: decides the order of the examples.
      row_mask: the rows to fill, see `packing.RowMask`.
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
    """Batches across epochs, with about the same number of tokens in each batch.

    A batch may hold the end of one epoch and the start of the next: no example is left out, and no
    update has fewer examples than another. The other batches of an epoch are balanced, see
    `packing.balance_batches`.
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
        """`_balanced`, whose last results are kept: prefetching reads at most two epochs."""
        return functools.lru_cache(maxsize=2)(self._balanced)

    def _balanced(self, epoch: int) -> tuple[int, np.ndarray]:
        """Returns the first step whose batch is within an epoch, and the batches from there on.

        The batches, as many as are within the epoch, are int [steps, batch_size]: the indices of
        the examples of each step.
        """
        count, size = len(self.examples), self.batch_size
        first, last = -(-epoch * count // size), (epoch + 1) * count // size
        indices = self._at(first * size, max(first, last) * size)
        rng = np.random.default_rng((self.seed % 2**32, epoch))
        return first, indices[balance_batches(self.examples.lengths[indices], size, rng)]


class WholeEpochBatches(TaskBatches):
    """Batches of one epoch each, in the order of the shuffle, as in the authors' code.

    The examples after the last whole batch of an epoch are left out.
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
      window: tokens of a window; the last one may be shorter.
      rows: windows of a batch.
      limit: the largest number of batches; 0: no limit.
      row_mask: the rows to fill, see `packing.RowMask`.
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
      examples: all of them.
      packer: for the shape of the batches.
      row_mask: the rows to fill, see `packing.RowMask`.

    Yields:
      A batch of full rows (the last batch may have fewer), and int32 [B, E]: the index of the
      example in each slot, -1 for an empty slot.
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
