"""The progress of a training: its speed, and the receivers of its messages."""

import contextlib
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any, TypeVar

_PLAIN_LINE_SECONDS = 10.0
# The time of a step is known after this number of measured steps, or after one measured step if
# that took this many seconds.
_MEASURED_STEPS = 3
_MEASURED_SECONDS = 10.0
# An evaluation needs only the forward pass, which has a third of the operations of a step.
_FORWARD = 1 / 3

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


@dataclasses.dataclass(frozen=True)
class Scorings:
    """The validations that a stage has left, and its test, for the estimate of its time."""

    validations: int = 0
    """The number of validations that are left."""
    validation: float = 0.0
    """The number of tokens of a validation, as a multiple of the tokens of a step."""
    test: float = 0.0
    """The number of tokens of the test, as a multiple of the tokens of a step. 0 means that the
    stage has no test."""


def describe_time(step_seconds: float, steps: int, scorings: Scorings) -> str:
    """Returns an estimate of the time of a stage, with the parts that it includes.

    >>> describe_time(0.21, 1000, Scorings(2, 30.0))
    'about 4 min (0.21 s a step, 2 validations)'

    Args:
      step_seconds: the time of a step.
      steps: the number of steps that are left.
      scorings: the evaluations that are left.
    """
    evaluated = scorings.validations * scorings.validation + scorings.test
    seconds = step_seconds * (steps + _FORWARD * evaluated)
    several = "" if scorings.validations == 1 else "s"
    shown = f"{step_seconds:.2g}" if step_seconds < 10 else f"{step_seconds:.0f}"
    parts = [f"{shown} s a step", f"{scorings.validations} validation{several}"]
    parts += ["1 test"] if scorings.test else []
    return f"about {_readable(seconds)} ({', '.join(parts)})"


def _readable(seconds: float) -> str:
    """Returns a duration for people.

    >>> _readable(0.2), _readable(89), _readable(91), _readable(7300)
    ('1 s', '89 s', '2 min', '2 h 2 min')
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    hours, minutes = divmod(max(1, round(seconds / 60)), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


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
        """Prints a line on stdout, above the bar if there is a bar."""
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)
        if self._bar is not None:
            self._bar.refresh()

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
      scorings: the evaluations that are left. After a few steps the reporter gets a line with the
        time that the stage will take. None means that it gets no such line.
    """

    def __init__(
        self,
        stage: str,
        total_steps: int,
        start_step: int,
        reporter: Reporter,
        scorings: Scorings | None = None,
    ):
        self._stage, self._total, self._start = stage, total_steps, start_step
        self._reporter, self._scorings = reporter, scorings
        self._durations: list[float] = []
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
            self._measure(now - self._last_time, self._total - step)
        self._last_time = now
        seconds_left = None
        if self._seconds:
            left = (self._total - step) * self._seconds / max(step - self._first_step, 1)
            seconds_left = max(round(left), 0)
        speed = self.tokens_per_second
        self._reporter.update(Status(self._stage, step, self._total, loss, speed, seconds_left))

    def _measure(self, duration: float, left: int) -> None:
        """Reports once how long the stage will take, as soon as enough steps are measured.

        Args:
          duration: the seconds of the last step.
          left: the number of steps that are left.
        """
        if self._scorings is None:
            return
        self._durations.append(duration)
        if len(self._durations) < _MEASURED_STEPS and self._seconds < _MEASURED_SECONDS:
            return
        if left > 0:
            # The median, because a batch of another shape compiles the step once more.
            step = statistics.median(self._durations)
            self._reporter.say(f"{self._stage}: {describe_time(step, left, self._scorings)}")
        self._scorings = None

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
