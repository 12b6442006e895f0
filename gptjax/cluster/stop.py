"""Being asked to stop: a signal is noted, and obeyed between two steps."""

import signal
import types

from gptjax.io.console import tell

# A scheduler's, Ctrl-C's, and a closed terminal's.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """While entered, the first of the signals sets the flag; a second one acts as usual.

    One that is ignored (Ctrl-C in a background job of a script, SIGHUP under nohup) stays so.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, object] = {}

    def __call__(self) -> bool:
        """Returns whether the process was asked to stop."""
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
