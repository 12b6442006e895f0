"""The training state, which is created sharded on the mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax.mesh import Params
from gptjax.parameters import BLOCKS


@flax.struct.dataclass
class TrainState:
    """The values that a training has to save. All other values are functions of the step."""

    step: jax.Array
    """int32 scalar: the number of batches that were used."""
    params: Params
    """The parameters of the whole model that are validated and used. With `raw_params` they are the
    averaged ones."""
    opt_state: optax.OptState
    """The optimizer's state of the parameters that are trained. Frozen parameters (see
    `gptjax.model.frozen`) have none, and this saves two thirds of their memory."""
    raw_params: Params | None = None
    """The trained part of the parameters before the averaging, from which the training goes on.
    None means that no average is made."""


def create(
    params: Params,
    optimizer: optax.GradientTransformation,
    trained: Params | None = None,
    averaged: bool = False,
) -> TrainState:
    """Returns the state before the first step.

    Args:
      params: the parameters of the whole model.
      optimizer: the optimizer.
      trained: the part of the parameters that the optimizer updates. None means all.
      averaged: whether the state has `TrainState.raw_params`.
    """
    trained = params if trained is None else trained
    opt_state = optimizer.init(trained)
    # The copy has buffers of its own, because the train step donates those of the whole state.
    raw_params = jax.tree.map(jnp.copy, trained) if averaged else None
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, raw_params)


def with_first_params(state: TrainState, params: Params, trained: Params) -> TrainState:
    """Returns a state before the first step with other parameters.

    Args:
      state: the state.
      params: the parameters of the whole model.
      trained: the part of `params` that is trained.
    """
    if state.raw_params is None:
        return dataclasses.replace(state, params=params)
    # As in `create`, the copy has buffers of its own.
    raw_params = jax.tree.map(jnp.copy, trained)
    return dataclasses.replace(state, params=params, raw_params=raw_params)


def born_sharded(make: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
    """Returns make(*args). Each array is created sharded, so no device ever holds a whole array.

    A replicated array is the exception, because every device holds it completely.
    """
    shapes = jax.eval_shape(make, *args)
    shardings = mesh_lib.state_sharding(shapes, mesh)
    return jax.jit(make, out_shardings=shardings)(*args)


def abstract(make: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
    """Returns the shapes and shardings of the arrays of make(*args) without computing them."""
    shapes = jax.eval_shape(make, *args)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        mesh_lib.state_sharding(shapes, mesh),
    )


def merge_params(loaded: Params, fresh: Params, may_be_new: tuple[str, ...] = ()) -> Params:
    """Returns `fresh` with each array replaced by the array of the same name in `loaded`.

    Args:
      loaded: the parameters of a checkpoint.
      fresh: newly initialised parameters. The arrays of `loaded` must have the same shapes.
      may_be_new: first keys of the paths of arrays that are taken from `fresh`, such as the key of
        the task head. `loaded` may lack these arrays, or have them in other shapes.

    Raises:
      ValueError: an array is missing, extra or of another shape. The message names all such arrays.
    """
    flat_loaded = _flatten(loaded, may_be_new)
    flat_fresh = _flatten(fresh, may_be_new)
    problems = [f"missing {name}" for name in sorted(flat_fresh.keys() - flat_loaded.keys())]
    problems += [f"extra {name}" for name in sorted(flat_loaded.keys() - flat_fresh.keys())]
    problems += [
        f"{name} is {flat_loaded[name].shape}, not {flat_fresh[name].shape}"
        for name in sorted(flat_fresh.keys() & flat_loaded.keys())
        if flat_loaded[name].shape != flat_fresh[name].shape
    ]
    if problems:
        raise ValueError("weights do not fit the model: " + "; ".join(problems))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: flat_loaded.get(jax.tree_util.keystr(path), leaf), fresh
    )


def transfer_layers(params: Params, fresh: Params, count: int) -> Params:
    """Returns `params` with all layers after the first `count` layers taken from `fresh`."""

    def choose(ours: jax.Array, new: jax.Array) -> jax.Array:
        layer = jnp.arange(ours.shape[0]).reshape(-1, *[1] * (ours.ndim - 1))
        return jnp.where(layer < count, ours, new)

    return {**params, BLOCKS: jax.tree.map(choose, params[BLOCKS], fresh[BLOCKS])}


def _flatten(params: Params, skip: tuple[str, ...]) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(p): leaf for p, leaf in leaves if p[0].key not in skip}
