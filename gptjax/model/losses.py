"""Losses as (sum, weight): divided once, globally, so that padding, packing, sharding and
accumulation cannot change the objective.

L3 = L2 + lambda * L1 (Radford et al. 2018, equation 5), each part a mean over its weight.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptjax import mesh as mesh_lib
from gptjax.batch import Batch
from gptjax.config.schema import TaskKind
from gptjax.ops import matmul, sharded

Array = jax.Array

# Logits that a device holds at a time in the LM loss, in elements (128 MiB of float32): in fewer
# the gradient of the embedding goes through an accelerator's memory too often. A CPU has caches.
_LOGITS = 2**25
_LOGITS_OF_CPU = 2**24

_ROWS = P(mesh_lib.BATCH_AXES)


@flax.struct.dataclass
class Sum:
    """A weighted sum and its weight, float32 scalars; add the parts, then divide once."""

    total: Array
    weight: Array

    def __add__(self, other: "Sum") -> "Sum":
        return Sum(self.total + other.total, self.weight + other.weight)


def lm_targets(batch: Batch) -> Array:
    """Returns int32 [B, T]: token t + 1 at t (anything at the end, where the weight is 0)."""
    return jnp.roll(batch.tokens, -1, axis=1)


def lm_chunks(rows: int, length: int, vocabulary: int, limit: int) -> int:
    """Returns into how many pieces of at most `limit` logits the time axis is cut: a divisor."""
    wanted = min(length, math.ceil(rows * length * vocabulary / limit))
    return next(n for n in range(wanted, length + 1) if length % n == 0)


def _chunked(x: Array, chunks: int) -> Array:
    """[B, T, ...] -> [chunks, B, T / chunks, ...]: the batch axis stays whole, and sharded."""
    rows, length = x.shape[:2]
    return jnp.moveaxis(x.reshape(rows, chunks, length // chunks, *x.shape[2:]), 1, 0)


def _chunk_loss(x_BTD: Array, table_VD: Array, targets_BT: Array, weights_BT: Array, size: int):
    """Returns the chunk's loss and what its gradient needs: exponentials, their sums, one-hot.

    `size`: rows of the table on all devices along tensor, each of which has a part; 0: it is whole.
    """
    logits_BTV = matmul.times_transposed(x_BTD, table_VD, 1)
    logits_BTV = jax.lax.optimization_barrier(logits_BTV)
    ids_V = jnp.arange(table_VD.shape[0], dtype=jnp.int32)
    if size:
        ids_V += jax.lax.axis_index("tensor") * table_VD.shape[0]
        logits_BTV = jnp.where((ids_V < size)[None, None], logits_BTV, jnp.finfo(jnp.float32).min)
    largest_BT1 = logits_BTV.max(axis=-1, keepdims=True)
    if size:
        largest_BT1 = jax.lax.pmax(largest_BT1, "tensor")
    hot_BTV = targets_BT[..., None] == ids_V[None, None]
    if size:
        picked_BT = jnp.where(hot_BTV, logits_BTV, 0).sum(-1)
    else:
        picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
    # Computed once, for the sum and for the gradient, and not within the products: on a CPU
    # exponentials are half of the work here.
    exp_BTV = jax.lax.optimization_barrier(jnp.exp(logits_BTV - largest_BT1))
    total_BT = exp_BTV.sum(axis=-1)
    if size:
        total_BT, picked_BT = jax.lax.psum((total_BT, picked_BT), "tensor")
    lse_BT = largest_BT1[..., 0] + jnp.log(total_BT)
    return ((lse_BT - picked_BT) * weights_BT).sum(), (exp_BTV, total_BT, hot_BTV)


def _table(embedding_VD: Array, dtype: jnp.dtype) -> Array:
    """The table in the dtype of the products, in memory: once for all pieces."""
    return jax.lax.optimization_barrier(embedding_VD.astype(dtype))


def _total(x_BTD, embedding_VD, targets_BT, weights_BT, chunks: int, size: int = 0) -> Array:
    table_VD = _table(embedding_VD, x_BTD.dtype)

    def add(total: Array, piece: tuple[Array, ...]) -> tuple[Array, None]:
        x, targets, weights = piece
        return total + _chunk_loss(x, table_VD, targets, weights, size)[0], None

    pieces = tuple(_chunked(a, chunks) for a in (x_BTD, targets_BT, weights_BT))
    return jax.lax.scan(add, jnp.float32(0), pieces)[0]


def _total_and_gradients(x_BTD, embedding_VD, targets_BT, weights_BT, chunks: int, size: int = 0):
    """Returns the loss, d_x [B, T, D] and the table's gradient, float32 [D, V]."""
    dtype = x_BTD.dtype
    table_VD = _table(embedding_VD, dtype)

    def add(carry, piece):
        total, d_table_DV = carry
        x, targets, weights = piece
        loss, (exp, total_exp, hot) = _chunk_loss(x, table_VD, targets, weights, size)
        d_logits = (exp * (weights / total_exp)[..., None] - hot * weights[..., None]).astype(dtype)
        d_logits = jax.lax.optimization_barrier(d_logits)
        d_x = jnp.einsum("BTV,VD->BTD", d_logits, table_VD, preferred_element_type=jnp.float32)
        # [D, V], not [V, D]: of the two factors the smaller one is transposed.
        d_table_DV += matmul.weight_gradient(x, d_logits, 1)
        return (total + loss, d_table_DV), d_x.astype(dtype)

    pieces = tuple(_chunked(a, chunks) for a in (x_BTD, targets_BT, weights_BT))
    start = (jnp.float32(0), jnp.zeros(embedding_VD.shape[::-1], jnp.float32))
    (total, d_table_DV), d_x = jax.lax.scan(add, start, pieces)
    return total, jnp.moveaxis(d_x, 0, 1).reshape(x_BTD.shape), d_table_DV


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def lm_cross_entropy(
    x_BTD: Array, embedding_VD: Array, targets_BT: Array, weights_BT: Array, chunks: int
) -> Array:
    """Returns the sum over t of weight * -log softmax(x E^T)[target], a float32 scalar.

    Works through `chunks` pieces of the time axis and keeps the logits of one at a time. Under
    differentiation the gradients are computed in the forward pass, where the logits are at hand:
    three matrix products a piece, none repeated.

    Args:
      x_BTD: last states, in the dtype of the products.
      embedding_VD: tied output projection, float32; its gradient is float32 too, and not rounded.
      targets_BT: int32 next tokens.
      weights_BT: float32, 0 where nothing is predicted. Not differentiated.
      chunks: a divisor of T, from `lm_chunks`.
    """
    return _total(x_BTD, embedding_VD, targets_BT, weights_BT, chunks)


