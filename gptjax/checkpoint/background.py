"""Orbax's saves in the background and its reads, where one process may fail by itself.

Orbax itself lets the failing process wait for the others at a barrier, and the others for it at
another, each for twenty minutes.
"""

import contextlib
import errno
import os
import re
import sys
import threading
from collections.abc import Iterator

import jax
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


def reader() -> ocp.Checkpointer:
    """Returns what reads checkpoints without a barrier; whoever reads together has to compare."""
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone)


class Watch:
    """Sees a save fail, by the barrier that orbax goes to as it cleans up."""

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._failed = threading.Event()

    @property
    def failed(self) -> bool:
        """Whether a save has failed."""
        return self._failed.is_set()

    def options(self) -> ocp.options.AsyncOptions:
        """Returns orbax's options, with the watched barrier."""
        return ocp.options.AsyncOptions(barrier_sync_fn=self._barrier)

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        error = sys.exc_info()[1]
        if error is not None and threading.current_thread() is not threading.main_thread():
            self._error = error
            self._failed.set()
            raise error
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def finish(self, manager: ocp.CheckpointManager) -> None:
        """Waits for the save that is under way, and raises the error of one that failed."""
        while manager.is_saving_in_progress() and not self._failed.wait(0.01):
            pass
        if self._error is not None:
            raise self._error
        manager.wait_until_finished()
