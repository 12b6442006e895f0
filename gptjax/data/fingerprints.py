"""Fingerprints: hashes of contents, 32 hexadecimal digits each.

They are part of the names of cache entries. A checkpoint stores the fingerprint of its training
data, so that a resumed run can check that the data is still the same. A fingerprint depends only on
contents, not on paths, times, processes or the kind of machine.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

# The number of rows of an array that are read at a time. The array may be a file that is larger
# than memory.
_ROWS_AT_ONCE = 1 << 20


def _new_hash() -> Any:
    return hashlib.blake2b(digest_size=16)


def of_values(*values: str | int) -> str:
    """Returns the fingerprint of a list of short values. Members of enumerations become strings.

    >>> of_values("a", "b") == of_values("ab"), len(of_values())
    (False, 32)
    """
    digest = _new_hash()
    plain = tuple(str(value) if isinstance(value, str) else value for value in values)
    digest.update(repr(plain).encode())
    return digest.hexdigest()


def of_file(path: str) -> str:
    """Returns the fingerprint of a file's bytes. The file can be larger than memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, _new_hash).hexdigest()


def of_texts(texts: Iterable[str]) -> str:
    """Returns the fingerprint of texts in their order.

    >>> of_texts(["ab", "c"]) == of_texts(["a", "bc"])
    False
    """
    digest = _new_hash()
    for text in texts:
        data = text.encode(errors="surrogatepass")
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()


def of_arrays(*arrays: np.ndarray | None) -> str:
    """Returns the fingerprint of the types, shapes and elements of arrays. None is left out.

    A uint16 array is treated as int32, because equal token ids can be stored in either type.
    This formula must not change, because checkpoints store its results. With another formula, runs
    of earlier versions could not be continued.
    """
    digest = _new_hash()
    for array in arrays:
        if array is None:
            continue
        dtype = np.dtype(np.int32) if array.dtype == np.uint16 else array.dtype
        digest.update(f"{dtype}{array.shape}".encode())
        for start in range(0, len(array), _ROWS_AT_ONCE):
            rows = array[start : start + _ROWS_AT_ONCE]
            digest.update(np.ascontiguousarray(rows, dtype).data)
    return digest.hexdigest()
