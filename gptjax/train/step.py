"""The pure train and eval steps, and their jitted wrappers. No I/O here."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import optax
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax.batch import Batch
from gptjax.model.gpt import GPT
from gptjax.model.objective import Losses, Objective, gradients
from gptjax.state import TrainState
from gptjax.train import ledger


@flax.struct.dataclass
class StepOutput:
    """What a train step reports, all scalars."""

    losses: Losses
    gradient_norm: jax.Array
    bad_steps: jax.Array
    """Non-finite updates in a row, all of them skipped."""
    batch_checksum: jax.Array
    """uint32, from `ledger.of_batch`."""


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: GPT,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    micro: int,
    seed: int | jax.Array,
) -> tuple[TrainState, StepOutput]:
    """One update: gradients of the joint loss, then the optimizer; dropout keys from the step."""
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    grads, sums = gradients(model, objective, state.params, batch, key, micro)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    seen = ledger.of_batch(batch)
    output = StepOutput(sums, optax.tree.norm(grads), opt_state.notfinite_count, seen)
    return TrainState(state.step + 1, params, opt_state), output


def jit_train_step(mesh: Mesh, **kwargs: Any) -> Callable[[TrainState, Batch, Any], Any]:
    """Returns the jitted `train_step`: state donated and kept in its layout, output replicated.

    Args:
      mesh: the devices.
      **kwargs: the keyword arguments of `train_step` but for the seed, the third argument (uint32)
        of what is returned: one program serves all seeds.
    """

    def step(state: TrainState, batch: Batch, seed: Any) -> tuple[TrainState, StepOutput]:
        new_state, output = train_step(state, batch, seed=seed, **kwargs)
        places = mesh_lib.state_sharding(new_state, mesh)
        return (
            jax.lax.with_sharding_constraint(new_state, places),
            jax.lax.with_sharding_constraint(output, mesh_lib.replicated(mesh)),
        )

    return jax.jit(step, donate_argnums=0)
