"""The joint objective of a batch: both losses, their weights, and the gradient.

The joint loss is L3 = L2 + lambda * L1 (Radford et al. 2018, equation 5): the mean task loss L2,
and the mean LM loss L1. Lambda is `Objective.lm_weight`.
"""

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
        """Returns the objective from the mean losses, numbers or arrays.

        Without a task, `task` is not used and may be None.
        """
        lm = self.lm_weight * lm
        return lm + self.task_weight * task if self.kind else lm


@flax.struct.dataclass
class Losses:
    """Sums of the losses of one batch."""

    lm: Sum
    """The LM loss; its total is 0 where the objective has no LM loss."""
    task: Sum | None
    """The task loss; None where the batch has no labels, as in pretraining and prediction."""


def weights(batch: Batch) -> Losses:
    """Returns the weights of a batch's losses; the totals are 0."""
    zero = jnp.float32(0)
    task = None if batch.labels is None else Sum(zero, batch.example_mask.sum())
    return Losses(Sum(zero, batch.lm_weights.sum()), task)


def joint(objective: Objective, sums: Losses, weight: Losses) -> jax.Array:
    """Returns the objective of a batch or micro-batch, a float32 scalar.

    Args:
      objective: the losses and their weights in the objective.
      sums: the losses of the batch or micro-batch.
      weight: from `weights`, of the whole batch; each sum is divided by its weight there.
    """

    def mean(part: Sum, whole: Sum) -> jax.Array:
        return part.total / jnp.maximum(whole.weight, 1e-9)

    task = None
    if sums.task is not None and weight.task is not None:
        task = mean(sums.task, weight.task)
    return objective.total(task, mean(sums.lm, weight.lm))


def forward(
    model: GPT, objective: Objective, params: Params, batch: Batch, key: jax.Array | None = None
) -> tuple[Losses, jax.Array | None]:
    """Runs the model on a batch.

    Args:
      model: the model.
      objective: the losses to compute. The LM loss is left out where its weight is 0.
      params: parameters of the model.
      batch: the packed rows.
      key: random key of the dropout masks; None: no dropout.

    Returns:
      The sums of the losses, and the task logits (float32 [B, E, O] or [B, E, C]; None without a
      task).
    """
    deterministic, table = key is None, None
    if model.config.tied and model.ops.is_sharded:
        # One table for the look-up and the LM head, so that its gradient is summed over the devices
        # once.
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
    if batch.labels is None:
        return sums, logits
    return Losses(sums.lm, losses.task_loss(objective.kind, logits, batch)), logits


def _micro_batches(batch: Batch, count: int) -> Batch:
    """Returns the fields of a batch as [count, B / count, ...].

    Micro-batch i has the rows i, i + count, ..., so that no row moves to another device.
    """

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)


def gradients(
    model: GPT, objective: Objective, params: Params, batch: Batch, key: jax.Array, micro: int
) -> tuple[Params, Losses]:
    """Computes the gradient of the joint loss, in `micro` micro-batches one after the other.

    The loss of each micro-batch is divided by the weights of the whole batch. The gradients then
    add up to that of the whole batch, even if some micro-batches have more padding than others.

    Args:
      model: the model.
      objective: the joint loss.
      params: parameters of the model.
      batch: the packed rows.
      key: random key of the dropout masks.
      micro: number of micro-batches; it divides B.

    Returns:
      The gradient, and the sums of the losses of the whole batch.
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
