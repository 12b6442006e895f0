"""The loop over the steps of one stage: it steps, validates, saves, and stops when asked."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax.checkpoint.memory import Store
from gptjax.checkpoint.meta import Meta
from gptjax.config.schema import Experiment, ModelConfig, OptimizerConfig
from gptjax.data.tokens.tokenizer import Tokenizer
from gptjax.errors import Preempted, TrainingDiverged
from gptjax.model.gpt import GPT
from gptjax.model.objective import Objective
from gptjax.state import TrainState
from gptjax.train import ledger
from gptjax.train import log as log_lib
from gptjax.train import optimizer as optimizer_lib
from gptjax.train import progress as progress_lib
from gptjax.train import step as step_lib
from gptjax.train.stages import Scores, Stage
from gptjax.train.step import StepOutput

# Records of a training in metrics.jsonl: about so many, whatever its length.
_RECORDS = 500
# Share of the time spent waiting for batches from which on the user is told.
_LONG_WAIT = 0.1


@dataclasses.dataclass(frozen=True)
class Run:
    """What the stages of one run share."""

    experiment: Experiment
    workdir: str
    mesh: Mesh
    tokenizer: Tokenizer
    model: ModelConfig
    log: log_lib.MetricsLog
    stop: Callable[[], bool]
    is_main: bool
    trial: bool = False
    """One of many runs: prints nothing, keeps its best weights in memory only."""

    def say(self, text: str) -> None:
        """Prints a line, in one process only."""
        if self.is_main and not self.trial:
            print(text, flush=True)


@functools.cache
def _train_step(
    mesh: Mesh, model: GPT, objective: Objective, optimizer: OptimizerConfig, total_steps: int
) -> Callable[..., Any]:
    """One program for the runs that differ in seed or data only."""
    return step_lib.jit_train_step(
        mesh,
        model=model,
        objective=objective,
        optimizer=optimizer_lib.build(optimizer, total_steps),
        micro=optimizer.accumulation,
    )


class Trainer:
    """Trains one stage of a run."""

    def __init__(self, context: Run, stage: Stage, checkpoints: Store, meta: Meta):
        self._context, self._stage, self._checkpoints, self._meta = (
            context, stage, checkpoints, meta
        )  # fmt: skip
        self._every = max(1, stage.total_steps // _RECORDS)
        self._rate = optimizer_lib.schedule(stage.optimizer, stage.total_steps)
        self._step = _train_step(
            context.mesh, stage.model, stage.objective, stage.optimizer, stage.total_steps
        )
        self._seed = np.uint32(context.experiment.seed)
        self._ledger = ""

    def train(self, train_state: TrainState, start: int) -> dict[str, float]:
        """Runs steps [start, total); returns how fast, for the summary, or {} where none was run.

        "tokens_per_second", and "input_wait", the share of that time spent waiting for batches.
        """
        context, stage = self._context, self._stage
        total, pending = stage.total_steps, None
        self._ledger = self._checkpoints.ledger(start)
        shown = context.is_main and not context.trial
        with progress_lib.Progress(stage.name, total, start, shown) as progress:
            self._progress = progress
            self._maybe_validate(train_state, start)
            batches = progress.waiting(stage.batches.iterate(start, total))
            for step, batch in enumerate(batches, start + 1):
                if context.stop():
                    self._read(pending)
                    self._stop_if_asked(train_state, step - 1)
                tokens = int((batch.segment_ids > 0).sum())
                train_state, output = self._step(
                    train_state, mesh_lib.to_devices(batch, context.mesh), self._seed
                )
                # Read one step late: by then the device has it, and works on the next.
                self._read(pending)
                pending = (step, output, tokens)
                if step % stage.save_every == 0 or self._validation_due(step):
                    self._read(pending)
                    pending = None
                    self._maybe_validate(train_state, step)
                    self._save(train_state, step)
            self._read(pending)
        self._checkpoints.wait()
        if not progress.tokens_per_second:
            return {}
        if progress.input_wait > _LONG_WAIT:
            context.say(f"{stage.name}: {progress.input_wait:.0%} of the time waiting for batches")
        return {
            "tokens_per_second": progress.tokens_per_second,
            "input_wait": progress.input_wait,
        }

    def _read(self, pending: tuple[int, StepOutput, int] | None) -> None:
        """Fetches a step's output, logs it, and ends the run after too many bad steps in a row."""
        if pending is None:
            return
        step, device_output, tokens = pending
        output: StepOutput = jax.device_get(device_output)
        self._ledger = ledger.entry(self._ledger, int(output.batch_checksum))
        values = _scores(self._stage, output)
        self._progress.update(step, values["loss"], tokens)
        if step % self._every == 0 or step in (1, self._stage.total_steps):
            values["gradient_norm"] = float(output.gradient_norm)
            values["learning_rate"] = float(self._rate(step - 1))
            self._context.log.write(self._stage.name, "train", step, values, self._ledger)
        bad, limit = int(output.bad_steps), self._stage.optimizer.max_bad_steps
        if bad == 1:
            logging.warning("%s: step %d was not finite and is skipped", self._stage.name, step)
        if bad >= limit:
            raise TrainingDiverged(
                f"{self._stage.name}: {bad} updates in a row were not finite, the last at step "
                f"{step}; checkpoints are kept in {self._checkpoints.directory}; "
                "try a smaller learning rate"
            )

    def _validation_due(self, step: int) -> bool:
        """At every multiple of `eval_every` and at the end, but not twice right after another."""
        left = self._stage.total_steps - step
        return left == 0 or (
            step > 0 and step % self._stage.eval_every == 0 and 2 * left >= self._stage.eval_every
        )

    def _maybe_validate(self, train_state: TrainState, step: int) -> None:
        """Validates and saves where a validation is due and the step's checkpoint has no scores."""
        have = step in self._checkpoints.steps()
        if not self._validation_due(step):
            return
        if have and (saved := self._checkpoints.metrics(step)):
            self._context.log.write_once(self._stage.name, "validation", step, saved)
            return
        with self._progress.paused():
            scores = self._stage.validate(train_state.params, self._context.stop)
            self._stop_if_asked(train_state, step)
            assert scores is not None
            if have:  # saved by a run that was stopped before it could validate
                self._checkpoints.set_metrics(step, scores)
            else:
                self._context.log.sync()
                self._checkpoints.save(step, train_state, self._meta_now(), scores)
        self._context.log.write(self._stage.name, "validation", step, scores)

    def _save(self, train_state: TrainState, step: int) -> None:
        if step in self._checkpoints.steps():
            return
        with self._progress.paused():
            self._context.log.sync()
            self._checkpoints.save(step, train_state, self._meta_now())

    def _meta_now(self) -> Meta:
        return dataclasses.replace(self._meta, ledger=self._ledger)

    def _stop_if_asked(self, train_state: TrainState, step: int) -> None:
        if not self._context.stop():
            return
        self._save(train_state, step)
        self._checkpoints.wait()
        raise Preempted(
            f"{self._stage.name}: asked to stop; saved at step {step:,} of "
            f"{self._stage.total_steps:,}; the same command continues there"
        )


def _scores(stage: Stage, output: StepOutput) -> Scores:
    """The training losses of one step, as means."""
    sums = output.losses
    lm = float(sums.lm.total) / max(float(sums.lm.weight), 1e-9)
    if stage.spec is None:
        return {"loss": lm}
    task = float(sums.task.total) / max(float(sums.task.weight), 1e-9)
    return {"loss": stage.objective.total(task, lm), "task_loss": task, "lm_loss": lm}
