"""A profiler trace of some steps of a training, for TensorBoard or Perfetto."""

import jax

from gptjax.io.files import disk_errors

# The first steps of a run compile, and wait for the first batches.
_SKIPPED_STEPS = 3


class StepProfiler:
    """Writes a trace of a few steps with `jax.profiler`. It changes no result.

    Attributes:
      folder: where the trace is written.
      steps: the steps that are traced, counted from 1.
    """

    def __init__(self, folder: str, count: int, start: int, total_steps: int):
        """Chooses the steps.

        Args:
          folder: where the trace is written.
          count: number of steps to trace; 0 means none.
          start: steps that were done before this run.
          total_steps: the last step.
        """
        self.folder = folder
        count = min(count, total_steps - start)
        first = start + 1 + min(_SKIPPED_STEPS, total_steps - start - count)
        self.steps = range(first, first + count)
        self._active = False

    def begin(self) -> None:
        """Starts the trace."""
        with disk_errors(self.folder):
            jax.profiler.start_trace(self.folder)
        self._active = True

    def end(self) -> None:
        """Ends the trace, if it has begun, and writes it."""
        if self._active:
            self._active = False
            with disk_errors(self.folder):
                jax.profiler.stop_trace()
