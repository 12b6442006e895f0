"""The objective of a batch: the LM loss, the task loss, their weighted sum, and its gradient.

The joint loss is L3 = L2 + lambda * L1 (Radford et al. 2018, equation 5). L2 is the mean task loss,
L1 is the mean LM loss, and lambda is `Objective.lm_weight`.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gptjax.batch import Batch
from gptjax.config.schema import TaskKind
from gptjax.mesh import Params
from gptjax.model import frozen as frozen_lib
from gptjax.model import losses
from gptjax.model.gpt import GPT, run
from gptjax.model.losses import Sum


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss to minimise: lm_weight * LM loss, plus task_weight * task loss if there is a task.

    The LM loss is a mean over the predicted tokens. The task loss is the weighted sum over
    the examples, divided by their number.
    """

    kind: TaskKind | None = None
    """The kind of the task. None means that there is no task, as in pretraining."""
    lm_weight: float = 1.0
    task_weight: float = 1.0
    class_weights: tuple[float, ...] = ()
    """The weight of the examples of each class in the task loss. An empty tuple means that all
    weights are 1. The objective of an evaluation has no weights."""
    label_smoothing: float = 0.0
    """Epsilon of `losses.task_loss`. The objective of an evaluation has no smoothing."""

    def total(self, task: Any, lm: Any) -> Any:
        """Returns the objective for the given mean losses.

        Args:
          task: the mean task loss, a number or array. Without a task it can be None.
          lm: the mean LM loss, a number or array.
        """
        lm = self.lm_weight * lm
        return lm + self.task_weight * task if self.kind else lm


@flax.struct.dataclass
class Losses:
    """The sums of the losses of a batch or micro-batch, and the denominators of their means."""

    lm: Sum
    """The LM loss. Its total is 0 if `Objective.lm_weight` is 0."""
    task: Sum | None
    """The task loss. None means that the batch has no labels, as in pretraining and prediction."""


def weights(batch: Batch) -> Losses:
    """Returns the denominators of the mean losses, for which the model is not needed.

    In the result each `Sum.weight` is a denominator: the sum of the batch's `lm_weights` and the
    number of its examples. Each `Sum.total` is 0.
    """
    zero = jnp.float32(0)
    task = None
    if batch.labels is not None:
        task = Sum(zero, batch.example_mask.sum())
    return Losses(Sum(zero, batch.lm_weights.sum()), task)


def joint(objective: Objective, sums: Losses, weight: Losses) -> jax.Array:
    """Returns the objective of a batch or micro-batch, a float32 scalar.

    Args:
      objective: the factors of the two losses.
      sums: the sums of the losses of the batch or micro-batch.
      weight: the denominators of the whole batch, from `weights`. Each sum is divided by its
        denominator.
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
      model: the model. If the batch has `Batch.hidden`, it is the upper model (see
        `gptjax.model.frozen`), and starts from these states.
      objective: the losses to compute. If `lm_weight` is 0, the LM loss is not computed.
      params: the parameters of the model.
      batch: the packed rows.
      key: the random key of the dropout masks. None means no dropout.

    Returns:
      The sums of the losses, and the task logits (see `GPT.task_logits`), float32 [B, E, O] or
      [B, E, C]. The logits are None without a task.
    """
    deterministic, table = key is None, None
    starts_above = batch.hidden is not None
    if starts_above:
        x_BTD = run(
            model, params, batch.hidden, batch.segment_ids, batch.token_types, deterministic,
            method="apply_blocks", key=key,
        )  # fmt: skip
    else:
        if model.config.tied and model.ops.is_sharded:
            # The embedding and the LM head use the same table, so that its gradient is summed over
            # the devices only once.
            table = run(model, params, deterministic, method="replicated_table", key=key)
        x_BTD = run(
            model, params, batch.tokens, batch.segment_ids, batch.positions, batch.token_types,
            deterministic, table, method="hidden", key=key,
        )  # fmt: skip
    sums = weights(batch)
    if objective.lm_weight:
        # With `one_matrix` the table has dropout, but not if it is frozen.
        plain = deterministic or starts_above
        head = run(model, params, plain, table, method="lm_projection", key=key)
        sums = Losses(losses.lm_loss(x_BTD, head, batch, model.ops), sums.task)
    if not objective.kind:
        return sums, None
    logits = run(
        model, params, x_BTD, batch.segment_ids, batch.extract, deterministic,
        batch.candidate_mask, method="task_logits", key=key,
    )  # fmt: skip
    if batch.labels is None:
        return sums, logits
    task = losses.task_loss(
        objective.kind, logits, batch, objective.class_weights, objective.label_smoothing
    )
    return Losses(sums.lm, task), logits


def _micro_batches(batch: Batch, count: int) -> Batch:
    """Divides a batch into micro-batches: each field becomes [count, B / count, ...].

    Micro-batch i has the rows i, i + count, ..., so that no row moves to another device.
    """

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)


def gradients(
    model: GPT,
    objective: Objective,
    params: Params,
    batch: Batch,
    key: jax.Array,
    micro: int,
    frozen: int = 0,
) -> tuple[Params, Losses]:
    """Computes the gradient of the objective, for one micro-batch after the other.

    The sums of the losses of each micro-batch are divided by the denominators of the whole batch.
    Therefore the sum of the gradients is the gradient of the whole batch, even if some
    micro-batches have more padding than others.

    Args:
      model: the model.
      objective: the objective.
      params: the parameters of the model.
      batch: the packed rows.
      key: the random key of the dropout masks.
      micro: the number of micro-batches. It must divide B.
      frozen: the number of frozen blocks. If it is not 0, the batch has `Batch.hidden`.

    Returns:
      The gradient of `frozen.trained_part(params)`, and the sums of the losses of the whole batch.
    """
    whole = weights(batch)
    upper = frozen_lib.upper_model(model, frozen)
    others = frozen_lib.upper_params(params, frozen)
    params = frozen_lib.trained_part(params, frozen)

    def loss(params: Params, part: Batch, key: jax.Array) -> tuple[jax.Array, Losses]:
        sums, _ = forward(upper, objective, others | params, part, key)
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
