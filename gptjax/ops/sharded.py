"""Products, look-ups and the vocabulary's table on a mesh, their communication written out.

XLA can place the communication of a sharded program by itself, but where a parameter is cut along
the axis that a product sums over, it may as well cut the activations along that axis and sum every
product over the devices: a hundred times the traffic. So each function here runs on the devices'
own parts (`jax.shard_map`) and says what travels. Rows of a batch lie over ('data', 'fsdp').

- fsdp: a weight is gathered in the compute dtype where it is used, in the forward and again in the
  backward pass; the float32 gradients of the devices' rows are summed and cut (reduce-scatter).
- tensor (Megatron-LM, Shoeybi et al. 2019): of a pair of layers the first is cut by its outputs and
  the second by its inputs; the partial sums of the second, and of the first's input gradient, are
  added up in the compute dtype.
- data: the gradients are summed.

Each is a custom_vjp around the maps, so that JAX differentiates no collective.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptjax import mesh as mesh_lib
from gptjax.mesh import BATCH_AXES
from gptjax.ops import matmul

Array = jax.Array

# Of `copies`.
COPIES = P(BATCH_AXES, "tensor")


def mapped(function: Callable[..., Any], mesh: Mesh, inputs: Any, outputs: Any) -> Any:
    """Returns `function` of the devices' own parts; it may use the names of the mesh's axes."""
    # Whether a result is the same on all devices of an axis is known here, and not always to JAX.
    return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def tensor_only(spec: P) -> P:
    """Returns the layout without its fsdp axes: of a gathered weight, and of activations."""
    return P(*("tensor" if axis == "tensor" else None for axis in spec))


def gather(part: Array, spec: P) -> Array:
    """Returns a device's part of an array of this layout with what its fsdp axis was cut into."""
    if "fsdp" not in spec:
        return part
    return lax.all_gather(part, "fsdp", axis=tuple(spec).index("fsdp"), tiled=True)


def sum_and_cut(whole: Array, spec: P, mesh: Mesh) -> Array:
    """Returns the sum over all rows' devices of `whole`, cut along fsdp as `spec` says."""
    axes = [axis for axis in BATCH_AXES if mesh.shape[axis] > 1]
    if "fsdp" in spec:
        axis = tuple(spec).index("fsdp")
        whole = lax.psum_scatter(whole, "fsdp", scatter_dimension=axis, tiled=True)
        axes.remove("fsdp")
    return lax.psum(whole, tuple(axes)) if axes else whole


def linear(x: Array, kernel: Array, inputs: int, mesh: Mesh | None, name: str) -> Array:
    """Returns x times kernel as `products.linear` does, float32 [B, ..., *features].

    Args:
      x: [B, ..., *inputs], in the dtype of the product.
      kernel: [*inputs, *features], float32, which lies as `sharding` says of its name.
      inputs: how many axes are summed over. What of them is cut along tensor, x must be too, or is
        then; what of the others, the result is.
      mesh: where data * fsdp must divide B; None: one device.
      name: path of the kernel's array.
    """
    if not mesh_lib.several(mesh):
        return matmul.linear(x, kernel, inputs)
    return _linear(x, kernel, inputs, mesh, mesh_lib.parameter_spec(name, kernel.shape, mesh))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _linear(x: Array, kernel: Array, inputs: int, mesh: Mesh, spec: P) -> Array:
    return _linear_forward(x, kernel, inputs, mesh, spec)[0]


def _layouts(x: Array, inputs: int, spec: P) -> tuple[P, P]:
    """Of x and of the result."""
    rows = (BATCH_AXES, *[None] * (x.ndim - inputs - 1))
    axes = tuple(tensor_only(spec))
    return P(*rows, *axes[:inputs]), P(*rows, *axes[inputs:])


def _linear_forward(x: Array, kernel: Array, inputs: int, mesh: Mesh, spec: P):
    def local(x: Array, kernel: Array) -> Array:
        y = matmul.linear(x, gather(kernel.astype(x.dtype), spec), inputs)
        if "tensor" in spec[:inputs]:
            y = lax.psum(y.astype(x.dtype), "tensor").astype(y.dtype)
        return y

    x_spec, y_spec = _layouts(x, inputs, spec)
    return mapped(local, mesh, (x_spec, spec), y_spec)(x, kernel), (x, kernel)


