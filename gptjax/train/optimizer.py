"""The optimizer of a stage: its learning rate schedule, Adam, weight decay and clipping.

"The authors' code" is OpenAI's `finetune-transformer-lm`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax.config.schema import Algorithm, OptimizerConfig, Schedule
from gptjax.errors import require
from gptjax.parameters import BLOCKS, EMBEDDINGS, PARAMETERS


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer of one stage.

    Two optimizers are equal if they have the same configuration, the same numbers of steps and of
    frozen blocks, and the same average.

    Raises:
      UserError: the warm-up is not shorter than the stage.
    """

    config: OptimizerConfig
    total_steps: int
    section: str = dataclasses.field(default="optimizer", compare=False)
    """The name of the configuration in error messages, such as "pretrain.optimizer"."""
    frozen: int = 0
    """The number of frozen blocks. If it is not 0, `transformation` gets only the trained part of
    the parameters and gradients (see `gptjax.model.frozen`)."""
    average: float = 0.0
    """The decay of the average of the parameters. 0 means that no average is made."""

    def __post_init__(self) -> None:
        warmup = self.config.warmup_steps
        require(
            warmup < self.total_steps,
            f"`{self.section}.warmup_steps`={warmup}: must be below the {self.total_steps} steps",
        )

    @functools.cached_property
    def learning_rate(self) -> optax.Schedule:
        """The function from the number of an update, counted from 0, to its learning rate."""
        make = openai_schedule if self.config.algorithm == Algorithm.OPENAI else schedule
        return make(self.config, self.total_steps)

    def rate_at(self, update: int) -> float:
        """Returns the learning rate of an update, counted from 0, as a number on the host."""
        # Implicit transfers are allowed here, because this call copies the number of the update and
        # the constants of the schedule to the device. In the train step the schedule is compiled
        # into the program and needs no transfers.
        with jax.transfer_guard("allow"):
            return float(jax.device_get(self.learning_rate(update)))

    @functools.cached_property
    def transformation(self) -> optax.GradientTransformation:
        """The optax transformation: clipping, then Adam, decoupled weight decay and the schedule.

        The last part are the factors of `scale_layers`, if the layers have different rates.

        An update that is not finite is skipped, and does not advance Adam or the schedule. The
        state is `optax.ApplyIfFiniteState`. Its `notfinite_count` is the number of skipped updates
        in a row up to now, and its `total_notfinite` is the number of all skipped updates.
        """
        config = self.config
        if config.algorithm == Algorithm.OPENAI:
            parts = [openai_adam(config, self.learning_rate)]
        else:
            parts = [
                optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
                optax.add_decayed_weights(config.weight_decay, decay_mask),
                optax.scale_by_learning_rate(self.learning_rate),
            ]
        if config.layer_decay < 1:
            parts.append(scale_layers(config.layer_decay))
        if config.clip_norm:
            parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
        return skip_nonfinite(optax.chain(*parts))


def schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Returns the schedule of our own recipes: a linear warm-up, and then a constant rate or decay.

    In a warm-up of w updates, update i (from 0) has the learning rate peak * (i + 1) / w, so the
    first rate is above 0. A cosine or linear decay reaches 0 at update number `total_steps`, which
    would be one update after the last update. So the rate of the last update is above 0 too.
    """
    share = min(math.ceil(config.warmup_fraction * total_steps), total_steps - 1)
    warmup = config.warmup_steps or share
    peak, rest = config.learning_rate, total_steps - warmup
    after: dict[str, optax.Schedule] = {
        Schedule.COSINE: optax.cosine_decay_schedule(peak, rest),
        Schedule.LINEAR: optax.linear_schedule(peak, 0.0, rest),
        Schedule.CONSTANT: optax.constant_schedule(peak),
    }
    if not warmup:
        return after[config.schedule]
    rise = optax.linear_schedule(peak / warmup, peak * (1 + 1 / warmup), warmup)
    return optax.join_schedules([rise, after[config.schedule]], [warmup])


def openai_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Returns the schedule of the authors' code.

    Let x be the number of the update (from 0) divided by the number of all updates, and w the
    fraction of warm-up updates. The peak learning rate is multiplied by this factor:

        schedule    x <= w             x > w
        constant    x / w              1
        cosine      x / w              (1 + cos(pi x)) / 2
        linear      (x / w) (1 - x)    1 - x

    Two things differ from `schedule`. The rate of the first update is 0 if there is a warm-up. The
    decay is counted from the first update and not from the end of the warm-up, so after the warm-up
    `linear` starts at 1 - w, and `cosine` starts at (1 + cos(pi w)) / 2.
    """
    w = config.warmup_steps / total_steps or config.warmup_fraction

    def rate(step: jax.Array) -> jax.Array:
        x = jnp.asarray(step, jnp.float32) / total_steps
        rates: dict[str, jax.Array] = {
            Schedule.COSINE: 0.5 * (1 + jnp.cos(jnp.pi * x)),
            Schedule.LINEAR: jnp.ones_like(x),
            Schedule.CONSTANT: jnp.ones_like(x),
        }
        after = rates[config.schedule]
        factor = jnp.where(x <= w, x / w, after) if w else after
        if config.schedule == Schedule.LINEAR:
            factor = factor * (1 - x)
        return config.learning_rate * factor

    return rate


