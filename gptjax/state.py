"""The training state: data only, born sharded."""

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
    """What a checkpoint holds of a training: everything else is a function of the step."""

    step: jax.Array
    """int32 scalar: batches consumed."""
    params: Params
    opt_state: optax.OptState


def create(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def born_sharded(make: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
    """Returns make(*args), every array created where it belongs: none is ever whole anywhere."""
    shapes = jax.eval_shape(make, *args)
    shardings = mesh_lib.state_sharding(shapes, mesh)
    return jax.jit(make, out_shardings=shardings)(*args)


def abstract(make: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
    """Returns the shapes and shardings of make(*args) without computing it."""
    shapes = jax.eval_shape(make, *args)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        mesh_lib.state_sharding(shapes, mesh),
    )


def merge_params(loaded: Params, fresh: Params, may_be_new: tuple[str, ...] = ()) -> Params:
    """Returns `fresh` with every array replaced by the one of the same name in `loaded`.

    Args:
      loaded: arrays of a checkpoint.
      fresh: newly initialised arrays; their shapes must be met.
      may_be_new: first path components that `loaded` may lack or have in excess (a task head).

    Raises:
      ValueError: names every missing, extra and differently shaped array.
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


def keep_layers(params: Params, fresh: Params, count: int) -> Params:
    """Returns `params` with the layers after the first `count` replaced by those of `fresh`."""

    def choose(ours: jax.Array, new: jax.Array) -> jax.Array:
        layer = jnp.arange(ours.shape[0]).reshape(-1, *[1] * (ours.ndim - 1))
        return jnp.where(layer < count, ours, new)

    return {**params, BLOCKS: jax.tree.map(choose, params[BLOCKS], fresh[BLOCKS])}


def _flatten(params: Params, skip: tuple[str, ...]) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(p): leaf for p, leaf in leaves if p[0].key not in skip}
