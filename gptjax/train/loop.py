"""The training loop of one stage: it takes steps, validates, saves, and stops on request."""

import contextlib
import dataclasses
import functools
import logging
import os

import jax
import numpy as np

from gptjax import mesh as mesh_lib
from gptjax.batch import Batch
from gptjax.checkpoint.memory import Store
from gptjax.checkpoint.meta import Meta
from gptjax.checkpoint.store import rank
from gptjax.errors import Preempted, StopRequested, TrainingDiverged
from gptjax.io.files import disk_errors
from gptjax.state import TrainState
from gptjax.train import ledger
from gptjax.train import step as step_lib
from gptjax.train.context import RunContext
from gptjax.train.progress import Progress, Scorings
from gptjax.train.stages import Scores, Stage

# metrics.jsonl gets a record of at least this many training steps of a stage, and of about twice as
# many at most. A stage with fewer steps gets a record of every step.
_RECORDS = 500
# The number of first steps of a run that are not traced. They compile the program, and they wait
# for the first batches.
_UNTRACED_STEPS = 3
# The user gets a message if more than this fraction of the time was spent waiting for batches.
_LONG_WAIT = 0.1


# The cache lets runs that differ only in seed or data use the same compiled step.
_jit_train_step = functools.cache(step_lib.jit_train_step)


