"""A monitor of orbax's background saves. No process then waits for a save that has failed."""

import sys
import threading

import orbax.checkpoint as ocp


class SaveMonitor:
    """Notices a save that fails in a background thread of this process.

    At a barrier a process waits until all processes have reached it. When a save fails in one
    process, orbax waits at different barriers in this process and in the other processes, for
    twenty minutes each. The monitor replaces orbax's barrier function. If a background thread calls
    the new function while it handles an exception, the function raises this exception again and
    does not wait.
    """

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._failed = threading.Event()
        self._training_thread = threading.current_thread()

    @property
    def failed(self) -> bool:
        """Whether a save has failed in this process."""
        return self._failed.is_set()

    def options(self) -> ocp.options.AsyncOptions:
        """Returns options that make an `ocp.CheckpointManager` use this monitor's barrier."""
        return ocp.options.AsyncOptions(barrier_sync_fn=self._barrier)

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        # orbax calls the barrier in a `finally` block, so `error` is set if the save has failed.
        error = sys.exc_info()[1]
        if error is not None and threading.current_thread() is not self._training_thread:
            self._error = error
            self._failed.set()
            raise error
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def finish(self, manager: ocp.CheckpointManager) -> None:
        """Waits until the save in progress has ended, and raises its error if it failed."""
        while manager.is_saving_in_progress() and not self._failed.wait(0.01):
            pass
        if self._error is not None:
            raise self._error
        manager.wait_until_finished()
