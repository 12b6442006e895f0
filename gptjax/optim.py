"""Schedules, the decay mask and the optax chain."""

import math

import jax
import optax

from gptjax.config import OptimizerConfig
from gptjax.errors import require


def schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up from 0, then down to 0 at `total_steps`.

    The first update has rate peak / warm-up (not 0), the last one is still above 0.
    """
    require(
        config.warmup_steps < total_steps,
        f"--config: optimizer.warmup_steps={config.warmup_steps} must be below the "
        f"{total_steps} steps",
    )
    share = min(math.ceil(config.warmup_fraction * total_steps), total_steps - 1)
    warmup = config.warmup_steps or share
    peak, rest = config.learning_rate, total_steps - warmup
    after: dict[str, optax.Schedule] = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }
    if not warmup:
        return after[config.schedule]
    rise = optax.linear_schedule(peak / warmup, peak * (1 + 1 / warmup), warmup)
    return optax.join_schedules([rise, after[config.schedule]], [warmup])


# Parameters of one dimension; those of the blocks carry a leading layers axis besides, and some
# biases a heads axis, so that the rule is a name and not a number of dimensions.
_NOT_DECAYED = ("bias", "scale")


def decay_mask(params: optax.Params) -> optax.Params:
    """Returns True for the arrays that weight decay applies to: all but biases and gains."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in _NOT_DECAYED, params
    )


def build(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Returns clip -> Adam -> decoupled decay -> schedule; non-finite updates are skipped, counted.

    The state is `optax.ApplyIfFiniteState`: `notfinite_count` in a row, `total_notfinite` in all.
    Adam's step and the schedule do not advance on a skipped update.
    """
    parts = [
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule(config, total_steps)),
    ]
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    # optax applies a bad update after this many in a row; the loop ends the run long before.
    return optax.apply_if_finite(optax.chain(*parts), max_consecutive_errors=2**30)
