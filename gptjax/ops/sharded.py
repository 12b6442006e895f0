"""The model's operations on a mesh of devices, with explicit communication.

XLA can choose the communication of a sharded program by itself. However, if a matrix product sums
over a sharded axis of a parameter, XLA might shard the activations over that axis too, and then sum
the result of every product over the devices. That is a hundred times the traffic. Therefore the
functions in this file run on each device's own part of the arrays (`jax.shard_map`) and call the
collectives explicitly.

The mesh has the axes `data`, `fsdp` and `tensor`. The rows of a batch are sharded over `data` and
`fsdp`. The axes differ in the sharding of the weights:

- `fsdp`: the weight matrices and the token embedding are sharded. An all-gather in the compute
  dtype collects a weight matrix before its use, in the forward pass and again in the backward pass.
  `replicate_table` gathers the table in its own dtype. A reduce-scatter sums the float32 gradients
  of the devices, and each device keeps its part of the sum.
- `tensor` (Megatron-LM, Shoeybi et al. 2019): of each pair of linear layers, the first layer is
  sharded over its outputs and the second layer over its inputs. Two kinds of partial sums are added
  up in the compute dtype: the outputs of the second layer, and the gradients of the inputs of the
  first layer.
- `data`: the weights are not sharded. Only the gradients are summed over the devices.

Each operation is a `custom_vjp` around `shard_map`, so that JAX does not differentiate collectives.
The table is the token embedding or the weight matrix of the LM head, [V, D].
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

# Three partition specs: of an array whose first axis is the rows of a batch, of a replicated table
# [N, V', D], and of the inputs of the cross-entropy.
_ROWS = P(BATCH_AXES)
_REPLICATED_TABLE = P(BATCH_AXES, "tensor")
_LM_LAYOUT = LMInputs(_ROWS, _REPLICATED_TABLE, _ROWS, _ROWS)


@dataclasses.dataclass(frozen=True)
class ShardedOps:
    """The operations of the model that need communication on several devices.

    On a single device they call `gptjax.ops.matmul` and `gptjax.ops.cross_entropy`.
    """

    mesh: Mesh | None = None
    """The devices. The product data * fsdp must divide the number of rows of a batch. None means a
    single device."""

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
          kernel: the weight matrix, float32 [*inputs, *features], sharded according to
            `gptjax.parameters`. If an input axis of the kernel is sharded over `tensor`, x is
            resharded in the same way. If a feature axis of the kernel is sharded over `tensor`, the
            result is sharded in the same way.
          inputs: the number of axes that are summed over.
          path: the path of the kernel in the parameter tree.
        """
        if not mesh_lib.is_sharded(self.mesh):
            return matmul.linear(x, kernel, inputs)
        spec = mesh_lib.parameter_spec(path, kernel.shape, self.mesh)
        return _linear(x, kernel, inputs, self.mesh, spec)

    def replicate_table(self, table_VD: Array) -> Array:
        """Returns N = data * fsdp copies of a table. Only for several devices.

        The devices along `tensor` are a group that computes the same rows of a batch. Each of the N
        groups has one copy of the table, divided between its devices.

        The embedding and a tied LM head should use the same result. The gradients of both uses are
        then added up on each device first, so they are summed over the devices only once.

        Args:
          table_VD: the table, float32, sharded like the token embedding.

        Returns:
          float32 [N, V', D]. V' is V rounded up to a multiple of `tensor`, and the added rows are
          zeros. The axis N is sharded over `data` and `fsdp`, and the axis V' over `tensor`.
        """
        assert self.mesh is not None
        return _replicate_table(table_VD, self.mesh, table_VD.shape[0])

    def lookup(self, replicated_NVD: Array, ids_BT: Array) -> Array:
        """Returns rows of a table, float32 [B, T, D]. Only for several devices.

        Args:
          replicated_NVD: the table, from `replicate_table`.
          ids_BT: int32, the indices of the rows.
        """
        assert self.mesh is not None
        rows = replicated_NVD.shape[1] // self.mesh.shape["tensor"]
        return _lookup(replicated_NVD, ids_BT, self.mesh, rows)

    def logits(self, x_BTD: Array, table_VD: Array) -> Array:
        """Returns x table^T, float32 [B, T, V]. On several devices it is not differentiable.

        Args:
          x_BTD: the hidden states, in the dtype of the product.
          table_VD: the table, in the dtype of the product, sharded like the token embedding.
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
          x_BTD: the hidden states, in the dtype of the matrix products.
          head: the weights of the LM head, which computes the logits.
          targets_BT: int32, the tokens to predict.
          weights_BT: float32, the weight of each token's loss. It is 0 if nothing is predicted at
            this position. It has no gradient.
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
    """Returns an array without its sharding over `fsdp`, by an all-gather of the devices' parts.

    If `spec`, the partition spec of the array, does not contain `fsdp`, `part` is returned.
    """
    if "fsdp" not in spec:
        return part
    return lax.all_gather(part, "fsdp", axis=tuple(spec).index("fsdp"), tiled=True)


def _reduce(gradient: Array, spec: P, mesh: Mesh) -> Array:
    """Returns the sum of the devices' gradients over the mesh axes `data` and `fsdp`.

    Args:
      gradient: the gradient that this device computed from its rows of the batch. It is not sharded
        over `fsdp`.
      spec: the partition spec of the parameter. If it contains `fsdp`, each device gets only its
        part of the sum.
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
    """Computes `ShardedOps.linear`; `spec` is the partition spec of the kernel."""
    return _linear_forward(x, kernel, inputs, mesh, spec)[0]


def _linear_specs(x: Array, inputs: int, spec: P) -> tuple[P, P]:
    """Returns the partition specs of x and of the result of `_linear`.

    The rows are sharded over `data` and `fsdp`. An input or feature axis is sharded over `tensor`
    if this axis of the kernel is.
    """
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
    """Computes `ShardedOps.lookup`; `rows` is the number of the table's rows on each device."""

    def local(table: Array, ids: Array) -> Array:
        found = table[0].at[_local_ids(ids, mesh, rows)].get(mode="fill", fill_value=0)
        return lax.psum(found, "tensor") if mesh.shape["tensor"] > 1 else found

    return mesh_lib.on_each_device(local, mesh, (_REPLICATED_TABLE, _ROWS), _ROWS)(
        replicated_NVD, ids_BT
    )


def _local_ids(ids: Array, mesh: Mesh, rows: int) -> Array:
    """Returns the index of each id's row in this device's part of the table.

    If the row of an id is on another device, the index is `rows`, which is out of range.
    """
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

    Each device along `tensor` has a part of the table's rows. For each piece these devices exchange
    the largest logits, the sums of exponentials and the logits of the targets. They also sum the
    gradients of x if the function is differentiated.

    Args:
      inputs: the arrays, with a replicated table [N, V', D].
      pieces: the number of pieces into which the rows are divided along T.
      mesh: the devices.
      vocab_size: V if the table is sharded over `tensor`; otherwise None.
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