def _lm_forward(x_BTD, embedding_VD, targets_BT, weights_BT, chunks):
    total, *gradients = _total_and_gradients(x_BTD, embedding_VD, targets_BT, weights_BT, chunks)
    return total, tuple(gradients)


def _lm_backward(chunks, residuals, g):
    d_x_BTD, d_table_DV = residuals
    return (d_x_BTD * g).astype(d_x_BTD.dtype), (d_table_DV * g).T, None, None


lm_cross_entropy.defvjp(_lm_forward, _lm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def lm_cross_entropy_on(
    x_BTD: Array,
    table_NVD: Array,
    targets_BT: Array,
    weights_BT: Array,
    chunks: int,
    mesh: Mesh,
    vocabulary: int,
) -> Array:
    """Returns `lm_cross_entropy` of a batch whose rows and whose vocabulary several devices share.

    Each has its rows' gradient of its part of the table, to be added up outside. What travels here
    are, along tensor, a piece's largest logits and sums of exponentials, and d_x once.

    Args:
      x_BTD, targets_BT, weights_BT, chunks: as there, rows over ('data', 'fsdp').
      table_NVD: from `parallel.copies`.
      mesh: the devices.
      vocabulary: rows of the table before `copies` made them a multiple of tensor.
    """

    def local(x, table, targets, weights):
        total = _total(x, table[0], targets, weights, chunks, _size(mesh, vocabulary))
        return sharded.sum_and_cut(total, P(), mesh)

    inputs = (_ROWS, sharded.COPIES, _ROWS, _ROWS)
    return sharded.mapped(local, mesh, inputs, P())(x_BTD, table_NVD, targets_BT, weights_BT)


def _size(mesh: Mesh, vocabulary: int) -> int:
    return vocabulary if mesh.shape["tensor"] > 1 else 0


def _lm_forward_on(x_BTD, table_NVD, targets_BT, weights_BT, chunks, mesh, vocabulary):
    def local(x, table, targets, weights):
        size = _size(mesh, vocabulary)
        total, d_x, d_table_DV = _total_and_gradients(x, table[0], targets, weights, chunks, size)
        if size:
            d_x = jax.lax.psum(d_x, "tensor")
        return sharded.sum_and_cut(total, P(), mesh), (d_x, d_table_DV[None])

    inputs = (_ROWS, sharded.COPIES, _ROWS, _ROWS)
    outputs = (P(), (_ROWS, P(mesh_lib.BATCH_AXES, None, "tensor")))
    return sharded.mapped(local, mesh, inputs, outputs)(x_BTD, table_NVD, targets_BT, weights_BT)


def _lm_backward_on(chunks, mesh, vocabulary, residuals, g):
    d_x_BTD, d_table_NDV = residuals
    d_table_NVD = (d_table_NDV * g).swapaxes(1, 2)
    return (d_x_BTD * g).astype(d_x_BTD.dtype), d_table_NVD, None, None


lm_cross_entropy_on.defvjp(_lm_forward_on, _lm_backward_on)


def lm_loss(
    x_BTD: Array,
    embedding_VD: Array,
    batch: Batch,
    bias_V: Array | None = None,
    mesh: Mesh | None = None,
    copies_NVD: Array | None = None,
) -> Sum:
    """Returns the LM loss L1 of a batch: sum of weighted nats, sum of the weights.

    Args:
      x_BTD: last states.
      embedding_VD: rows of the output projection (more of them than tokens exist, where the
        softmax covers others too).
      batch: its tokens and lm_weights.
      bias_V: of a projection that is not tied; rounded to the dtype of the products, like the rows.
      mesh: of the devices that share the rows: each may hold as many logits as one alone.
      copies_NVD: `parallel.copies` of the embedding, where they are made already.
    """
    rows, length = batch.tokens.shape
    vocabulary, targets_BT = embedding_VD.shape[0], lm_targets(batch)
    limit = _LOGITS_OF_CPU if mesh_lib.platform(mesh) == "cpu" else _LOGITS
    if not mesh_lib.several(mesh):
        x_BTD, embedding_VD = _with_bias(x_BTD, embedding_VD, bias_V)
        chunks = lm_chunks(rows, length, vocabulary, limit)
        total = lm_cross_entropy(x_BTD, embedding_VD, targets_BT, batch.lm_weights, chunks)
        return Sum(total, batch.lm_weights.sum())
    if copies_NVD is None:
        copies_NVD = sharded.copies(embedding_VD, mesh)
    x_BTD, copies_NVD = _with_bias(x_BTD, copies_NVD, bias_V)
    rows = math.ceil(rows / mesh_lib.batch_divisor(mesh))
    chunks = lm_chunks(rows, length, copies_NVD.shape[1] // mesh.shape["tensor"], limit)
    total = lm_cross_entropy_on(
        x_BTD, copies_NVD, targets_BT, batch.lm_weights, chunks, mesh, vocabulary
    )
    return Sum(total, batch.lm_weights.sum())


def _with_bias(x_BTD: Array, table_VD: Array, bias_V: Array | None) -> tuple[Array, Array]:
    """One more input that is always 1: the losses above need no second kind of gradient."""
    if bias_V is None:
        return x_BTD, table_VD
    column_VD = bias_V[:, None]
    if table_VD.ndim == 3:  # copies, with more rows
        column_VD = jnp.pad(column_VD, ((0, table_VD.shape[1] - len(bias_V)), (0, 0)))[None]
        column_VD = jnp.broadcast_to(column_VD, (*table_VD.shape[:2], 1))
    table_VD = jnp.concatenate([table_VD, column_VD], axis=-1)
    return jnp.concatenate([x_BTD, jnp.ones_like(x_BTD[..., :1])], axis=-1), table_VD


def task_loss(kind: TaskKind, logits: Array, batch: Batch) -> Sum:
    """Returns the task loss L2: cross-entropy over classes or answers, squared error of a target.

    Args:
      kind: as in `TaskSpec.kind`.
      logits: from `GPT.task_logits`, float32 [B, E, O] or [B, E, C].
      batch: its labels, candidate_mask and example_mask.
    """
    if kind == TaskKind.REGRESSION:
        losses_BE = jnp.square(logits[..., 0] - batch.labels)
    else:
        if kind == TaskKind.MULTIPLE_CHOICE:
            # Padding slots have no candidate at all; the floor keeps their softmax finite.
            logits = jnp.where(batch.candidate_mask > 0, logits, jnp.finfo(jnp.float32).min)
        log_probabilities = jax.nn.log_softmax(logits, axis=-1)
        losses_BE = -jnp.take_along_axis(log_probabilities, batch.labels[..., None], -1)[..., 0]
    weights_BE = batch.example_mask
    # `where`, not a product alone: nothing that padding computes may reach the sum or its gradient.
    losses_BE = jnp.where(weights_BE > 0, losses_BE * weights_BE, 0.0)
    return Sum(losses_BE.sum(), weights_BE.sum())
