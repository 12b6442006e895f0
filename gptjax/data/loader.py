"""Batches in order: `grain` shuffles by index, batches and prefetches.

Batch number `step` is a function of (data, seed, step, batch size) alone: a resumed run asks for
the step it stands at and gets what the uninterrupted run got, on any number of hosts.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from gptjax.batch import Batch
from gptjax.data.packing import Packer, deal, first_fit
from gptjax.data.tasks import Examples
from gptjax.errors import require

# Enough to hide the host work behind a step; each costs one batch of memory.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
# Examples packed at a time where their order does not matter: the packing takes time of its square.
_POOL = 2048


Local = Callable[[int], np.ndarray]
"""Rows of a batch -> bool [rows]: those that this process has to fill. Of the others only
`segment_ids` are, which tell how many tokens the whole batch has."""


def all_rows(rows: int) -> np.ndarray:
    """All rows: there is one process."""
    return np.ones(rows, bool)


def lm_batch(windows: list[np.ndarray], window: int, rows: int) -> Batch:
    """Packs token windows, one to a row; short or missing ones leave padding."""
    tokens = np.zeros((rows, window), np.int32)
    segments = np.zeros((rows, window), np.int32)
    weights = np.zeros((rows, window), np.float32)
    for row, ids in enumerate(windows):
        tokens[row, : len(ids)] = ids
        segments[row, : len(ids)] = 1
        weights[row, : len(ids) - 1] = 1.0
    positions = np.where(segments, np.arange(window, dtype=np.int32), 0)
    return Batch(tokens, segments, positions, np.zeros_like(tokens), weights)


def _cut_batch(
    stream: np.ndarray, starts: Sequence[int], window: int, rows: int, local: Local
) -> Batch:
    """Cuts the windows of the local rows at `starts`."""
    mine = local(rows)
    none = stream[:0]
    cut = [stream[s : s + window] if mine[i] else none for i, s in enumerate(starts)]
    batch = lm_batch(cut, window, rows)
    for row, start in enumerate(starts):
        batch.segment_ids[row, : len(stream) - start] = 1
    return batch


def _draw(seed: int, epoch: int, below: int) -> int:
    """An integer in [0, below) that depends on (seed, epoch) alone."""
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % below


class TextBatches:
    """Random contiguous windows of a token stream.

    An epoch cuts the stream into windows that do not overlap, starting at a random offset, and
    visits them in random order: every token is seen at most once an epoch, in other windows each
    time. What an offset leaves out at either end, less than two windows in all, others reach.
    """

    def __init__(
        self,
        stream: np.ndarray,
        window: int,
        batch_size: int,
        seed: int,
        local: Local = all_rows,
    ):
        """Args: stream integers [n]; window in tokens; batch_size in windows; seed; local rows."""
        require(
            len(stream) >= window,
            f"`pretrain`: the training text has {len(stream)} tokens, fewer than one window "
            f"of {window}; give more text or a smaller `pretrain.window`",
        )
        self._stream, self._window, self._rows, self._seed = stream, window, batch_size, seed
        self._local = local
        self.windows = max(1, len(stream) // window - 1)
        """Windows an epoch."""
        # As far as the end of the stream: no token may be out of reach of every epoch.
        self._offsets = len(stream) - self.windows * window + 1
        order = grain.MapDataset.range(self.windows).shuffle(seed=seed % 2**32).repeat(None)
        self._batches = order.map_with_index(self._start).batch(batch_size, batch_fn=list)

    def _start(self, position: int, index: int) -> int:
        offset = _draw(self._seed, position // self.windows, self._offsets)
        return offset + int(index) * self._window

    def __getitem__(self, step: int) -> Batch:
        starts = self._batches[step]
        return _cut_batch(self._stream, starts, self._window, self._rows, self._local)

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields the batches of steps [start, stop), prefetched."""
        return _prefetch(self, start, stop)


class TaskBatches:
    """Packed batches of shuffled examples; every batch has `batch_size` of them.

    Epochs follow one another without a break: a batch may hold the end of one and the start of the
    next, so that no example is dropped and no update is smaller than the others. The other batches
    of an epoch are dealt so that each has about the same number of tokens (`packing.deal`).

    Or else, as in the authors' code, an epoch is cut into batches as it was shuffled, and what is
    left after its last whole batch is dropped.
    """

    def __init__(
        self,
        examples: Examples,
        packer: Packer,
        batch_size: int,
        seed: int,
        drop_last: bool = False,
        local: Local = all_rows,
    ):
        """Args: examples; packer; batch_size in examples; seed; drop_last; local rows."""
        self._local = local
        self._examples, self._packer, self._size = examples, packer, batch_size
        self._seed, self._drop_last = seed % 2**32, drop_last
        count = len(examples)
        order = grain.MapDataset.range(count).shuffle(seed=self._seed)
        if drop_last:
            self._batches = order.batch(batch_size, drop_remainder=True).repeat(None)
        else:
            self._batches = order.repeat(None).batch(batch_size)
            self._epochs = order.batch(count).repeat(None)
        self._dealt = functools.lru_cache(maxsize=2)(self._deal)

    def _deal(self, epoch: int) -> tuple[int, np.ndarray]:
        """The first batch that lies wholly in an epoch, and all of them: int [batches, size]."""
        count, size = len(self._examples), self._size
        first, last = -(-epoch * count // size), (epoch + 1) * count // size
        start = first * size - epoch * count
        whole = self._epochs[epoch][start : start + max(0, last - first) * size]
        rng = np.random.default_rng((self._seed, epoch))
        dealt = deal(self._examples.lengths[whole], size, rng)
        return first, whole[dealt]

    def _chosen(self, step: int) -> np.ndarray:
        count, size = len(self._examples), self._size
        epoch = step * size // count
        if self._drop_last or (step + 1) * size > (epoch + 1) * count:
            return self._batches[step]
        first, dealt = self._dealt(epoch)
        return dealt[step - first]

    def __getitem__(self, step: int) -> Batch:
        return self._packer.pack(self._examples, self._chosen(step), self._local)[0]

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields the batches of steps [start, stop), prefetched."""
        return _prefetch(self, start, stop)


def _prefetch(batches: TextBatches | TaskBatches, start: int, stop: int) -> Iterator[Batch]:
    steps = grain.MapDataset.range(start, stop).map(lambda step: batches[int(step)])
    return iter(steps.to_iter_dataset(_READ))


def text_in_order(
    stream: np.ndarray, window: int, rows: int, limit: int = 0, local: Local = all_rows
) -> Iterator[Batch]:
    """Yields the whole stream in order, `rows` windows a batch; at most `limit` batches, 0: all."""
    starts = range(0, len(stream), window)
    if limit:
        starts = starts[: limit * rows]
    for first in range(0, len(starts), rows):
        chosen = starts[first : first + rows]
        yield _cut_batch(stream, chosen, window, rows, local)


def every_example(
    examples: Examples, packer: Packer, local: Local = all_rows
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yields every example once, packed, with int32 [B, E] example indices (-1: none).

    Some thousand of them are packed at a time, in full rows; the last batch may be short.
    """
    lengths = examples.lengths
    rows: list[list[int]] = []
    for start in range(0, len(examples), _POOL):
        pool = lengths[start : start + _POOL].tolist()
        fitted = first_fit(pool, packer.row_length, packer.slots)
        rows += [[start + i for i in row] for row in fitted]
    chunks = grain.MapDataset.source(rows).batch(packer.rows, batch_fn=list)
    return iter(
        chunks.map(lambda chunk: packer.fill(examples, chunk, local)).to_iter_dataset(_READ)
    )
