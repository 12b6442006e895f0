"""Losses and task outputs of a model on a whole split.

Every example and every predicted token enters the means exactly once.
"""

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
from gptjax.model import frozen as frozen_lib
from gptjax.model.gpt import GPT, run
from gptjax.model.losses import Sum
from gptjax.model.objective import Losses, Objective, forward

T = TypeVar("T")


def never_stop() -> None:
    """Does nothing, so an evaluation with this `check_stop` runs to its end."""


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Task outputs of a model for all examples of a split, and its losses on the split."""

    logits: np.ndarray
    """float32 [n, O]: class logits or scores of the answers. In a regression, the predicted numbers
    [n, 1]."""
    lm_loss: float
    """The mean LM loss over the tokens of all sequences, in nats per token."""
    task_loss: float | None
    """The mean task loss over the examples; None if the examples have no labels."""


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Runs a model over whole splits, without dropout.

    Attributes:
      model: the model. It needs the task head if a task is evaluated.
      mesh: the devices.
      objective: the losses that are computed, and their weights.
      check_stop: a function that is called before each batch. It raises `StopRequested` if the
        evaluation must end.
      frozen: the number of frozen blocks (see `gptjax.model.frozen`). If it is not 0, the examples
        have `Examples.hidden`.
    """

    model: GPT
    mesh: Mesh
    objective: Objective = dataclasses.field(default_factory=Objective)
    check_stop: Callable[[], None] = never_stop
    frozen: int = 0

    def stoppable(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields the batches, and calls `check_stop` before each batch."""
        for batch in batches:
            self.check_stop()
            yield batch

    def language_model(
        self, params: Params, stream: np.ndarray, window: int, rows: int, limit: int = 0
    ) -> dict[str, float]:
        """Scores the language model on a token stream, window by window.

        Args:
          params: the parameters of the model.
          stream: integers [n], token ids.
          window: the number of tokens in a window. The first token of each window is not predicted.
          rows: the number of windows in a batch.
          limit: the number of batches to read, from the start of the stream. 0 means all batches.

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
        """Runs the model on packed batches of all examples.

        The outputs are in the order of the examples.
        """
        assert bool(self.frozen) == (examples.hidden is not None)
        step = jit_eval_step(self.mesh, self.model, self.objective, self.frozen)
        local = functools.partial(mesh_lib.local_rows, self.mesh)
        sums: list[Losses] = []
        waiting: list[Any] = []
        fetched = []
        for batch, index in self.stoppable(loader.every_example(examples, packer, local)):
            losses, out = step(params, mesh_lib.to_devices(batch, self.mesh))
            sums.append(losses)
            waiting.append((index, out))
            # The outputs of a batch are fetched after the next batch has started, so that the
            # device never waits for the host.
            if len(waiting) > 1:
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
        """Scores the model on labelled examples. These are the scores of `task_with_outputs`."""
        return self.task_with_outputs(params, examples, packer, spec, metric_names)[0]

    def task_with_outputs(
        self,
        params: Params,
        examples: Examples,
        packer: Packer,
        spec: TaskSpec,
        metric_names: tuple[str, ...],
    ) -> tuple[dict[str, float], np.ndarray]:
        """Scores the model on labelled examples, and returns its task outputs too.

        Args:
          params: the parameters of the model.
          examples: the examples, with their labels.
          packer: the packer that makes the batches.
          spec: the task.
          metric_names: names from `metrics.parse`.

        Returns:
          The scores and `Outputs.logits`. The scores are "loss" (the joint loss, which is the
          weighted sum of both losses), "task_loss", "lm_loss" and the metrics. The temperature of
          `gptjax.evaluate.calibration` changes none of them.
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
        found = metrics.compute(metric_names, examples.labels, answers, len(spec.labels))
        return losses | found, outputs.logits


def lm_logits(
    model: GPT, params: Params, tokens: jax.Array, segments: jax.Array, positions: jax.Array
) -> jax.Array:
    """Returns for each token the logits of the next token, float32 [B, T, V]."""
    x_BTD = run(model, params, tokens, segments, positions, method="hidden")
    return run(model, params, x_BTD, method="lm_logits")


def predictions(spec: TaskSpec, logits: np.ndarray) -> np.ndarray:
    """Returns int [n], the best class or answer of each row; in a regression, float32 [n]."""
    return logits[:, 0] if spec.kind == TaskKind.REGRESSION else logits.argmax(axis=1)


def _mean(parts: list[Sum]) -> float:
    # The sums are added in float64 on the host, because a float32 total of millions of tokens would
    # lose digits.
    total = sum(float(part.total) for part in parts)
    return total / max(sum(float(part.weight) for part in parts), 1e-9)


@functools.cache
def jit_eval_step(
    mesh: Mesh, model: GPT, objective: Objective, frozen: int = 0
) -> Callable[[Params, Batch], tuple[Losses, jax.Array | None]]:
    """Returns the jitted function `forward` without dropout.

    The sums of losses and the logits that it returns are replicated over the devices.

    Args:
      mesh: the devices.
      model: the whole model.
      objective: the losses to compute.
      frozen: the number of frozen blocks. If it is not 0, the batches have `Batch.hidden`.
    """
    upper = frozen_lib.upper_model(model, frozen)

    def forward_above(params: Params, batch: Batch) -> tuple[Losses, jax.Array | None]:
        return forward(upper, objective, frozen_lib.upper_params(params, frozen), batch)

    step = forward_above if frozen else functools.partial(forward, model, objective)
    return jax.jit(step, out_shardings=mesh_lib.replicated(mesh))
