"""Losses and task outputs of a model on a split: every token and every example counts once."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax.batch import Batch
from gptjax.config.schema import TaskKind, TaskSpec
from gptjax.data import loader
from gptjax.data.packing import Packer
from gptjax.data.tasks import Examples
from gptjax.evaluate import metrics
from gptjax.mesh import Params
from gptjax.model.gpt import GPT, run
from gptjax.model.losses import Sum
from gptjax.model.objective import Losses, Objective, forward

T = TypeVar("T")


def never_stop() -> None:
    """Never raises `StopRequested`: the evaluation runs to its end."""


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Task outputs of a model for all examples of a split, and its losses on the split."""

    logits: np.ndarray
    """float32 [n, O]: class logits, scores of the answers, or [n, 1] regression values."""
    lm_loss: float
    """Nats per token over all sequences."""
    task_loss: float | None
    """Mean over the examples; None where they have no labels."""


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Runs a model over whole splits, without dropout.

    Attributes:
      model: the model, with the task's head where tasks are evaluated.
      mesh: the devices.
      objective: the losses that are computed, and their weights.
      check_stop: called before each batch; raises `StopRequested` to end the evaluation.
    """

    model: GPT
    mesh: Mesh
    objective: Objective = dataclasses.field(default_factory=Objective)
    check_stop: Callable[[], None] = never_stop

    def stoppable(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields the batches; calls `check_stop` before each of them is used."""
        for batch in batches:
            self.check_stop()
            yield batch

    def language_model(
        self, params: Params, stream: np.ndarray, window: int, rows: int, limit: int = 0
    ) -> dict[str, float]:
        """Scores the language model on a token stream, window by window.

        Args:
          params: parameters of the model.
          stream: integers [n], token ids.
          window: tokens of a window. The first token of each window is not predicted.
          rows: windows of a batch.
          limit: the number of batches to read from the start; 0 means all of them.

        Returns:
          {"loss" (nats per token), "perplexity"}.
        """
        step = jit_eval_step(self.mesh, self.model, self.objective)
        local = functools.partial(mesh_lib.local_rows, self.mesh)
        sums = [
            step(params, mesh_lib.to_devices(batch, self.mesh))[0].lm
            for batch in self.stoppable(loader.text_in_order(stream, window, rows, limit, local))
        ]
        loss = _mean(jax.device_get(sums))
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def outputs(self, params: Params, examples: Examples, packer: Packer) -> Outputs:
        """Runs the model on all examples, packed; the outputs are in the order of the examples."""
        step = jit_eval_step(self.mesh, self.model, self.objective)
        local = functools.partial(mesh_lib.local_rows, self.mesh)
        sums: list[Losses] = []
        waiting: list[Any] = []
        fetched = []
        for batch, index in self.stoppable(loader.every_example(examples, packer, local)):
            losses, out = step(params, mesh_lib.to_devices(batch, self.mesh))
            sums.append(losses)
            waiting.append((index, out))
            if len(waiting) > 1:  # fetched one batch late, so that the device never waits
                fetched.append(jax.device_get(waiting.pop(0)))
        fetched += jax.device_get(waiting)
        logits = np.zeros((len(examples), fetched[0][1].shape[-1]), np.float32)
        for index, out in fetched:
            logits[index[index >= 0]] = out[index >= 0]
        parts = jax.device_get(sums)
        task_loss = _mean([part.task for part in parts]) if examples.labels is not None else None
        return Outputs(logits, _mean([part.lm for part in parts]), task_loss)

    def task(
        self,
        params: Params,
        examples: Examples,
        packer: Packer,
        spec: TaskSpec,
        metric_names: tuple[str, ...],
    ) -> dict[str, float]:
        """Scores the model on labelled examples.

        Args:
          params: parameters of the model.
          examples: the examples, with their labels.
          packer: packs them into batches.
          spec: the task.
          metric_names: from `metrics.parse`.

        Returns:
          "loss" (joint), "task_loss", "lm_loss" and the metrics.
        """
        outputs = self.outputs(params, examples, packer)
        assert examples.labels is not None
        assert outputs.task_loss is not None
        answers = predictions(spec, outputs.logits)
        losses = {
            "loss": self.objective.total(outputs.task_loss, outputs.lm_loss),
            "task_loss": outputs.task_loss,
            "lm_loss": outputs.lm_loss,
        }
        return losses | metrics.compute(metric_names, examples.labels, answers, len(spec.labels))


def lm_logits(
    model: GPT, params: Params, tokens: jax.Array, segments: jax.Array, positions: jax.Array
) -> jax.Array:
    """Returns the logits of the token that follows each token, float32 [B, T, V]."""
    x_BTD = run(model, params, tokens, segments, positions, method="hidden")
    return run(model, params, x_BTD, method="lm_logits")


def predictions(spec: TaskSpec, logits: np.ndarray) -> np.ndarray:
    """Returns int [n] best classes or answers, or float32 [n] regression values."""
    return logits[:, 0] if spec.kind == TaskKind.REGRESSION else logits.argmax(axis=1)


def _mean(parts: list[Sum]) -> float:
    # Added in float64 on the host: a float32 total of millions of tokens would lose digits.
    total = sum(float(part.total) for part in parts)
    return total / max(sum(float(part.weight) for part in parts), 1e-9)


@functools.cache
def jit_eval_step(
    mesh: Mesh, model: GPT, objective: Objective
) -> Callable[[Params, Batch], tuple[Losses, jax.Array | None]]:
    """Returns the jitted `forward` without dropout; loss sums and logits come back replicated."""
    step = functools.partial(forward, model, objective)
    return jax.jit(step, out_shardings=mesh_lib.replicated(mesh))
