"""The optimizer of a stage: its learning rate schedule, Adam, weight decay and clipping."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax

from gptjax.config.schema import Algorithm, OptimizerConfig, Schedule
from gptjax.errors import require
from gptjax.parameters import PARAMETERS


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer of one stage. Two of them are equal if their configuration and length are.

    Raises:
      UserError: the warm-up is not shorter than the stage.
    """

    config: OptimizerConfig
    total_steps: int
    section: str = dataclasses.field(default="optimizer", compare=False)
    """Name of the configuration in error messages, such as "pretrain.optimizer"."""

    def __post_init__(self) -> None:
        warmup = self.config.warmup_steps
        require(
            warmup < self.total_steps,
            f"`{self.section}.warmup_steps`={warmup}: must be below the {self.total_steps} steps",
        )

    @functools.cached_property
    def learning_rate(self) -> optax.Schedule:
        """The learning rate of an update, counted from 0."""
        make = openai_schedule if self.config.algorithm == Algorithm.OPENAI else schedule
        return make(self.config, self.total_steps)

    def rate_at(self, update: int) -> float:
        """Returns the learning rate of an update, counted from 0, as a number on the host."""
        # Allowed, because the update's number and the constants of the schedule have to get to the
        # device. In the train step the schedule is part of the program.
        with jax.transfer_guard("allow"):
            return float(jax.device_get(self.learning_rate(update)))

    @functools.cached_property
    def transformation(self) -> optax.GradientTransformation:
        """Clipping -> Adam -> decoupled decay -> schedule. Non-finite updates are skipped.

        The state is `optax.ApplyIfFiniteState`. It counts the skipped updates: `notfinite_count`
        those in a row, `total_notfinite` all of them. Adam and the schedule do not advance on a
        skipped update.
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
        if config.clip_norm:
            parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
        return skip_nonfinite(optax.chain(*parts))


def schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Returns our schedules: linear warm-up from 0, then the decay to 0 at `total_steps`.

    The first update has the rate peak / warm-up steps, which is above 0. The last one is above 0
    too, because the rate reaches 0 one update later.
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
    """Returns the schedules of the authors' code, functions of x = update / total from 0.

    With w, the warm-up's share of all updates, the factor is x / w up to w, and after it 1 or the
    half wave of the cosine. `linear` multiplies both by 1 - x. A warm-up differs from that of
    `schedule` in two points: the first update has the rate 0, and after it `linear` is at 1 - w.
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

    rate_t = rate * sqrt(1 - beta2^t) / (1 - beta1^t), t from 1, and the update is
    -rate_t * (m / (sqrt(v) + epsilon) + decay * p). It differs from `optax.adamw` in two points:
    epsilon is added to the root of the uncorrected v, and the bias correction scales the decay too.
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
        # 1 - beta^t by expm1: a float32 difference would lose four digits in the first updates.
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


def decay_mask(params: optax.Params) -> optax.Params:
    """Returns True for the arrays that weight decay applies to: embeddings and kernels.

    Raises:
      KeyError: an array is not in the table of `gptjax.parameters`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: PARAMETERS["/".join(part.key for part in path)].decayed, params
    )


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns `inner` changed so that gradients that are not finite update nothing.

    Neither the parameters nor the state of `inner` change then. It differs from
    `optax.apply_if_finite` in testing the norm of all gradients instead of each element: the train
    step computes the norm anyway, and testing each element takes a CPU longer. Gradients whose
    squares overflow count as not finite.
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