def openai_adam(
    config: OptimizerConfig, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    """Returns the Adam of the authors' code (its `opt.py`).

    With t counted from 1, rate_t = rate * sqrt(1 - beta2^t) / (1 - beta1^t), and the update of a
    parameter p is -rate_t * (m / (sqrt(v) + epsilon) + decay * p). m and v are the moving averages
    of the gradient and of its square. Two things differ from `optax.adamw`. Epsilon is added to the
    root of v before the bias correction, and the bias correction also scales the weight decay.
    """
    beta1, beta2 = config.beta1, config.beta2

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        zeros = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), *zeros)

    def update(
        gradients: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        assert params is not None
        t = (state.count + 1).astype(jnp.float32)
        # 1 - beta^t is computed with expm1, because a float32 difference would lose four digits in
        # the first updates.
        correction1, correction2 = (
            -jnp.expm1(t * math.log(beta)) if beta else 1.0 for beta in (beta1, beta2)
        )
        rate_t = learning_rate(state.count) * jnp.sqrt(correction2) / correction1
        m = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mu, gradients)
        v = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.nu, gradients)

        def step(m: jax.Array, v: jax.Array, p: jax.Array, decayed: bool) -> jax.Array:
            direction = m / (jnp.sqrt(v) + config.epsilon)
            if decayed:
                direction = direction + config.weight_decay * p
            return -rate_t * direction

        updates = jax.tree.map(step, m, v, params, decay_mask(params))
        return updates, optax.ScaleByAdamState(state.count + 1, m, v)

    return optax.GradientTransformation(init, update)


def scale_layers(decay: float) -> optax.GradientTransformation:
    """Returns a transformation that multiplies the updates of lower layers by smaller factors.

    The factor of block l of L is decay^(L - 1 - l), counted from 0. That of the embeddings is
    decay^L, and that of the heads is 1 (Clark et al. 2020, ELECTRA, and Bao et al. 2022, BEiT). If
    the lowest blocks are frozen, the updates have only the blocks above them, whose factors are the
    same. The weight decay of a parameter has the same factor as its learning rate.
    """

    def scaled(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        blocks = jax.tree.leaves(updates.get(BLOCKS, {}))
        layers = blocks[0].shape[0] if blocks else 0
        factors = decay ** np.arange(layers - 1, -1, -1.0)

        def scale(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
            if path[0].key == BLOCKS:
                return x * factors.reshape(-1, *[1] * (x.ndim - 1)).astype(np.float32)
            return x * decay**layers if path[0].key in EMBEDDINGS else x

        return jax.tree_util.tree_map_with_path(scale, updates)

    return optax.stateless(scaled)


def averaged(
    average: optax.Params, params: optax.Params, decay: float, count: jax.Array
) -> optax.Params:
    """Returns the exponential moving average of the parameters, with the bias correction of Adam.

    With the decay d, the average after t updates is the weighted mean of p_1, ..., p_t, in which
    p_i has the weight d^(t - i). So the first parameters p_0 have no weight. The new average is
    a_t = a_(t-1) + (1 - d) / (1 - d^t) * (p_t - a_(t-1)). This is the corrected average, and not
    the sum that Adam corrects, so that no second copy is needed.

    Args:
      average: a_(t-1). If t is 1, its values do not matter.
      params: p_t.
      decay: d, above 0 and below 1.
      count: t, int32.
    """
    # 1 - d^t is computed with expm1, as in `openai_adam`.
    share = (1 - decay) / -jnp.expm1(count.astype(jnp.float32) * math.log(decay))
    return optax.incremental_update(params, average, jnp.minimum(share, 1.0))


def decay_mask(params: optax.Params) -> optax.Params:
    """Returns a tree with True for each array that weight decay applies to.

    These are the embeddings and the weight matrices of linear layers, not the biases and gains.

    Raises:
      KeyError: the list `gptjax.parameters.PARAMETERS` lacks an array.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: PARAMETERS["/".join(part.key for part in path)].decayed, params
    )


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns a transformation that applies `inner` only if the gradients are finite.

    Otherwise neither the parameters nor the state of `inner` change. `optax.apply_if_finite` tests
    each element of the gradients. This function tests the norm of all gradients, because the train
    step computes the norm anyway, and a test of each element is slower on a CPU. Gradients whose
    squares overflow are treated as not finite.
    """

    def init(params: optax.Params) -> optax.ApplyIfFiniteState:
        zero = jnp.zeros((), jnp.int32)
        return optax.ApplyIfFiniteState(zero, jnp.array(True), zero, inner.init(params))

    def update(
        gradients: optax.Updates,
        state: optax.ApplyIfFiniteState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.ApplyIfFiniteState]:
        finite = jnp.isfinite(optax.tree.norm(gradients))

        def skip() -> tuple[optax.Updates, optax.OptState]:
            return jax.tree.map(jnp.zeros_like, gradients), state.inner_state

        updates, inner_state = jax.lax.cond(
            finite, lambda: inner.update(gradients, state.inner_state, params), skip
        )
        in_a_row = jnp.where(finite, 0, state.notfinite_count + 1)
        total = state.total_notfinite + jnp.where(finite, 0, 1)
        return updates, optax.ApplyIfFiniteState(in_a_row, finite, total, inner_state)

    return optax.GradientTransformation(init, update)
