"""A cache on disk for data that takes long to compute.

The entries are files in the folder `data` of $GPTJAX_CACHE, which is by default ~/.cache/gptjax.

The name of such a file is NAME-FINGERPRINT and an ending. NAME is a hash of all inputs of the
computation (contents and versions, but no paths or times). FINGERPRINT is a hash of the file
itself. It is checked whenever the entry is opened. If it does not match, because the file is
truncated or damaged, the file is deleted and written again. Size and modification time would not be
enough for this check, because a damaged disk changes neither.

A file gets its final name only when it is complete. If two processes write the same entry at the
same time, they write the same bytes. Users can delete the folder at any time, even while a run
reads it.
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
"""A function that writes the contents of an entry to a file."""

# Writing an entry never takes this long. An older temporary file was left by a killed process.
_ABANDONED_SECONDS = 24 * 3600


def folder() -> str:
    """Returns the cache folder. "" means no cache: $GPTJAX_CACHE is set to the empty string."""
    return os.path.expanduser(os.environ.get("GPTJAX_CACHE", os.path.join("~", ".cache", "gptjax")))


def entries_folder() -> str:
    """Returns the folder of the entries. "" means no cache."""
    return os.path.join(folder(), "data") if folder() else ""


def get_or_make(
    name: str,
    ending: str,
    write: Writer,
    read: Callable[[str], T],
    make: Callable[[], T],
    required: bool = False,
) -> T:
    """Returns the entry `name`, and writes it first if it is missing or damaged.

    Args:
      name: the name of the entry, for example from `fingerprints.of_values`. Entries of equal names
        must have equal contents. An empty string means that nothing is cached.
      ending: the ending of the file name, such as ".json".
      write: a function that writes the contents. If it raises `OSError`, the cache counts as not
        writable.
      read: a function that opens the file at a path. The object that it returns can stay mapped to
        the file.
      make: a function that returns the same object as `read`, without a file.
      required: whether a cache that cannot be written raises `OSError`. This is for objects that
        may be larger than memory.

    Returns:
      The result of `read`. If there is no cache, or if it cannot be written (for lack of space or
      permission, with a warning), the result of `make`.
    """
    directory = entries_folder()
    if not directory or not name:
        return make()
    path = _find(directory, name, ending)
    if path is not None:
        with contextlib.suppress(OSError):  # another process has just deleted the file
            return read(path)
    try:
        return read(_written(directory, name, ending, write))
    except OSError as error:
        if required:
            raise
        _warn(directory, error.strerror or str(error))
    return make()


@functools.cache  # one warning for each folder
def _warn(directory: str, reason: str) -> None:
    logging.warning(
        f"{directory}: cannot write the cache there ({reason}); the data stays in memory; set "
        "GPTJAX_CACHE to another folder, or to nothing for no cache"
    )


def has(name: str, ending: str) -> bool:
    """Returns whether there is a file of this entry. Its contents are not checked."""
    directory = entries_folder()
    return bool(directory and glob.glob(_pattern(directory, name, ending)))


def _pattern(directory: str, name: str, ending: str) -> str:
    return os.path.join(glob.escape(directory), f"{name}-*{ending}")


def _find(directory: str, name: str, ending: str) -> str | None:
    """Returns the path of an entry; None if it is missing.

    Files of this entry whose contents do not match their FINGERPRINT are deleted.
    """
    for path in glob.glob(_pattern(directory, name, ending)):
        with contextlib.suppress(OSError):
            if path.endswith(f"-{fingerprints.of_file(path)}{ending}"):
                return path
            os.remove(path)
    return None


def _written(directory: str, name: str, ending: str, write: Writer) -> str:
    """Writes an entry and returns its path. If an error occurs, no file is left."""
    os.makedirs(directory, exist_ok=True)
    for abandoned in glob.glob(os.path.join(glob.escape(directory), ".*.tmp")):
        with contextlib.suppress(OSError):
            if time.time() - os.path.getmtime(abandoned) > _ABANDONED_SECONDS:
                os.remove(abandoned)
    # `tempfile` is not used, because other users could not read a file that it has made.
    temporary = os.path.join(directory, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
        path = os.path.join(directory, f"{name}-{fingerprints.of_file(temporary)}{ending}")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # without an error, the file already has its final name
            os.remove(temporary)
    return path
