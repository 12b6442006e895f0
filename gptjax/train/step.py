"""The train step: a pure function and its jitted wrapper. This module does no I/O."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import optax
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax import state as state_lib
from gptjax.batch import Batch
from gptjax.model import frozen, gpt
from gptjax.model.gpt import GPT
from gptjax.model.objective import Losses, Objective, gradients
from gptjax.state import TrainState
from gptjax.train import ledger
from gptjax.train.optimizer import Optimizer, averaged


@flax.struct.dataclass
class StepOutput:
    """The measurements of one train step. All of them are scalars."""

    losses: Losses
    gradient_norm: jax.Array
    bad_steps: jax.Array
    """The number of skipped updates in a row, up to this step. An update is skipped if it is not
    finite."""
    batch_checksum: jax.Array
    """The checksum of the batch from `ledger.of_batch`, a uint32."""


def initial_state(
    model: GPT, optimizer: Optimizer, params: mesh_lib.Params | None = None
) -> Callable[[jax.Array], TrainState]:
    """Returns a function that takes a random key and returns the state before the first step.

    Args:
      model: the model.
      optimizer: the optimizer of the stage.
      params: the first parameters. None means that the function draws random parameters with its
        key.
    """

    def make(key: jax.Array) -> TrainState:
        first = gpt.init_params(model, key) if params is None else params
        trained = frozen.trained_part(first, optimizer.frozen)
        return state_lib.create(first, optimizer.transformation, trained, optimizer.average > 0)

    return make


def train_step(
    state: TrainState,
    batch: Batch,
    seed: int | jax.Array,
    model: GPT,
    objective: Objective,
    optimizer: Optimizer,
) -> tuple[TrainState, StepOutput]:
    """Updates the state with one batch.

    Args:
      state: the parameters, the optimizer state and the step.
      batch: the packed rows. It has `Batch.hidden` if blocks are frozen.
      seed: the seed of the dropout masks, which are a function of the seed and the step.
      model: the whole model.
      objective: the loss that is minimised.
      optimizer: the optimizer of the stage. Its configuration has the number of micro-batches that
        the batch is divided into. Their gradients are summed. `Optimizer.frozen` is the number of
        frozen blocks.

    Returns:
      The next state and the `StepOutput`. The losses and the gradient norm belong to the parameters
      before the update, and not to their average. The gradient norm is that of the trained
      parameters.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    micro, update = optimizer.config.accumulation, optimizer.transformation.update
    count = optimizer.frozen
    params, raw_params = state.params, None
    if state.raw_params is not None:
        params = frozen.with_trained_part(params, state.raw_params, count)
    grads, sums = gradients(model, objective, params, batch, key, micro, count)
    trained = frozen.trained_part(params, count)
    updates, opt_state = update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    if state.raw_params is not None:
        raw_params, before = trained, frozen.trained_part(state.params, count)
        trained = averaged(before, raw_params, optimizer.average, state.step + 1)
    params = frozen.with_trained_part(state.params, trained, count)
    checksum = ledger.of_batch(batch)
    output = StepOutput(sums, optax.tree.norm(grads), opt_state.notfinite_count, checksum)
    return TrainState(state.step + 1, params, opt_state, raw_params), output


def jit_train_step(
    mesh: Mesh, model: GPT, objective: Objective, optimizer: Optimizer
) -> Callable[[TrainState, Batch, Any], Any]:
    """Returns the jitted function (state, batch, seed) -> (state, output) of `train_step`.

    The buffers of the state are donated. The new state has the same sharding, and the output is
    replicated. The seed is an argument, a uint32, so that one compiled program can be used for all
    seeds.
    """

    def step(state: TrainState, batch: Batch, seed: Any) -> tuple[TrainState, StepOutput]:
        new_state, output = train_step(state, batch, seed, model, objective, optimizer)
        places = mesh_lib.state_sharding(new_state, mesh)
        return (
            jax.lax.with_sharding_constraint(new_state, places),
            jax.lax.with_sharding_constraint(output, mesh_lib.replicated(mesh)),
        )

    return jax.jit(step, donate_argnums=0)
