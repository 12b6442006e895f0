"""The request to stop: a signal sets a flag, and the training reads the flag between two steps."""

import signal
import threading
import types
from collections.abc import Callable

from gptjax.errors import StopRequested
from gptjax.io.console import tell

# The signals that ask for a stop. A scheduler sends SIGTERM, Ctrl-C sends SIGINT, and a terminal
# that closes sends SIGHUP.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """A context manager that turns the first signal to stop into a flag.

    A second signal has its usual effect. A signal that the process ignored before stays ignored,
    for example Ctrl-C in a background job or SIGHUP under nohup. Python allows signal handlers only
    in the main thread. Therefore all signals keep their usual effect if another thread enters the
    context.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, object] = {}

    def __call__(self) -> bool:
        """Returns whether a signal to stop has arrived."""
        return self._signal is not None

    @property
    def interrupted(self) -> bool:
        """Whether the signal was SIGINT, which Ctrl-C sends."""
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
    """Returns a function that calls `asked`, and raises `StopRequested` if `asked` returns True."""

    def check_stop() -> None:
        if asked():
            raise StopRequested

    return check_stop
