"""A cache on disk for data that takes long to compute.

It is the folder `data` in $GPTJAX_CACHE, by default ~/.cache/gptjax.

An entry is one file, NAME-FINGERPRINT. The name is a fingerprint of everything that the contents
were computed from (contents and versions, never paths or times). The second part is the fingerprint
of the file itself. It is checked whenever the entry is opened: a truncated or damaged file is
deleted and written again. Size and modification time cannot replace this check, because a damaged
disk changes neither.

A file gets its final name only when it is complete. Two processes that write the same entry at the
same time write the same bytes. Users may delete the folder at any time, even while a run reads it.
"""

import contextlib
import functools
import glob
import logging
import os
import time
import uuid
from collections.abc import Callable
from typing import BinaryIO, TypeVar

from gptjax.data import fingerprints

T = TypeVar("T")
Writer = Callable[[BinaryIO], None]
"""Writes the contents of an entry to a file."""

# No entry takes this long to write. An older temporary file was left behind by a killed process.
_ABANDONED_SECONDS = 24 * 3600


def folder() -> str:
    """Returns the cache folder; "" if $GPTJAX_CACHE is set to the empty string: no cache."""
    return os.path.expanduser(os.environ.get("GPTJAX_CACHE", os.path.join("~", ".cache", "gptjax")))


def get_or_make(
    name: str, ending: str, write: Writer, read: Callable[[str], T], make: Callable[[], T]
) -> T:
    """Returns the entry `name`; writes it first if it is missing or damaged.

    Args:
      name: from `fingerprints.of_values`; entries of equal names have equal contents. Nothing is
        kept under the name "".
      ending: the ending of the file name, such as ".json".
      write: writes the contents. An `OSError` that it raises counts as an error of the disk.
      read: opens the file of the given path. The returned object may stay mapped to the file.
      make: returns the same as `read`, without a file.

    Returns:
      The result of `read`; that of `make`, after a warning, if the cache cannot be written (no
      folder, no space, no permission).
    """
    root = folder()
    if not root or not name:
        return make()
    directory = os.path.join(root, "data")
    path = _find(directory, name, ending)
    if path is not None:
        with contextlib.suppress(OSError):  # another process has just deleted it
            return read(path)
    try:
        return read(_written(directory, name, ending, write))
    except OSError as error:
        _warn(directory, error.strerror or str(error))
    return make()


@functools.cache  # one warning for each folder
def _warn(directory: str, reason: str) -> None:
    logging.warning(
        f"{directory}: cannot write the cache there ({reason}); the data stays in memory; set "
        "GPTJAX_CACHE to another folder, or to nothing for no cache"
    )


def _find(directory: str, name: str, ending: str) -> str | None:
    """Returns the path of an entry. Deletes files whose contents do not match their name."""
    for path in glob.glob(os.path.join(glob.escape(directory), f"{name}-*{ending}")):
        with contextlib.suppress(OSError):
            if path.endswith(f"-{fingerprints.of_file(path)}{ending}"):
                return path
            os.remove(path)
    return None


def _written(directory: str, name: str, ending: str, write: Writer) -> str:
    """Writes an entry and returns its path; an error leaves no file."""
    os.makedirs(directory, exist_ok=True)
    for abandoned in glob.glob(os.path.join(glob.escape(directory), ".*.tmp")):
        with contextlib.suppress(OSError):
            if time.time() - os.path.getmtime(abandoned) > _ABANDONED_SECONDS:
                os.remove(abandoned)
    # `tempfile` would make a file that only its owner can read, and the entry would stay so.
    temporary = os.path.join(directory, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
        path = os.path.join(directory, f"{name}-{fingerprints.of_file(temporary)}{ending}")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # it has its final name already, unless an error came
            os.remove(temporary)
    return path
