"""Atomic writes of files, JSON files, and errors of the disk."""

import contextlib
import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from gptjax.errors import UserError, brief
from gptjax.io import remote
from gptjax.io.remote import PathLike


@contextlib.contextmanager
def disk_errors(path: PathLike, note: str = "") -> Iterator[None]:
    """Turns a failed write into a `UserError` with one line that names the path and the reason.

    Exceptions that the user cannot remedy are not changed.

    Args:
      path: the file or folder that is written.
      note: a further remark for the user, which is put at the end of the message.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error, remote.is_remote(path))
        if not reason:
            raise
        raise UserError(
            f"cannot write {os.fspath(path)}: {reason}; free space, fix its permissions, or "
            f"choose another folder{note and '; '}{note}"
        ) from error


def _reason(error: Exception, in_bucket: bool) -> str:
    """Returns why a write failed, or an empty string if the user cannot remedy the failure."""
    text = str(error)
    # tensorstore, which writes the arrays of checkpoints, raises ValueError with these texts.
    code = re.search(r"os_error_code='(\d+)'", text)
    if code:
        return f"{os.strerror(int(code[1]))} ({brief(error)})"
    if any(full in text for full in ("No space left", "ENOSPC", "RESOURCE_EXHAUSTED")):
        return os.strerror(errno.ENOSPC)
    if in_bucket:
        # The user can change permissions. An unreachable bucket may become reachable by itself.
        refused = isinstance(error, PermissionError) or "orbidden" in text
        return text if refused else ""
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return error.strerror or text
    return ""


def write_atomically(path: PathLike, data: bytes) -> None:
    """Writes a file as a whole, so that no reader sees half of the file.

    If the folder of the file does not exist, it is created.
    """
    if remote.is_remote(path):
        with disk_errors(path):
            epath.Path(path).write_bytes(data)
        return
    folder, name = os.path.split(os.path.abspath(path))
    # The module `tempfile` is not used, because only the owner can read its files, even after they
    # are renamed.
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
    """Returns `value` in a form that `json.dumps` accepts.

    NumPy numbers and arrays become Python numbers and lists. NaN and infinity become None.
    """
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
    """Writes `obj` as JSON, atomically. The order of the keys is kept.

    Raises:
      UserError: the file cannot be written.
    """
    write_atomically(path, json.dumps(json_ready(obj), indent=2, allow_nan=False).encode() + b"\n")


def read_json(path: PathLike) -> Any:
    """Reads a JSON file.

    Raises:
      UserError: the file is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(epath.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{os.fspath(path)}: cannot be read as JSON ({error})") from error
