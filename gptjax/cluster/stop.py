"""The request to stop: a signal sets a flag, which the training reads between two steps."""

import signal
import threading
import types
from collections.abc import Callable

from gptjax.errors import StopRequested
from gptjax.io.console import tell

# Sent by a scheduler, by Ctrl-C, and by a terminal that closes.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """A context manager that turns the first signal to stop into a flag.

    A second signal has its usual effect. A signal that the process ignores stays ignored: Ctrl-C in
    a background job, SIGHUP under nohup. Signals keep their usual effect if the context is entered
    in another thread than the main one, where Python does not allow handlers.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, object] = {}

    def __call__(self) -> bool:
        """Returns whether a signal to stop has arrived."""
        return self._signal is not None

    @property
    def interrupted(self) -> bool:
        """Whether the signal was the one of Ctrl-C."""
        return self._signal == signal.SIGINT

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        self._signal = number
        self._restore()
        tell("\nstopping after this step (once more to stop at once)")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()


def make_check(asked: Callable[[], bool]) -> Callable[[], None]:
    """Returns a function that calls `asked`, and raises `StopRequested` if it returns True."""

    def check_stop() -> None:
        if asked():
            raise StopRequested

    return check_stop