def _linear_backward(inputs: int, mesh: Mesh, spec: P, residuals: tuple[Array, Array], g: Array):
    x, kernel = residuals

    def local(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        whole = gather(kernel.astype(x.dtype), spec)
        d_x = matmul.times_transposed(g, whole, inputs).astype(x.dtype)
        if "tensor" in spec[inputs:]:
            d_x = lax.psum(d_x, "tensor")
        return d_x, sum_and_cut(matmul.weight_gradient(x, g, inputs), spec, mesh)

    x_spec, y_spec = _layouts(x, inputs, spec)
    return mapped(local, mesh, (x_spec, spec, y_spec), (x_spec, spec))(x, kernel, g.astype(x.dtype))


_linear.defvjp(_linear_forward, _linear_backward)


def copies(table_VD: Array, mesh: Mesh | None) -> Array:
    """Returns a copy of a table for each device that has rows of its own: float32 [N, V', D].

    N = data * fsdp, and V' is V, with rows of zeros to a multiple of tensor, over which it is cut.
    A gradient of the copies is a sum over a device's own rows. Whatever uses the table, as an
    embedding and as an LM head, adds to it, and the devices' sums are added up once.

    Args:
      table_VD: float32, in the layout of the token embedding.
      mesh: of more than one device.
    """
    assert mesh is not None
    return _copies(table_VD, mesh, table_VD.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _copies(table_VD: Array, mesh: Mesh, size: int) -> Array:
    spec, parts = _table_spec(table_VD, mesh), mesh.shape["tensor"]

    def local(table: Array) -> Array:
        table = gather(table, spec)
        if "tensor" not in spec and parts > 1:
            rows = -(-size // parts)
            table = jnp.pad(table, ((0, rows * parts - size), (0, 0)))
            table = lax.dynamic_slice_in_dim(table, lax.axis_index("tensor") * rows, rows)
        return table[None]

    return mapped(local, mesh, (spec,), COPIES)(table_VD)


def _table_spec(table: Array, mesh: Mesh) -> P:
    return mesh_lib.parameter_spec("token_embedding", table.shape, mesh)


def _copies_backward(mesh: Mesh, size: int, residuals: None, g_NVD: Array) -> tuple[Array]:
    del residuals
    spec = mesh_lib.parameter_spec("token_embedding", (size, g_NVD.shape[-1]), mesh)

    def local(g: Array) -> Array:
        g = sum_and_cut(g[0], spec, mesh)
        if "tensor" not in spec and mesh.shape["tensor"] > 1:
            g = lax.all_gather(g, "tensor", axis=0, tiled=True)[:size]
        return g

    return (mapped(local, mesh, (COPIES,), spec)(g_NVD),)


_copies.defvjp(lambda *args: (_copies(*args), None), _copies_backward)


def lookup(table_NVD: Array, ids_BT: Array, mesh: Mesh | None) -> Array:
    """Returns rows of a table, float32 [B, T, D].

    Args:
      table_NVD: from `copies`.
      ids_BT: int32 [B, T], each below V.
      mesh: the devices.
    """
    assert mesh is not None
    return _lookup(table_NVD, ids_BT, mesh, table_NVD.shape[1] // mesh.shape["tensor"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lookup(table_NVD: Array, ids_BT: Array, mesh: Mesh, size: int) -> Array:
    def local(table: Array, ids: Array) -> Array:
        found = table[0].at[_places(ids, mesh, size)].get(mode="fill", fill_value=0)
        return lax.psum(found, "tensor") if mesh.shape["tensor"] > 1 else found

    rows = P(BATCH_AXES)
    return mapped(local, mesh, (COPIES, rows), rows)(table_NVD, ids_BT)


def _places(ids: Array, mesh: Mesh, size: int) -> Array:
    """The ids' rows among the `size` of this device; `size` where they are not."""
    if mesh.shape["tensor"] == 1:
        return ids
    at = ids - lax.axis_index("tensor") * size
    return jnp.where((at >= 0) & (at < size), at, size)


def _lookup_backward(mesh: Mesh, size: int, ids_BT: Array, g_BTD: Array) -> tuple[Array, None]:
    def local(ids: Array, g: Array) -> Array:
        zeros = jnp.zeros((size, g.shape[-1]), g.dtype)
        return zeros.at[_places(ids, mesh, size)].add(g, mode="drop")[None]

    rows = P(BATCH_AXES)
    return mapped(local, mesh, (rows, rows), COPIES)(ids_BT, g_BTD), None


_lookup.defvjp(lambda table, ids, *args: (_lookup(table, ids, *args), ids), _lookup_backward)


def logits(x_BTD: Array, rows_VD: Array, mesh: Mesh | None) -> Array:
    """Returns x times the rows of a table, float32 [B, T, V], cut along tensor. Not differentiable.

    Args:
      x_BTD: states, in the dtype of the product.
      rows_VD: of that dtype, in the layout of the token embedding.
      mesh: where data * fsdp must divide B; None: one device.
    """
    if not mesh_lib.several(mesh):
        return matmul.times_transposed(x_BTD, rows_VD, 1)

    def local(x: Array, table: Array) -> Array:
        return matmul.times_transposed(x, table[0], 1)

    inputs, output = (P(BATCH_AXES), COPIES), P(BATCH_AXES, None, "tensor")
    logits_BTV = mapped(local, mesh, inputs, output)(x_BTD, copies(rows_VD, mesh))
    return logits_BTV[..., : len(rows_VD)]
