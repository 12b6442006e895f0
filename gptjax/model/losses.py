"""The losses of a batch, each as a pair of a weighted sum and the denominator of its mean.

The mean is computed once for the whole batch, and not for each micro-batch or device. Therefore the
objective does not depend on padding, packing, sharding or gradient accumulation. `objective.py`
adds the two losses.
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
    """A weighted sum of losses (`total`) and the denominator of its mean (`weight`).

    Both are float32 scalars. The denominator of the LM loss is the sum of the weights of the
    tokens. That of the task loss is the number of examples, even if the classes have weights.
    """

    total: Array
    weight: Array

    def __add__(self, other: "Sum") -> "Sum":
        return Sum(self.total + other.total, self.weight + other.weight)


def lm_targets(batch: Batch) -> Array:
    """Returns the tokens to predict, int32 [B, T]: token t + 1 at position t of the row.

    The last position of a row has an arbitrary token. Its weight is 0.
    """
    return jnp.roll(batch.tokens, -1, axis=1)


def lm_loss(x_BTD: Array, head: LMHeadWeights, batch: Batch, ops: ShardedOps) -> Sum:
    """Returns the LM loss L1, the weighted sum of -log P(next token) in nats.

    Args:
      x_BTD: the hidden states after the last block.
      head: the weights of the LM head.
      batch: the batch. Only `tokens` and `lm_weights` are used.
      ops: the operations on the devices.
    """
    total = ops.cross_entropy(x_BTD, head, lm_targets(batch), batch.lm_weights)
    return Sum(total, batch.lm_weights.sum())


def example_weights(batch: Batch, class_weights: tuple[float, ...] = ()) -> Array:
    """Returns the weights of the examples in the task loss, float32 [B, E].

    The weight is 0 in a slot without an example.

    Args:
      batch: the batch. Only `labels` and `example_mask` are used.
      class_weights: the weight of each class. An empty tuple means that all weights are 1.
    """
    if not class_weights:
        return batch.example_mask
    return batch.example_mask * jnp.array(class_weights, jnp.float32)[batch.labels]


def task_loss(
    kind: TaskKind,
    logits: Array,
    batch: Batch,
    class_weights: tuple[float, ...] = (),
    label_smoothing: float = 0.0,
) -> Sum:
    """Returns the task loss L2: the weighted sum over the examples, and the number of examples.

    The class weights have the mean 1 over the training rows, so they are not in the denominator.
    The sum of the weights of a batch would be wrong there: in a batch of one class the weights
    would cancel, and with small batches a rare class would hardly weigh more.

    The loss of an example is the squared error for a regression, and the cross-entropy of the
    classes or answers for other tasks. With label smoothing (Szegedy et al. 2016, section 7) the
    target of the cross-entropy is (1 - epsilon) * one-hot + epsilon / K, where K is the number of
    classes, or of the candidates that the example has.

    Args:
      kind: the kind of the task.
      logits: the task logits from `GPT.task_logits`, float32 [B, E, O] or [B, E, C].
      batch: the batch. Only `labels`, `candidate_mask` and `example_mask` are used.
      class_weights: the weight of the examples of each class, as in `example_weights`.
      label_smoothing: epsilon.
    """
    if kind == TaskKind.REGRESSION:
        losses_BE = jnp.square(logits[..., 0] - batch.labels)
    else:
        exists = jnp.ones_like(logits)
        if kind == TaskKind.MULTIPLE_CHOICE:
            exists = batch.candidate_mask
            # Missing candidates get the smallest float32 and not -inf. A slot without an example
            # has no candidate at all, and its softmax must not be NaN.
            logits = jnp.where(exists > 0, logits, jnp.finfo(jnp.float32).min)
        log_probabilities = jax.nn.log_softmax(logits, axis=-1)
        losses_BE = -jnp.take_along_axis(log_probabilities, batch.labels[..., None], -1)[..., 0]
        if label_smoothing:
            # A missing candidate has a huge -log P, which must not be multiplied by 0 and added.
            each = jnp.where(exists > 0, -log_probabilities, 0.0)
            shared_BE = each.sum(axis=-1) / jnp.maximum(exists.sum(axis=-1), 1.0)
            losses_BE = (1 - label_smoothing) * losses_BE + label_smoothing * shared_BE
    weights_BE = example_weights(batch, class_weights)
    # `where` is needed in addition to the product, because the loss of a slot without an example
    # can be NaN, and NaN times 0 is NaN.
    losses_BE = jnp.where(weights_BE > 0, losses_BE * weights_BE, 0.0)
    return Sum(losses_BE.sum(), batch.example_mask.sum())
