"""The losses of a batch as (sum, weight).

They are divided once, after all parts of a batch are added up. So the objective does not depend on
padding, packing, sharding or gradient accumulation.

`objective.py` joins the two losses.
"""

import flax.struct
import jax
import jax.numpy as jnp

from gptjax.batch import Batch
from gptjax.config.schema import TaskKind
from gptjax.ops.cross_entropy import LMHeadWeights
from gptjax.ops.sharded import ShardedOps

Array = jax.Array


@flax.struct.dataclass
class Sum:
    """A weighted sum and the sum of its weights, float32 scalars."""

    total: Array
    weight: Array

    def __add__(self, other: "Sum") -> "Sum":
        return Sum(self.total + other.total, self.weight + other.weight)


def lm_targets(batch: Batch) -> Array:
    """Returns int32 [B, T]: token t + 1 at t. The last one is arbitrary; its weight is 0."""
    return jnp.roll(batch.tokens, -1, axis=1)


def lm_loss(x_BTD: Array, head: LMHeadWeights, batch: Batch, ops: ShardedOps) -> Sum:
    """Returns the LM loss L1: the weighted sum of -log P(next token), in nats, and the weights.

    Args:
      x_BTD: states after the last block.
      head: weights of the LM head.
      batch: its tokens and lm_weights.
      ops: the operations on the devices.
    """
    total = ops.cross_entropy(x_BTD, head, lm_targets(batch), batch.lm_weights)
    return Sum(total, batch.lm_weights.sum())


def task_loss(kind: TaskKind, logits: Array, batch: Batch) -> Sum:
    """Returns the task loss L2: the cross-entropy of classes or answers, or a squared error.

    Args:
      kind: of the task.
      logits: from `GPT.task_logits`, float32 [B, E, O] or [B, E, C].
      batch: its labels, candidate_mask and example_mask.
    """
    if kind == TaskKind.REGRESSION:
        losses_BE = jnp.square(logits[..., 0] - batch.labels)
    else:
        if kind == TaskKind.MULTIPLE_CHOICE:
            # Empty places get the smallest float32 and not -inf, because a slot without an example
            # has no candidate at all, and its softmax must not be NaN.
            logits = jnp.where(batch.candidate_mask > 0, logits, jnp.finfo(jnp.float32).min)
        log_probabilities = jax.nn.log_softmax(logits, axis=-1)
        losses_BE = -jnp.take_along_axis(log_probabilities, batch.labels[..., None], -1)[..., 0]
    weights_BE = batch.example_mask
    # The product alone is not enough: a slot without an example may have the loss NaN, and NaN
    # times 0 is NaN.
    losses_BE = jnp.where(weights_BE > 0, losses_BE * weights_BE, 0.0)
    return Sum(losses_BE.sum(), weights_BE.sum())
