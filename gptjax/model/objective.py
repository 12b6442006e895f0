"""The joint objective of a batch: both losses, their weights, and the gradient."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gptjax import mesh
from gptjax.batch import Batch
from gptjax.config.schema import TaskKind
from gptjax.mesh import Params
from gptjax.model import losses
from gptjax.model.gpt import GPT, run
from gptjax.model.losses import Sum


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised: the LM loss alone, or task_weight * task + lm_weight * LM."""

    kind: TaskKind | None = None
    """The task's kind; None in pretraining."""
    lm_weight: float = 1.0
    task_weight: float = 1.0

    def total(self, task: Any, lm: Any) -> Any:
        """Returns the objective from the mean losses (numbers or arrays)."""
        lm = self.lm_weight * lm
        return lm + self.task_weight * task if self.kind else lm


@flax.struct.dataclass
class Losses:
    """Sums of one batch. `task` has weight 0 in pretraining."""

    lm: Sum
    task: Sum

    def __add__(self, other: "Losses") -> "Losses":
        return Losses(self.lm + other.lm, self.task + other.task)


def weights(batch: Batch) -> Losses:
    """Returns the weights of a batch's losses, with zero totals."""
    zero = jnp.float32(0)
    task = zero if batch.example_mask is None else batch.example_mask.sum()
    return Losses(Sum(zero, batch.lm_weights.sum()), Sum(zero, task))


def joint(objective: Objective, sums: Losses, weight: Losses) -> jax.Array:
    """Returns the objective of the sums, each divided by its weight of the whole batch."""

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
    """Returns the loss sums of a batch and the task logits; dropout only with a key."""
    deterministic, copies = key is None, None
    if model.config.tied and mesh.several(model.mesh):
        # For both uses, so that its gradient is added up over the devices once.
        copies = run(model, params, deterministic, method="copies", key=key)
    x_BTD = run(
        model, params, batch.tokens, batch.segment_ids, batch.positions, batch.token_types,
        deterministic, copies, method="hidden", key=key,
    )  # fmt: skip
    sums = weights(batch)
    if objective.lm_weight:
        rows, bias = run(model, params, deterministic, method="lm_projection", key=key)
        sums = Losses(losses.lm_loss(x_BTD, rows, batch, bias, model.mesh, copies), sums.task)
    if not objective.kind:
        return sums, None
    logits = run(model, params, x_BTD, batch.extract, deterministic, method="task_logits", key=key)
    return Losses(sums.lm, losses.task_loss(objective.kind, logits, batch)), logits


def _micro_batches(batch: Batch, count: int) -> Batch:
    """[B, ...] -> [count, B / count, ...]; rows stay on the device that holds them."""

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)


def gradients(
    model: GPT, objective: Objective, params: Params, batch: Batch, key: jax.Array, micro: int
) -> tuple[Params, Losses]:
    """Returns the gradient of the joint loss and the loss sums, over `micro` micro-batches.

    Every micro-batch is divided by the weights of the whole batch, so that their gradients add up
    to the gradient of one large batch, however unevenly the padding falls.
    """
    whole = weights(batch)

    def loss(params: Params, part: Batch, key: jax.Array) -> tuple[jax.Array, Losses]:
        sums, _ = forward(model, objective, params, part, key)
        return joint(objective, sums, whole), sums

    grad = jax.grad(loss, has_aux=True)
    if micro == 1:
        return grad(params, batch, key)

    def add(carry: tuple[Params, Losses], xs: tuple[Batch, jax.Array]):
        part, i = xs
        new = grad(params, part, jax.random.fold_in(key, i))
        return jax.tree.map(jnp.add, carry, new), None

    zeros = jax.tree.map(jnp.zeros_like, (params, whole))
    return jax.lax.scan(add, zeros, (_micro_batches(batch, micro), jnp.arange(micro)))[0]
