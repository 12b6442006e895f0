"""A profiler trace of some steps of a training, for TensorBoard or Perfetto."""

import jax

from gptjax.io.files import disk_errors

# The number of first steps of a run that are not traced. They compile the program, and they wait
# for the first batches.
_SKIPPED_STEPS = 3


class StepProfiler:
    """Writes a trace of a few steps with `jax.profiler`. The trace does not change any result.

    Attributes:
      folder: the folder that the trace is written to.
      steps: the steps that are traced, counted from 1.
    """

    def __init__(self, folder: str, count: int, start: int, total_steps: int):
        """Chooses the steps that are traced.

        Args:
          folder: the folder that the trace is written to.
          count: the number of steps to trace. 0 means no trace.
          start: the number of steps that earlier runs have done.
          total_steps: the number of steps of the whole stage.
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
        """Ends the trace and writes it. Without a trace in progress it does nothing."""
        if self._active:
            self._active = False
            with disk_errors(self.folder):
                jax.profiler.stop_trace()
