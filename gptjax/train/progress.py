"""The progress of a training on a terminal, and its speed."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from typing import Any, TypeVar

_PLAIN_LINE_SECONDS = 10.0

T = TypeVar("T")


class Progress:
    """Step, loss, tokens per second and time left on stderr: a bar, or lines if no terminal.

    Speed and time left are measured from the end of the first update, which compiles. Every process
    may read `tokens_per_second`; only an enabled one writes. A context manager.

    Args:
      stage: shown at the front.
      total_steps: the last step of the stage.
      start_step: steps done before (a resumed run).
      enabled: whether to write.
    """

    def __init__(self, stage: str, total_steps: int, start_step: int = 0, enabled: bool = True):
        self._stage, self._total, self._enabled = stage, total_steps, enabled
        self._tokens, self._seconds, self._waited = 0, 0.0, 0.0
        self._first_step: int | None = None
        self._last_time = self._last_line = -math.inf
        self._bar = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            # Not tqdm's own rate: it counts the compilation, and evaluations.
            layout = "{desc} {n_fmt}/{total_fmt} |{bar}| {postfix}"
            shape: dict[str, Any] = {"bar_format": layout, "dynamic_ncols": True}
            self._bar = tqdm(desc=stage, total=total_steps, initial=start_step, **shape)

    @property
    def tokens_per_second(self) -> float:
        """Since the first update, without pauses; 0.0 before the second."""
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def input_wait(self) -> float:
        """Share of that time in which the host waited for a batch; 0.0 before the second update.

        The device may have had work then: what training lost is at most this.
        """
        return self._waited / self._seconds if self._seconds else 0.0

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """Yields the batches, and counts the time until each is there."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            if self._first_step is not None:
                self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def update(self, step: int, loss: float, tokens: int) -> None:
        """Shows that `step` steps of the stage are done, `tokens` more than at the last update."""
        now = time.perf_counter()
        if self._first_step is None:
            self._first_step = step
        else:
            self._tokens += tokens
            self._seconds += now - self._last_time
        self._last_time = now
        if not self._enabled:
            return
        text = f"loss {loss:.4f}"
        if self._seconds:
            left = (self._total - step) * self._seconds / max(step - self._first_step, 1)
            minutes, seconds = divmod(max(round(left), 0), 60)
            text += f", {self.tokens_per_second:,.0f} tokens/s, "
            text += f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._last_line >= _PLAIN_LINE_SECONDS or step >= self._total:
            print(f"{self._stage} {step}/{self._total} {text}", file=sys.stderr, flush=True)
            self._last_line = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training (evaluation, saving), so that the speed does not count it."""
        start = time.perf_counter()
        yield
        self._last_time += time.perf_counter() - start

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