class Trainer:
    """Trains one stage of a run.

    Args:
      context: the run.
      stage: the stage.
      checkpoints: the store that states are saved to.
      meta: the metadata of the checkpoints. Each checkpoint adds its own ledger.
      state: the state to start from. Its buffers are donated.
    """

    def __init__(
        self, context: RunContext, stage: Stage, checkpoints: Store, meta: Meta, state: TrainState
    ):
        self._context, self._stage = context, stage
        self._checkpoints, self._meta = checkpoints, meta
        self._state = state
        self._done = start = int(jax.device_get(state.step))
        self._ledger = checkpoints.ledger(start)
        # The number of a step, its number of tokens, and its output, which is still on the devices.
        self._pending: tuple[int, int, step_lib.StepOutput] | None = None
        self._record_every = max(1, stage.total_steps // _RECORDS)
        # The seed is put on the devices here, once, so that a step transfers only its batch.
        seed, mesh = np.uint32(context.setup.seed), context.setup.mesh
        replicated = mesh_lib.replicated(mesh)
        self._seed = jax.make_array_from_callback((), replicated, lambda _: seed)
        self._train_step = _jit_train_step(mesh, stage.model, stage.objective, stage.optimizer)
        self._reporter = context.options.reporter
        self._progress = Progress(
            stage.name, stage.total_steps, start, self._reporter, self._scorings()
        )
        left = 0 if self.has_ended else stage.total_steps - start
        count = min(context.options.profile, left)
        first = start + 1 + min(_UNTRACED_STEPS, left - count)
        self._traced_steps = range(first, first + count)
        self._trace_folder = os.path.join(context.workdir, "profile", stage.name)
        self._trace = contextlib.ExitStack()  # closing it ends the trace, if one has begun

    @property
    def steps(self) -> int:
        """The number of steps that are done."""
        return self._done

    @property
    def has_ended(self) -> bool:
        """Whether no step is left."""
        return has_ended(self._stage, self._checkpoints, self._done)

    def _scorings(self) -> Scorings:
        """Returns the evaluations that are left, for the estimate of the time."""
        stage = self._stage
        steps = {*range(stage.eval_every, stage.total_steps, stage.eval_every), stage.total_steps}
        due = sum(step > self._done and _validation_is_due(stage, step) for step in steps)
        tokens = max(stage.step_tokens, 1.0)
        return Scorings(due, stage.validation_tokens / tokens, stage.test_tokens / tokens)

    def train(self) -> dict[str, float]:
        """Trains to the end of the stage, or until its patience has ended.

        Returns:
          A dictionary with "tokens_per_second" and "input_wait", which is the fraction of the time
          that was spent waiting for batches. The dictionary is empty if there were fewer than two
          steps, because the speed is measured between steps.

        Raises:
          Preempted: the run was asked to stop, and the state has been saved.
          TrainingDiverged: several updates in a row were not finite.
        """
        progress, name = self._progress, self._stage.name
        with progress:
            try:
                self._run_steps()
            except StopRequested:
                self._save_and_stop()
            finally:
                self._end_trace()
        self._checkpoints.wait()
        if traced := self._traced_steps:
            steps = f"{len(traced)} steps from {traced[0]:,} on"
            self._reporter.say(f"{name}: trace of {steps} -> {self._trace_folder}")
        if not progress.tokens_per_second:
            return {}
        if progress.input_wait > _LONG_WAIT:
            share = f"{progress.input_wait:.0%}"
            self._reporter.say(f"{name}: {share} of the time waiting for batches")
        return {"tokens_per_second": progress.tokens_per_second, "input_wait": progress.input_wait}

    def _run_steps(self) -> None:
        stage = self._stage
        # If an earlier run was stopped during a validation, the checkpoint of that step has no
        # scores yet.
        self._validate_if_due()
        if self.has_ended:
            return
        # What the first record needs is opened and compiled here. Between the first two steps, it
        # would count as time of the second step.
        self._context.log.begin(stage.name)
        stage.optimizer.rate_at(self._done)
        batches = stage.batches.iterate(self._done, stage.total_steps)
        for batch in self._progress.waiting(batches):
            self._context.setup.check_stop()
            self._profiled_step(batch)
            if self._done % stage.save_every == 0 or _validation_is_due(stage, self._done):
                self._read_pending()
                with self._progress.paused():
                    self._validate_if_due()
                    self._save()
                if self._done < stage.total_steps and self.has_ended:
                    break
        self._read_pending()
        if self._done < stage.total_steps:
            self._reporter.say(
                f"{stage.name}: stopped at step {self._done:,} of {stage.total_steps:,}, because "
                f"{stage.metric} has not improved for {stage.patience} validations"
            )

    def _profiled_step(self, batch: Batch) -> None:
        """Takes the next step.

        The profiler trace begins before its first step and ends after its last step.
        """
        step = self._done + 1
        if step in self._traced_steps[:1]:
            with self._progress.paused(), disk_errors(self._trace_folder):
                self._trace.enter_context(jax.profiler.trace(self._trace_folder))
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            self._step(batch)
        if step in self._traced_steps[-1:]:
            self._read_pending()
            with self._progress.paused():
                self._end_trace()

    def _end_trace(self) -> None:
        """Ends the profiler trace, if it has begun, and writes it."""
        with disk_errors(self._trace_folder):
            self._trace.close()

    def _step(self, batch: Batch) -> None:
        """Starts the next step, and then reads the output of the previous step.

        The output is read one step late, so that the devices already work on the next step while
        the host reads.
        """
        tokens = int((batch.segment_ids > 0).sum())
        placed = mesh_lib.to_devices(batch, self._context.setup.mesh)
        self._state, output = self._train_step(self._state, placed, self._seed)
        self._done += 1
        self._read_pending()
        self._pending = self._done, tokens, output

    def _read_pending(self) -> None:
        """Fetches the output of the step that has not been read yet, and records it.

        Raises:
          TrainingDiverged: too many updates in a row were not finite.
        """
        if self._pending is None:
            return
        step, tokens, on_devices = self._pending
        output: step_lib.StepOutput = jax.device_get(on_devices)
        self._pending = None
        stage = self._stage
        self._ledger = ledger.entry(self._ledger, int(output.batch_checksum))
        values = _mean_losses(stage, output)
        self._progress.update(step, values["loss"], tokens)
        if step % self._record_every == 0 or step in (1, stage.total_steps):
            values["gradient_norm"] = float(output.gradient_norm)
            values["learning_rate"] = stage.optimizer.rate_at(step - 1)
            self._context.log.write(stage.name, "train", step, values, self._ledger)
        bad, limit = int(output.bad_steps), stage.optimizer.config.max_bad_steps
        if bad == 1:
            logging.warning("%s: step %d was not finite and is skipped", stage.name, step)
        if bad >= limit:
            raise TrainingDiverged(
                f"{stage.name}: {bad} updates in a row were not finite, the last at step "
                f"{step}; checkpoints are kept in {self._checkpoints.directory}; "
                "try a smaller learning rate"
            )

    def _validate_if_due(self) -> None:
        """Validates and saves the state if a validation is due.

        If the checkpoint of this step has scores already, only their record is written if missing.
        """
        if not _validation_is_due(self._stage, self._done):
            return
        step, name, checkpoints = self._done, self._stage.name, self._checkpoints
        saved = step in checkpoints.steps()
        if saved and (scores := checkpoints.metrics(step)):
            self._context.log.write_once(name, "validation", step, scores)
            return
        scores = self._stage.validate(self._state.params)
        if saved:
            checkpoints.set_metrics(step, scores)
        else:
            self._save(scores)
        self._context.log.write(name, "validation", step, scores)

    def _save(self, scores: Scores | None = None) -> None:
        """Saves the state and its scores, unless its step has a checkpoint already."""
        if self._done in self._checkpoints.steps():
            return
        self._context.log.sync()
        meta = dataclasses.replace(self._meta, ledger=self._ledger)
        self._checkpoints.save(self._done, self._state, meta, scores)

    def _save_and_stop(self) -> None:
        self._read_pending()
        self._save()
        self._checkpoints.wait()
        raise Preempted(
            f"{self._stage.name}: asked to stop; saved at step {self._done:,} of "
            f"{self._stage.total_steps:,}; the same command continues there"
        ) from None


def has_ended(stage: Stage, checkpoints: Store, step: int) -> bool:
    """Returns whether the training of a stage has ended after `step` steps.

    It has ended after its last step, or if the score that selects the best checkpoint has not
    improved in the last `Stage.patience` validations. An equal score is no improvement. The answer
    depends on the stored scores alone, so a continued run gives the same answer. (If the file of
    the scores is lost, a continued run counts from its first validation on.)

    Args:
      stage: the stage.
      checkpoints: the store with the validation scores.
      step: a number of steps. If its validation is missing, the training has not ended early.
    """
    scores = checkpoints.metrics_until(step)
    if step == stage.total_steps or not stage.patience or not scores.get(step):
        return step == stage.total_steps
    ranks = [rank(stage.metric, each.get(stage.metric)) for each in scores.values()]
    return len(ranks) - 1 - ranks.index(max(ranks)) >= stage.patience


def _validation_is_due(stage: Stage, step: int) -> bool:
    """Returns whether the stage validates after `step` steps.

    It validates at the end and at each multiple of `eval_every`. A multiple is left out if fewer
    than `eval_every` / 2 steps remain after it.
    """
    every, left = stage.eval_every, stage.total_steps - step
    return left == 0 or (step > 0 and step % every == 0 and 2 * left >= every)


def _mean_losses(stage: Stage, output: step_lib.StepOutput) -> Scores:
    """Returns the training losses of one step.

    The LM loss is a weighted mean over the tokens, and the task loss is a mean over the examples.
    """
    sums = output.losses
    lm = float(sums.lm.total) / max(float(sums.lm.weight), 1e-9)
    if sums.task is None:
        return {"loss": lm}
    task = float(sums.task.total) / max(float(sums.task.weight), 1e-9)
    return {"loss": stage.objective.total(task, lm), "task_loss": task, "lm_loss": lm}
