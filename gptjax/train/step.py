"""The train step: a pure function and its jitted wrapper. There is no I/O here."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import optax
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax import state as state_lib
from gptjax.batch import Batch
from gptjax.model import gpt
from gptjax.model.gpt import GPT
from gptjax.model.objective import Losses, Objective, gradients
from gptjax.state import TrainState
from gptjax.train import ledger
from gptjax.train.optimizer import Optimizer


@flax.struct.dataclass
class StepOutput:
    """Measurements of one train step, all scalars."""

    losses: Losses
    gradient_norm: jax.Array
    bad_steps: jax.Array
    """Number of skipped updates in a row, up to this one. An update that is not finite is
    skipped."""
    batch_checksum: jax.Array
    """uint32, from `ledger.of_batch`."""


def initial_state(
    model: GPT, optimizer: Optimizer, params: mesh_lib.Params | None = None
) -> Callable[[jax.Array], TrainState]:
    """Returns a function of a random key that returns the state before the first step.

    Args:
      model: the model.
      optimizer: its optimizer.
      params: the first parameters; None: the function draws them with its key.
    """

    def make(key: jax.Array) -> TrainState:
        first = gpt.init_params(model, key) if params is None else params
        return state_lib.create(first, optimizer.transformation)

    return make


def train_step(
    state: TrainState,
    batch: Batch,
    seed: int | jax.Array,
    model: GPT,
    objective: Objective,
    optimizer: Optimizer,
) -> tuple[TrainState, StepOutput]:
    """Updates the state by one batch.

    Args:
      state: parameters, optimizer state and step.
      batch: the packed rows.
      seed: the dropout masks are a function of the seed and the step.
      model: the model.
      objective: the loss that is minimised.
      optimizer: the update rule, and the number of micro-batches that the batch is divided into,
        whose gradients are summed.

    Returns:
      The next state, and the losses and gradient norm before the update.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    micro, update = optimizer.config.accumulation, optimizer.transformation.update
    grads, sums = gradients(model, objective, state.params, batch, key, micro)
    updates, opt_state = update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    checksum = ledger.of_batch(batch)
    output = StepOutput(sums, optax.tree.norm(grads), opt_state.notfinite_count, checksum)
    return TrainState(state.step + 1, params, opt_state), output


def jit_train_step(
    mesh: Mesh, model: GPT, objective: Objective, optimizer: Optimizer
) -> Callable[[TrainState, Batch, Any], Any]:
    """Returns the jitted function (state, batch, seed) -> (state, output) of `train_step`.

    The state is donated and keeps its layout; the output is replicated. The seed is a uint32
    argument, so that one program serves all seeds.
    """

    def step(state: TrainState, batch: Batch, seed: Any) -> tuple[TrainState, StepOutput]:
        new_state, output = train_step(state, batch, seed, model, objective, optimizer)
        places = mesh_lib.state_sharding(new_state, mesh)
        return (
            jax.lax.with_sharding_constraint(new_state, places),
            jax.lax.with_sharding_constraint(output, mesh_lib.replicated(mesh)),
        )

    return jax.jit(step, donate_argnums=0)
