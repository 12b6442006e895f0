"""The request to stop: a signal sets a flag, which the training reads between two steps."""

import signal
import types
from collections.abc import Callable

from gptjax.errors import StopRequested
from gptjax.io.console import tell

# Sent by a scheduler, by Ctrl-C, and by a terminal that closes.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """A context manager that turns the first signal to stop into a flag.

    A second signal has its usual effect. A signal that the process ignores stays ignored: Ctrl-C in
    a background job, SIGHUP under nohup.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, object] = {}

    def __call__(self) -> bool:
        """Returns whether a signal to stop has arrived."""
        return self._requested

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        self._requested = True
        self._restore()
        tell("\nstopping after this step (once more to stop at once)")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()


def raising(asked: Callable[[], bool]) -> Callable[[], None]:
    """Returns a function that calls `asked`, and raises `StopRequested` if it returns True."""

    def check_stop() -> None:
        if asked():
            raise StopRequested

    return check_stop
