"""Orbax's handlers, watched: a save that fails in one of several processes is known there at once.

Orbax itself lets the failing process wait for the others at a barrier, and the others for it at
another, each until a time-out.
"""

import contextlib
import errno
import os
import re
import threading
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from gptjax.errors import UserError, brief


@contextlib.contextmanager
def disk_errors(path: epath.Path) -> Iterator[None]:
    """A full disk and the like are the user's to mend: one line, and the last checkpoint stays."""
    try:
        yield
    except Exception as error:
        text = str(error)
        full = "No space left" in text or "RESOURCE_EXHAUSTED" in text or "ENOSPC" in text
        code = getattr(error, "errno", None)
        if found := re.search(r"os_error_code='(\d+)'", text):  # tensorstore's
            code = int(found[1])
        if full or code in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path}: no space left on the disk; the last checkpoint is kept"
            ) from error
        if code in (errno.EACCES, errno.EROFS, errno.EPERM, errno.EFBIG):
            reason = f"{os.strerror(code)}; {brief(error)}"
            raise UserError(f"{path}: cannot write there ({reason})") from error
        raise


class Failure:
    """The first error of the saves in the background, if there was one."""

    def __init__(self) -> None:
        self._error: Exception | None = None
        self._happened = threading.Event()

    def note(self, error: Exception) -> None:
        """Keeps the error; called in the background."""
        self._error = self._error or error
        self._happened.set()

    def check(self, seconds: float = 0.0) -> None:
        """Waits so long for an error, and raises it."""
        if self._happened.wait(seconds):
            assert self._error is not None
            raise self._error

    def __bool__(self) -> bool:
        return self._happened.is_set()


class _Future:
    """A future of orbax that notes its error."""

    def __init__(self, future: ocp.future.Future, failure: Failure):
        self._future, self._failure = future, failure

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._future.result(timeout)
        except Exception as error:
            self._failure.note(error)
            raise


class _Watched:
    """A part of a handler: notes the errors of writing (any process) and of finishing (0)."""

    failure: Failure

    async def async_save(self, *args: Any, **kwargs: Any) -> list[_Future]:
        futures = await super().async_save(*args, **kwargs)  # type: ignore[misc]
        return [_Future(each, self.failure) for each in futures or ()]

    def finalize(self, directory: Any) -> None:
        try:
            super().finalize(directory)  # type: ignore[misc]
        except Exception as error:
            self.failure.note(error)
            raise


class _Arrays(_Watched, ocp.StandardCheckpointHandler):
    """Of arrays."""


class _Json(_Watched, ocp.JsonCheckpointHandler):
    """Of plain values."""


def handlers(failure: Failure) -> ocp.handlers.CheckpointHandlerRegistry:
    """Returns what saves and restores the items of a checkpoint; errors go to `failure` too."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    arrays = ocp.args.StandardSave, ocp.args.StandardRestore
    plain = ocp.args.JsonSave, ocp.args.JsonRestore
    for item, kind, arguments in (
        ("params", _Arrays, arrays), ("optimizer", _Arrays, arrays), ("meta", _Json, plain),
    ):  # fmt: skip
        handler = kind()
        handler.failure = failure
        for each in arguments:
            registry.add(item, each, handler)
    return registry
