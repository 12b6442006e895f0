"""The model's operations on a mesh of devices, with explicit communication.

XLA can choose the communication of a sharded program by itself. But where a parameter is sharded
over an axis that a matrix product sums over, XLA may shard the activations over that axis too, and
sum the result of every product over the devices: a hundred times the traffic. Therefore the
functions here run on each device's own part of the arrays (`jax.shard_map`) and call the
collectives themselves. The rows of a batch are sharded over `data` and `fsdp`. In addition:

- Over `fsdp` every weight is sharded. It is gathered in the compute dtype before it is used, in the
  forward pass and again in the backward pass. The float32 gradients of the devices are summed, and
  each device keeps its part of the sum (a reduce-scatter).
- Over `tensor` (Megatron-LM, Shoeybi et al. 2019) the first layer of each pair is sharded over its
  outputs, and the second over its inputs. The partial sums of the second layer's outputs, and of
  the first layer's input gradients, are added up in the compute dtype.
- Over `data` only gradients are summed.

Each operation is a `custom_vjp` around `shard_map`, so that JAX does not differentiate collectives.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptjax import mesh as mesh_lib
from gptjax.mesh import BATCH_AXES
from gptjax.ops import cross_entropy, matmul
from gptjax.ops.cross_entropy import LMHeadWeights, LMInputs
from gptjax.parameters import TOKEN_EMBEDDING

Array = jax.Array

# Layouts of arrays whose first axis is the rows of a batch, and of a replicated table [N, V', D].
_ROWS = P(BATCH_AXES)
_REPLICATED_TABLE = P(BATCH_AXES, "tensor")
_LM_LAYOUT = LMInputs(_ROWS, _REPLICATED_TABLE, _ROWS, _ROWS)


@dataclasses.dataclass(frozen=True)
class ShardedOps:
    """The operations of the model whose communication depends on the mesh.

    On a single device they are the operations of `gptjax.ops.matmul` and
    `gptjax.ops.cross_entropy`.
    """

    mesh: Mesh | None = None
    """The devices; data * fsdp must divide the rows of a batch. None: a single device."""

    @property
    def is_sharded(self) -> bool:
        """Whether there are several devices."""
        return mesh_lib.is_sharded(self.mesh)

    @property
    def platform(self) -> str:
        """The platform of the devices: "cpu", "gpu" or "tpu"."""
        return mesh_lib.platform(self.mesh)

    def linear(self, x: Array, kernel: Array, inputs: int, path: str) -> Array:
        """Returns x kernel, float32 [B, ..., *features].

        Args:
          x: [B, ..., *inputs], in the dtype of the product.
          kernel: float32 [*inputs, *features], in its layout of `gptjax.parameters`. If an axis of
            its inputs is sharded over `tensor`, x is resharded to match; if an axis of its features
            is, the result is sharded over it.
          inputs: number of axes that are summed over.
          path: of the kernel in the parameter tree.
        """
        if not mesh_lib.is_sharded(self.mesh):
            return matmul.linear(x, kernel, inputs)
        spec = mesh_lib.parameter_spec(path, kernel.shape, self.mesh)
        return _linear(x, kernel, inputs, self.mesh, spec)

    def replicate_table(self, table_VD: Array) -> Array:
        """Returns a copy of a table for each group of devices that computes its own rows.

        Only for several devices. All uses of the table, as an embedding and as the LM head, should
        share one result: then the gradients of all uses are added up on each device first, and over
        the devices once.

        Args:
          table_VD: float32, in the layout of the token embedding.

        Returns:
          float32 [N, V', D], one copy for each of N = data * fsdp. V' is V, plus rows of zeros up
          to a multiple of `tensor`, over which the axis is sharded.
        """
        assert self.mesh is not None
        return _replicate_table(table_VD, self.mesh, table_VD.shape[0])

    def lookup(self, replicated_NVD: Array, ids_BT: Array) -> Array:
        """Returns rows of a table, float32 [B, T, D]. Only for several devices.

        Args:
          replicated_NVD: from `replicate_table`.
          ids_BT: int32, numbers of rows.
        """
        assert self.mesh is not None
        rows = replicated_NVD.shape[1] // self.mesh.shape["tensor"]
        return _lookup(replicated_NVD, ids_BT, self.mesh, rows)

    def logits(self, x_BTD: Array, table_VD: Array) -> Array:
        """Returns x table^T, float32 [B, T, V]. Has no gradient on several devices.

        Args:
          x_BTD: states, in the dtype of the product.
          table_VD: in that dtype, in the layout of the token embedding.
        """
        if not mesh_lib.is_sharded(self.mesh):
            return matmul.matmul_transposed(x_BTD, table_VD, 1)

        def local(x: Array, table: Array) -> Array:
            return matmul.matmul_transposed(x, table[0], 1)

        in_specs, out_spec = (_ROWS, _REPLICATED_TABLE), P(BATCH_AXES, None, "tensor")
        run = mesh_lib.on_each_device(local, self.mesh, in_specs, out_spec)
        return run(x_BTD, self.replicate_table(table_VD))[..., : len(table_VD)]

    def cross_entropy(
        self, x_BTD: Array, head: LMHeadWeights, targets_BT: Array, weights_BT: Array
    ) -> Array:
        """Returns the sum over b and t of weight * -log softmax(logits)[target], a float32 scalar.

        Args:
          x_BTD: states, in the dtype of the matrix products.
          head: the weights that make logits of them.
          targets_BT: int32, the tokens to predict.
          weights_BT: float32, 0 where nothing is predicted; has no gradient.
        """
        rows, length = targets_BT.shape
        vocab_size, limit = head.table_VD.shape[0], cross_entropy.max_logits(self.platform)
        if not mesh_lib.is_sharded(self.mesh):
            x_BTD, table_VD = cross_entropy.add_bias_column(x_BTD, head.table_VD, head.bias_V)
            pieces = cross_entropy.num_pieces(rows, length, vocab_size, limit)
            inputs = LMInputs(x_BTD, table_VD, targets_BT, weights_BT)
            return cross_entropy.cross_entropy(inputs, pieces)
        table_NVD = head.replicated_NVD
        if table_NVD is None:
            table_NVD = self.replicate_table(head.table_VD)
        x_BTD, table_NVD = cross_entropy.add_bias_column(x_BTD, table_NVD, head.bias_V)
        rows = math.ceil(rows / mesh_lib.batch_divisor(self.mesh))
        tensor = self.mesh.shape["tensor"]
        pieces = cross_entropy.num_pieces(rows, length, table_NVD.shape[1] // tensor, limit)
        inputs = LMInputs(x_BTD, table_NVD, targets_BT, weights_BT)
        return _cross_entropy(inputs, pieces, self.mesh, vocab_size if tensor > 1 else None)


def _gather(part: Array, spec: P) -> Array:
    """Returns the parts of all devices along `fsdp`, joined; of an array with this layout."""
    if "fsdp" not in spec:
        return part
    return lax.all_gather(part, "fsdp", axis=tuple(spec).index("fsdp"), tiled=True)


def _reduce(gradient: Array, spec: P, mesh: Mesh) -> Array:
    """Returns the sum of the devices' gradients over the batch axes.

    Args:
      gradient: of the array without its sharding over `fsdp`, from the rows of this device.
      spec: layout of the array; where it names `fsdp`, a device gets its part of the sum only.
      mesh: the devices.
    """
    axes = [axis for axis in BATCH_AXES if mesh.shape[axis] > 1]
    if "fsdp" in spec:
        axis = tuple(spec).index("fsdp")
        gradient = lax.psum_scatter(gradient, "fsdp", scatter_dimension=axis, tiled=True)
        axes.remove("fsdp")
    return lax.psum(gradient, tuple(axes)) if axes else gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _linear(x: Array, kernel: Array, inputs: int, mesh: Mesh, spec: P) -> Array:
    """Computes `ShardedOps.linear`; `spec` is the layout of the kernel."""
    return _linear_forward(x, kernel, inputs, mesh, spec)[0]


def _linear_specs(x: Array, inputs: int, spec: P) -> tuple[P, P]:
    """Returns the layouts of x and of the result: rows of the batch, and the kernel's `tensor`."""
    rows = (BATCH_AXES, *[None] * (x.ndim - inputs - 1))
    axes = tuple("tensor" if axis == "tensor" else None for axis in spec)
    return P(*rows, *axes[:inputs]), P(*rows, *axes[inputs:])


def _linear_forward(
    x: Array, kernel: Array, inputs: int, mesh: Mesh, spec: P
) -> tuple[Array, tuple[Array, Array]]:
    def local(x: Array, kernel: Array) -> Array:
        y = matmul.linear(x, _gather(kernel.astype(x.dtype), spec), inputs)
        if "tensor" in spec[:inputs]:
            y = lax.psum(y.astype(x.dtype), "tensor").astype(y.dtype)
        return y

    x_spec, y_spec = _linear_specs(x, inputs, spec)
    return mesh_lib.on_each_device(local, mesh, (x_spec, spec), y_spec)(x, kernel), (x, kernel)


def _linear_backward(
    inputs: int, mesh: Mesh, spec: P, residuals: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, kernel = residuals

    def local(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        gathered = _gather(kernel.astype(x.dtype), spec)
        d_x = matmul.matmul_transposed(g, gathered, inputs).astype(x.dtype)
        if "tensor" in spec[inputs:]:
            d_x = lax.psum(d_x, "tensor")
        return d_x, _reduce(matmul.weight_gradient(x, g, inputs), spec, mesh)

    x_spec, y_spec = _linear_specs(x, inputs, spec)
    run = mesh_lib.on_each_device(local, mesh, (x_spec, spec, y_spec), (x_spec, spec))
    return run(x, kernel, g.astype(x.dtype))


_linear.defvjp(_linear_forward, _linear_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _replicate_table(table_VD: Array, mesh: Mesh, vocab_size: int) -> Array:
    """Computes `ShardedOps.replicate_table`."""
    spec = mesh_lib.parameter_spec(TOKEN_EMBEDDING, table_VD.shape, mesh)
    tensor = mesh.shape["tensor"]

    def local(table: Array) -> Array:
        table = _gather(table, spec)
        if "tensor" not in spec and tensor > 1:
            rows = -(-vocab_size // tensor)
            table = jnp.pad(table, ((0, rows * tensor - vocab_size), (0, 0)))
            table = lax.dynamic_slice_in_dim(table, lax.axis_index("tensor") * rows, rows)
        return table[None]

    return mesh_lib.on_each_device(local, mesh, (spec,), _REPLICATED_TABLE)(table_VD)


def _replicate_table_backward(
    mesh: Mesh, vocab_size: int, residuals: None, g_NVD: Array
) -> tuple[Array]:
    del residuals
    spec = mesh_lib.parameter_spec(TOKEN_EMBEDDING, (vocab_size, g_NVD.shape[-1]), mesh)

    def local(g: Array) -> Array:
        g = _reduce(g[0], spec, mesh)
        if "tensor" not in spec and mesh.shape["tensor"] > 1:
            g = lax.all_gather(g, "tensor", axis=0, tiled=True)[:vocab_size]
        return g

    return (mesh_lib.on_each_device(local, mesh, (_REPLICATED_TABLE,), spec)(g_NVD),)


_replicate_table.defvjp(lambda *args: (_replicate_table(*args), None), _replicate_table_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lookup(replicated_NVD: Array, ids_BT: Array, mesh: Mesh, rows: int) -> Array:
    """Computes `ShardedOps.lookup`; `rows` is the number of rows of the table on each device."""

    def local(table: Array, ids: Array) -> Array:
        found = table[0].at[_local_ids(ids, mesh, rows)].get(mode="fill", fill_value=0)
        return lax.psum(found, "tensor") if mesh.shape["tensor"] > 1 else found

    return mesh_lib.on_each_device(local, mesh, (_REPLICATED_TABLE, _ROWS), _ROWS)(
        replicated_NVD, ids_BT
    )


def _local_ids(ids: Array, mesh: Mesh, rows: int) -> Array:
    """Returns the ids as numbers of this device's rows; `rows` for the rows of other devices."""
    if mesh.shape["tensor"] == 1:
        return ids
    local = ids - lax.axis_index("tensor") * rows
    return jnp.where((local >= 0) & (local < rows), local, rows)


def _lookup_backward(mesh: Mesh, rows: int, ids_BT: Array, g_BTD: Array) -> tuple[Array, None]:
    def local(ids: Array, g: Array) -> Array:
        zeros = jnp.zeros((rows, g.shape[-1]), g.dtype)
        return zeros.at[_local_ids(ids, mesh, rows)].add(g, mode="drop")[None]

    return mesh_lib.on_each_device(local, mesh, (_ROWS, _ROWS), _REPLICATED_TABLE)(
        ids_BT, g_BTD
    ), None


_lookup.defvjp(lambda table, ids, *args: (_lookup(table, ids, *args), ids), _lookup_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _cross_entropy(inputs: LMInputs, pieces: int, mesh: Mesh, vocab_size: int | None) -> Array:
    """Computes `ShardedOps.cross_entropy` from a replicated table.

    The devices along `tensor` have some rows of the table each. They exchange each piece's largest
    logits and sums of exponentials, and in the backward pass they add up the gradients of x.

    Args:
      inputs: the arrays.
      pieces: of the sequence.
      mesh: the devices.
      vocab_size: the vocabulary size if the devices along `tensor` share the vocabulary, else None.
    """

    def local(inputs: LMInputs) -> Array:
        own = inputs.replace(table=inputs.table[0])  # type: ignore[attr-defined]
        return _reduce(cross_entropy.total_loss(own, pieces, vocab_size), P(), mesh)

    return mesh_lib.on_each_device(local, mesh, (_LM_LAYOUT,), P())(inputs)


def _cross_entropy_forward(
    inputs: LMInputs, pieces: int, mesh: Mesh, vocab_size: int | None
) -> tuple[Array, tuple[Array, Array]]:
    def local(inputs: LMInputs) -> Any:
        own = inputs.replace(table=inputs.table[0])  # type: ignore[attr-defined]
        total, d_x, d_table_DV = cross_entropy.total_loss_and_gradients(own, pieces, vocab_size)
        if vocab_size is not None:
            d_x = lax.psum(d_x, "tensor")
        return _reduce(total, P(), mesh), (d_x, d_table_DV[None])

    out_specs = (P(), (_ROWS, P(BATCH_AXES, None, "tensor")))
    return mesh_lib.on_each_device(local, mesh, (_LM_LAYOUT,), out_specs)(inputs)


def _cross_entropy_backward(
    pieces: int, mesh: Mesh, vocab_size: int | None, residuals: tuple[Array, Array], g: Array
) -> tuple[LMInputs]:
    d_x_BTD, d_table_NDV = residuals
    d_table_NVD = (d_table_NDV * g).swapaxes(1, 2)
    return (LMInputs((d_x_BTD * g).astype(d_x_BTD.dtype), d_table_NVD, None, None),)


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
