"""Files that are written whole or not at all, and JSON."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from gptjax.errors import UserError
from gptjax.io import remote
from gptjax.io.remote import PathLike


@contextlib.contextmanager
def disk_errors(path: PathLike) -> Iterator[None]:
    """Turns a full or read-only disk into a `UserError`: one line that names the path.

    Of a bucket, rights alone: that it cannot be reached for a while is not the user's to mend.
    """
    try:
        yield
    except OSError as error:
        refused = isinstance(error, PermissionError) or "orbidden" in str(error)
        if remote.is_remote(path) and not refused:
            raise
        raise UserError(
            f"cannot write {os.fspath(path)}: {error.strerror or error}; "
            "free space, fix its permissions, or choose another folder"
        ) from error


def write_atomically(path: PathLike, data: bytes) -> None:
    """Puts `data` at `path`, making its folder, so that no reader ever sees half a file."""
    if remote.is_remote(path):
        with disk_errors(path):
            epath.Path(path).write_bytes(data)
        return
    folder, name = os.path.split(os.path.abspath(path))
    # Not `tempfile`: its files are readable by their owner only, and would stay so.
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    with disk_errors(path):
        os.makedirs(folder, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise


def json_ready(value: Any) -> Any:
    """`value` with NumPy numbers as Python's, and NaN and infinities, which JSON lacks, as null."""
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(v) for v in value]
    if isinstance(value, np.generic | np.ndarray):
        return json_ready(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: PathLike, obj: Any) -> None:
    """Writes `obj` as JSON, atomically, keys in their order; `UserError` when the disk refuses."""
    write_atomically(path, json.dumps(json_ready(obj), indent=2, allow_nan=False).encode() + b"\n")


def read_json(path: PathLike) -> Any:
    """Reads a JSON file; a missing or broken one is a `UserError`."""
    try:
        return json.loads(epath.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{os.fspath(path)}: cannot be read as JSON ({error})") from error
