"""The hidden states of frozen blocks on disk: one array for each split, mapped into memory.

An array is [total number of tokens of a split, D] in the compute dtype (see `Examples.hidden`). It
is an entry of the cache. A bfloat16 array is kept as uint16, because NumPy's file format does not
know bfloat16.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np

from gptjax.data import cache, fingerprints
from gptjax.data.tasks import Examples
from gptjax.errors import UserError, require

_ENDING = ".npy"

Pieces = Iterator[tuple[int, np.ndarray]]
"""Pairs of the index of a row in the array, and the rows [n, D] from this index on."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """The hidden states of one split."""

    name: str
    """The name of the entry in the cache. It is a hash of all that decides the states."""
    shape: tuple[int, int]
    dtype: np.dtype
    compute: Callable[[], Pieces]
    """A function that computes the states. Its pieces together are the whole array."""

    @property
    def bytes(self) -> int:
        """The size of the array."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def stored(self) -> bool:
        """Whether the cache has the entry. Its contents are not checked."""
        return cache.has(self.name, _ENDING)


def readable(size: int) -> str:
    """Returns a number of bytes for people.

    >>> readable(352_700_000), readable(2_410_000_000)
    ('353 MB', '2.4 GB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{math.ceil(size / 1e6)} MB"


def fingerprint(examples: Examples) -> str:
    """Returns the fingerprint of all that the hidden states of the examples depend on, except the
    weights: the tokens, the ends of the sequences, and the types of the tokens."""
    lengths = np.array([len(tokens) for tokens in examples.tokens], np.int32)
    tokens = np.concatenate(examples.tokens)
    return fingerprints.of_arrays(tokens, lengths, examples.second_start, examples.padding_start)


def require_space(entries: Sequence[Entry]) -> None:
    """Requires that the disk of the cache has room for the entries that it lacks.

    Raises:
      UserError: there is no room, or the folder cannot be made.
    """
    folder = cache.entries_folder()
    needed = sum(entry.bytes for entry in entries if not entry.stored)
    if not (folder and needed):
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise _refused(folder, needed, error.strerror or str(error)) from error
    free = shutil.disk_usage(folder).free
    require(needed <= free, str(_refused(folder, needed, f"{readable(free)} are free")))


def load(entry: Entry) -> np.ndarray:
    """Returns the array of an entry. If the cache lacks it, the array is computed and written.

    The array is mapped from the file. Without a cache it is held in memory.

    Raises:
      UserError: the file cannot be written. The array is then not held in memory instead, because
        it may be larger than memory.
    """
    stored = np.dtype(np.uint16) if entry.dtype.itemsize == 2 else entry.dtype

    def write(file: BinaryIO) -> None:
        header = {"descr": stored.str, "fortran_order": False, "shape": entry.shape}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        for row, states in entry.compute():
            file.seek(start + row * entry.shape[1] * stored.itemsize)
            file.write(np.ascontiguousarray(states).view(stored).data)

    def read(path: str) -> np.ndarray:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)).view(entry.dtype)

    def make() -> np.ndarray:
        array = np.zeros(entry.shape, entry.dtype)
        for row, states in entry.compute():
            array[row : row + len(states)] = states
        return array

    try:
        return cache.get_or_make(entry.name, _ENDING, write, read, make, required=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise _refused(cache.entries_folder(), entry.bytes, reason) from error


def _refused(folder: str, size: int, reason: str) -> UserError:
    return UserError(
        f"{folder}: cannot keep {readable(size)} of hidden states for `finetune.freeze` there "
        f"({reason}); free space, set GPTJAX_CACHE to a folder on another disk, or write "
        "`finetune.freeze`=0"
    )
