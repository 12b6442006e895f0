"""What takes long to make of data is kept on disk: in `data/` of $GPTJAX_CACHE (~/.cache/gptjax).

An entry is one file, KEY-DIGEST. The key names what it was made from (contents and versions, never
paths or times), the digest what is in it: a file that was cut short or damaged is found out when it
is opened, and made anew. Files appear whole, and processes that make one at the same time write
the same bytes. The folder may be deleted at any time, also while a run reads from it.
"""

import contextlib
import functools
import glob
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

T = TypeVar("T")

# A file that is being written changes more often than this: an older one belongs to nobody.
_ABANDONED_SECONDS = 24 * 3600


def folder() -> str:
    """Returns the cache folder; "" where $GPTJAX_CACHE is set to nothing: keep nothing."""
    return os.path.expanduser(os.environ.get("GPTJAX_CACHE", os.path.join("~", ".cache", "gptjax")))


def key(*parts: str | int) -> str:
    """Returns a name of what the parts say.

    >>> key("a", "b") == key("ab"), len(key())
    (False, 32)
    """
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def file_digest(path: str) -> str:
    """Returns a hash of a file's contents, which need not fit in memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def kept(
    name: str, ending: str, write: Callable[[BinaryIO], None], read: Callable[[str], T]
) -> T | None:
    """Returns what is kept under `name`, made first where it is missing or damaged.

    Args:
      name: of `key`; equal names, equal contents.
      ending: of the file, such as ".npy".
      write: writes the contents; an `OSError` of it is taken for one of the disk.
      read: opens a file; what it returns may go on reading from there.

    Returns:
      None where nothing can be kept (no folder, no space, no permission), after a warning.
    """
    place = folder()
    if not place:
        return None
    place = os.path.join(place, "data")
    path = _find(place, name, ending)
    if path is not None:
        with contextlib.suppress(OSError):  # deleted just now
            return read(path)
    try:
        os.makedirs(place, exist_ok=True)
        with _new_file(place, name) as temporary:
            with open(temporary, "xb") as file:
                write(file)
            path = os.path.join(place, f"{name}-{file_digest(temporary)}{ending}")
            os.replace(temporary, path)
        return read(path)
    except OSError as error:
        _warn(place, error.strerror or str(error))
        return None


@functools.cache  # once for each folder
def _warn(place: str, reason: str) -> None:
    logging.warning(
        "%s: cannot keep data there (%s); it is held in memory instead; set GPTJAX_CACHE to "
        "another folder, or to nothing to keep none",
        place, reason,
    )  # fmt: skip


def _find(place: str, name: str, ending: str) -> str | None:
    """The entry's file; one that does not hold what its name says is removed."""
    for path in glob.glob(os.path.join(glob.escape(place), f"{name}-*{ending}")):
        with contextlib.suppress(OSError):
            if path.endswith(f"-{file_digest(path)}{ending}"):
                return path
            os.remove(path)
    return None


@contextlib.contextmanager
def _new_file(place: str, name: str) -> Iterator[str]:
    """A file name for this writer alone; the file does not outlive a failure."""
    for old in glob.glob(os.path.join(glob.escape(place), ".*.tmp")):  # of killed processes
        with contextlib.suppress(OSError):
            if time.time() - os.path.getmtime(old) > _ABANDONED_SECONDS:
                os.remove(old)
    # Not `tempfile`: its files are readable by their owner only, and would stay so.
    path = os.path.join(place, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        yield path
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(path)
        raise
