"""Being asked to stop: SIGTERM (a scheduler) and Ctrl-C are noted, and obeyed between two steps."""

import os
import signal
import types


class StopRequest:
    """While entered, the first SIGTERM or SIGINT sets the flag; a second one acts as usual."""

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, object] = {}

    def __call__(self) -> bool:
        """Returns whether the process was asked to stop."""
        return self._requested

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        self._requested = True
        self._restore()
        # Not print: a signal may come in the middle of another print.
        os.write(2, b"\nstopping after this step (once more to stop at once)\n")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
