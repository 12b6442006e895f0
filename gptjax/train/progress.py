"""The progress of a training: its speed, and the receivers of its messages."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from typing import Any, TypeVar

_PLAIN_LINE_SECONDS = 10.0

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Status:
    """The progress of a stage after a step."""

    stage: str
    step: int
    """The number of steps that are done."""
    total_steps: int
    loss: float
    """The training loss of the last step."""
    tokens_per_second: float
    """The speed since the first update of this run. It is 0.0 before the second update."""
    seconds_left: int | None
    """An estimate of the time to the end of the stage. It is None before the second update."""

    def __str__(self) -> str:
        """Returns the loss, the speed and the time left."""
        text = f"loss {self.loss:.4f}"
        if self.seconds_left is None:
            return text
        minutes, seconds = divmod(self.seconds_left, 60)
        left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
        return f"{text}, {self.tokens_per_second:,.0f} tokens/s, {left} left"


class Reporter:
    """Receives the messages and the progress of a training, and ignores them.

    A subclass shows them to the user. In a run of several processes, only process 0 has a reporter
    that shows something.
    """

    def say(self, text: str) -> None:
        """Receives a line for the user."""

    def begin(self, stage: str, total_steps: int, start_step: int) -> None:
        """Receives the start of a stage, before its first step.

        Args:
          stage: the name of the stage.
          total_steps: the number of steps of the whole stage.
          start_step: the number of steps that earlier runs have done.
        """

    def update(self, status: Status) -> None:
        """Receives the progress after each step."""

    def end(self) -> None:
        """Receives the end of a stage, which may be its last step or an error."""


class TerminalReporter(Reporter):
    """Prints messages on stdout, and progress on stderr.

    If stderr is a terminal, the progress is a bar. Otherwise it is a line every ten seconds.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._last_line = -math.inf

    def say(self, text: str) -> None:
        """Prints a line on stdout."""
        print(text, flush=True)

    def begin(self, stage: str, total_steps: int, start_step: int) -> None:
        """Opens the bar if stderr is a terminal."""
        self._last_line = -math.inf
        if sys.stderr.isatty():
            from tqdm import tqdm

            # The format leaves out the rate that tqdm measures, because this rate includes the time
            # of compilation and evaluations.
            layout = "{desc} {n_fmt}/{total_fmt} |{bar}| {postfix}"
            shape: dict[str, Any] = {"bar_format": layout, "dynamic_ncols": True}
            self._bar = tqdm(desc=stage, total=total_steps, initial=start_step, **shape)

    def update(self, status: Status) -> None:
        """Moves the bar. Without a bar, prints a line if ten seconds have passed, or at the end."""
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.set_postfix_str(str(status), refresh=False)
            self._bar.update(status.step - self._bar.n)
        elif now - self._last_line >= _PLAIN_LINE_SECONDS or status.step >= status.total_steps:
            line = f"{status.stage} {status.step}/{status.total_steps} {status}"
            print(line, file=sys.stderr, flush=True)
            self._last_line = now

    def end(self) -> None:
        """Closes the bar if there is a bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Progress:
    """A context manager that measures the speed of a stage and reports its progress.

    The first update is not measured, because it includes the compilation.

    Args:
      stage: the name of the stage.
      total_steps: the number of steps of the whole stage.
      start_step: the number of steps that earlier runs have done.
      reporter: the receiver of the progress.
    """

    def __init__(self, stage: str, total_steps: int, start_step: int, reporter: Reporter):
        self._stage, self._total, self._start = stage, total_steps, start_step
        self._reporter = reporter
        self._tokens, self._seconds, self._waited = 0, 0.0, 0.0
        self._first_step: int | None = None
        self._last_time = -math.inf

    @property
    def tokens_per_second(self) -> float:
        """The speed since the first update, without pauses. It is 0.0 before the second update."""
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def input_wait(self) -> float:
        """The fraction of the measured time in which the host waited for batches.

        It is 0.0 before the second update. The devices may have worked while the host waited, so
        the training lost at most this fraction of the time by waiting.
        """
        return self._waited / self._seconds if self._seconds else 0.0

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """Yields the batches, and measures the time that the host waits for each batch."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            if self._first_step is not None:
                self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def update(self, step: int, loss: float, tokens: int) -> None:
        """Reports the progress after a step.

        Args:
          step: the number of steps that are done.
          loss: the training loss of the last step.
          tokens: the number of tokens since the previous update.
        """
        now = time.perf_counter()
        if self._first_step is None:
            self._first_step = step
        else:
            self._tokens += tokens
            self._seconds += now - self._last_time
        self._last_time = now
        seconds_left = None
        if self._seconds:
            left = (self._total - step) * self._seconds / max(step - self._first_step, 1)
            seconds_left = max(round(left), 0)
        speed = self.tokens_per_second
        self._reporter.update(Status(self._stage, step, self._total, loss, speed, seconds_left))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of its `with` block (an evaluation or a save) out of the speed."""
        start = time.perf_counter()
        yield
        self._last_time += time.perf_counter() - start

    def __enter__(self) -> "Progress":
        self._reporter.begin(self._stage, self._total, self._start)
        return self

    def __exit__(self, *_: object) -> None:
        self._reporter.end()
