"""The joint objective of a batch: both losses, their weights, and the gradient."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gptjax.batch import Batch
from gptjax.config.schema import TaskKind
from gptjax.mesh import Params
from gptjax.model import losses
from gptjax.model.gpt import GPT, run
from gptjax.model.losses import Sum


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss to minimise: lm_weight * LM loss, plus task_weight * task loss if there is a task.

    Both losses are means: over the predicted tokens, and over the examples.
    """

    kind: TaskKind | None = None
    """The kind of the task; None in pretraining, which has none."""
    lm_weight: float = 1.0
    task_weight: float = 1.0

    def total(self, task: Any, lm: Any) -> Any:
        """Returns the objective from the mean losses (numbers or arrays)."""
        lm = self.lm_weight * lm
        return lm + self.task_weight * task if self.kind else lm


@flax.struct.dataclass
class Losses:
    """The loss sums of a batch. In pretraining `task` has the weight 0."""

    lm: Sum
    task: Sum

    def __add__(self, other: "Losses") -> "Losses":
        return Losses(self.lm + other.lm, self.task + other.task)


def weights(batch: Batch) -> Losses:
    """Returns the weights of a batch's losses; the totals are 0."""
    zero = jnp.float32(0)
    task = zero if batch.example_mask is None else batch.example_mask.sum()
    return Losses(Sum(zero, batch.lm_weights.sum()), Sum(zero, task))


def joint(objective: Objective, sums: Losses, weight: Losses) -> jax.Array:
    """Returns the objective of loss sums, a scalar.

    Args:
      objective: the weights of the losses.
      sums: of a batch, or of a part of it. The objectives of all parts add up to that of the batch.
      weight: from `weights`, of the whole batch.
    """

    def mean(part: Sum, whole: Sum) -> jax.Array:
        return part.total / jnp.maximum(whole.weight, 1e-9)

    return objective.total(mean(sums.task, weight.task), mean(sums.lm, weight.lm))


def forward(
    model: GPT,
    objective: Objective,
    params: Params,
    batch: Batch,
    key: jax.Array | None = None,
) -> tuple[Losses, jax.Array | None]:
    """Runs the model on a batch.

    Args:
      model: the module.
      objective: a loss whose weight is 0 in it is not computed.
      params: of the model.
      batch: the data.
      key: of the dropout; None: no dropout.

    Returns:
      The loss sums, and the logits of the task (None in pretraining).
    """
    deterministic, table = key is None, None
    if model.config.tied and model.ops.is_sharded:
        # One table for both of its uses, so that its gradient is summed over the devices once.
        table = run(model, params, deterministic, method="replicated_table", key=key)
    x_BTD = run(
        model, params, batch.tokens, batch.segment_ids, batch.positions, batch.token_types,
        deterministic, table, method="hidden", key=key,
    )  # fmt: skip
    sums = weights(batch)
    if objective.lm_weight:
        head = run(model, params, deterministic, table, method="lm_projection", key=key)
        sums = Losses(losses.lm_loss(x_BTD, head, batch, model.ops), sums.task)
    if not objective.kind:
        return sums, None
    logits = run(model, params, x_BTD, batch.extract, deterministic, method="task_logits", key=key)
    return Losses(sums.lm, losses.task_loss(objective.kind, logits, batch)), logits


def _micro_batches(batch: Batch, count: int) -> Batch:
    """[B, ...] -> [count, B / count, ...]; all rows stay on their devices."""

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)


def gradients(
    model: GPT, objective: Objective, params: Params, batch: Batch, key: jax.Array, micro: int
) -> tuple[Params, Losses]:
    """Returns the gradient of the objective and the loss sums.

    The losses of a micro-batch are divided by the weights of the whole batch. So the gradients of
    the micro-batches add up to that of the batch, whatever share of it each of them has.

    Args:
      model, objective, params, batch: as for `forward`.
      key: of the dropout.
      micro: number of micro-batches, which are computed one after the other.
    """
    whole = weights(batch)

    def loss(params: Params, part: Batch, key: jax.Array) -> tuple[jax.Array, Losses]:
        sums, _ = forward(model, objective, params, part, key)
        return joint(objective, sums, whole), sums

    grad = jax.grad(loss, has_aux=True)
    if micro == 1:
        return grad(params, batch, key)

    def add(
        carry: tuple[Params, Losses], xs: tuple[Batch, jax.Array]
    ) -> tuple[tuple[Params, Losses], None]:
        part, i = xs
        new = grad(params, part, jax.random.fold_in(key, i))
        return jax.tree.map(jnp.add, carry, new), None

    zeros = jax.tree.map(jnp.zeros_like, (params, whole))
    return jax.lax.scan(add, zeros, (_micro_batches(batch, micro), jnp.arange(micro)))[0]
