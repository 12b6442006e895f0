"""Scores of a model on a split: every predicted token and every example counts exactly once."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

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
from gptjax.model.gpt import GPT
from gptjax.model.losses import Sum
from gptjax.model.objective import Losses, Objective, forward

# (params, batch) -> (Losses, task logits), from `steps.jit_eval_step`.
EvalStep = Callable[[Params, Any], Any]


def never() -> bool:
    """The default of `stop`: evaluate to the end."""
    return False


def _mean(parts: list[Sum]) -> float:
    # Added in float64 on the host: a float32 total of millions of tokens would lose digits.
    total = sum(float(part.total) for part in parts)
    return total / max(sum(float(part.weight) for part in parts), 1e-9)


def language_model(
    step: EvalStep,
    params: Params,
    stream: np.ndarray,
    window: int,
    rows: int,
    mesh: Mesh,
    limit: int = 0,
    stop: Callable[[], bool] = never,
) -> dict[str, float] | None:
    """Returns {"loss": nats per token, "perplexity"} over windows in order; None if stopped.

    Args:
      step: the jitted eval step.
      params: of the model.
      stream: integers [n], token ids.
      window: tokens seen at once; the first of each is not predicted.
      rows: windows a batch.
      mesh: the devices.
      limit: batches at most; 0: all.
      stop: asked between batches.
    """
    sums = []
    local = functools.partial(mesh_lib.local_rows, mesh)
    for batch in loader.text_in_order(stream, window, rows, limit, local):
        if stop():
            return None
        sums.append(step(params, mesh_lib.to_devices(batch, mesh))[0].lm)
    loss = _mean(jax.device_get(sums))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What the model says about every example of a split."""

    logits: np.ndarray
    """float32 [n, O]: class logits, answer scores, or [n, 1] regression values."""
    lm_loss: float
    """Nats per token over all sequences."""
    task_loss: float
    """Mean over the examples; 0 without labels."""


def run_task(
    step: EvalStep,
    params: Params,
    examples: Examples,
    packer: Packer,
    mesh: Mesh,
    stop: Callable[[], bool] = never,
) -> Outputs | None:
    """Runs every example once, packed, and returns the outputs in order; None if stopped."""
    waiting, sums = [], []
    logits: np.ndarray | None = None
    local = functools.partial(mesh_lib.local_rows, mesh)
    for batch, index in loader.every_example(examples, packer, local):
        if stop():
            return None
        losses, out = step(params, mesh_lib.to_devices(batch, mesh))
        waiting.append((index, out))
        sums.append(losses)
        if len(waiting) > 1:  # fetched one batch late, so that the device never waits
            logits = _scatter(logits, len(examples), *waiting.pop(0))
    for pair in waiting:
        logits = _scatter(logits, len(examples), *pair)
    assert logits is not None
    parts = jax.device_get(sums)
    return Outputs(logits, _mean([p.lm for p in parts]), _mean([p.task for p in parts]))


def _scatter(logits: np.ndarray | None, count: int, index: np.ndarray, out: Any) -> np.ndarray:
    out = jax.device_get(out)
    if logits is None:
        logits = np.zeros((count, out.shape[-1]), np.float32)
    real = index >= 0
    logits[index[real]] = out[real]
    return logits


def predictions(spec: TaskSpec, logits: np.ndarray) -> np.ndarray:
    """Returns int [n] best classes or answers, or float32 [n] regression values."""
    return logits[:, 0] if spec.kind == TaskKind.REGRESSION else logits.argmax(axis=1)


def task(
    spec: TaskSpec,
    names: tuple[str, ...],
    step: EvalStep,
    params: Params,
    examples: Examples,
    packer: Packer,
    mesh: Mesh,
    objective: Objective,
    stop: Callable[[], bool] = never,
) -> dict[str, float] | None:
    """Returns "loss" (joint), "task_loss", "lm_loss" and the metrics `names`; None if stopped."""
    outputs = run_task(step, params, examples, packer, mesh, stop)
    if outputs is None:
        return None
    assert examples.labels is not None
    found = predictions(spec, outputs.logits)
    scores = metrics.compute(names, examples.labels, found, len(spec.labels))
    losses = {
        "loss": objective.total(outputs.task_loss, outputs.lm_loss),
        "task_loss": outputs.task_loss,
        "lm_loss": outputs.lm_loss,
    }
    return losses | scores


@functools.cache
def jit_eval_step(
    mesh: Mesh, model: GPT, objective: Objective
) -> Callable[[Params, Batch], tuple[Losses, jax.Array | None]]:
    """Returns the jitted `forward` without dropout; loss sums and logits come back replicated."""

    def step(params: Params, batch: Batch) -> tuple[Losses, jax.Array | None]:
        output = forward(model, objective, params, batch)
        return jax.lax.with_sharding_constraint(output, mesh_lib.replicated(mesh))

    return jax.jit(step)
