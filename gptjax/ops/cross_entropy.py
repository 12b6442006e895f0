"""The language model's cross-entropy, computed for one piece of the sequence at a time.

With a vocabulary of 40,000 the logits of a batch need more memory than all other arrays. Therefore
the rows are divided along T into pieces, and only the logits of one piece exist at a time. The
functions in this file compute on a single device. `gptjax.ops.sharded` calls them on each of
several devices.

The table is the weight matrix of the LM head [V, D]. A replicated table [N, V', D] has one copy of
the table for each of N groups of devices (see `ShardedOps.replicate_table`).
"""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gptjax.ops import matmul

Array = jax.Array

# The largest number of logits in a piece. 2^25 logits take 128 MiB in float32. Each piece reads and
# writes the float32 gradient of the whole table, so small pieces are slow on a GPU or TPU. On a CPU
# pieces of half this size are faster, because a CPU has caches.
_MAX_LOGITS = 2**25
_MAX_LOGITS_ON_CPU = 2**24


@flax.struct.dataclass
class LMHeadWeights:
    """The weights of the LM head: the logits are x table^T + bias."""

    table_VD: Array
    """float32. It has a row for each output of the softmax. With `ModelConfig.one_matrix` these
    outputs are the tokens and the positions."""
    bias_V: Array | None = None
    """float32. The loss rounds it to the dtype of the matrix products. None means no bias."""
    replicated_NVD: Array | None = None
    """The result of `ShardedOps.replicate_table`. None means that it is not yet computed."""


@flax.struct.dataclass
class LMInputs:
    """The arrays of a cross-entropy. The class also holds their partition specs and gradients."""

    x_BTD: Any
    """The hidden states, in the dtype of the matrix products."""
    table: Any
    """float32 [V, D], or a replicated table [N, V', D]. Its gradient is float32, not rounded."""
    targets_BT: Any
    """int32, the tokens to predict."""
    weights_BT: Any
    """float32, the weight of each token's loss. It is 0 if nothing is predicted at this position.
    It has no gradient."""


_Piece = tuple[Array, Array, Array]
"""The hidden states, targets and weights of a piece of the sequence."""


def max_logits(platform: str) -> int:
    """Returns the largest number of logits that a device should compute at a time."""
    return _MAX_LOGITS_ON_CPU if platform == "cpu" else _MAX_LOGITS


def num_pieces(rows: int, length: int, vocab_size: int, limit: int) -> int:
    """Returns the number of pieces into which the rows of a batch are divided along T.

    It is the smallest divisor of `length` with which a piece has at most `limit` logits. If even a
    piece with one token of each row has more logits, the result is `length`.
    """
    wanted = min(length, math.ceil(rows * length * vocab_size / limit))
    return next(n for n in range(wanted, length + 1) if length % n == 0)


def _split(inputs: LMInputs, pieces: int) -> _Piece:
    """Returns the pieces of the hidden states, targets and weights.

    Each array is reshaped: [B, T, ...] -> [pieces, B, T / pieces, ...]. No row moves to another
    device.
    """

    def split(x: Array) -> Array:
        rows, length = x.shape[:2]
        return jnp.moveaxis(x.reshape(rows, pieces, length // pieces, *x.shape[2:]), 1, 0)

    return split(inputs.x_BTD), split(inputs.targets_BT), split(inputs.weights_BT)


def _piece_loss(
    x_BTD: Array, targets_BT: Array, weights_BT: Array, table_VD: Array, vocab_size: int | None
) -> tuple[Array, tuple[Array, Array, Array]]:
    """Computes the loss of a piece of the sequence.

    Args:
      x_BTD, targets_BT, weights_BT: the hidden states, targets and weights of the piece.
      table_VD: the whole table, or the rows of the table that are on this device.
      vocab_size: None means that `table_VD` is the whole table. Otherwise the rows of the table are
        sharded over `tensor`, and this is the number of rows of the whole table without padding.

    Returns:
      The loss, and three arrays for its gradient: exp(logits - largest logit) [B, T, V], the sum of
      this array over the whole vocabulary [B, T], and the one-hot targets, bool [B, T, V].
    """
    logits_BTV = matmul.matmul_transposed(x_BTD, table_VD, 1)
    logits_BTV = jax.lax.optimization_barrier(logits_BTV)
    ids_V = jnp.arange(table_VD.shape[0], dtype=jnp.int32)
    if vocab_size is not None:
        ids_V += jax.lax.axis_index("tensor") * table_VD.shape[0]
        is_token = (ids_V < vocab_size)[None, None]
        logits_BTV = jnp.where(is_token, logits_BTV, jnp.finfo(jnp.float32).min)
    largest_BT1 = logits_BTV.max(axis=-1, keepdims=True)
    if vocab_size is not None:
        largest_BT1 = jax.lax.pmax(largest_BT1, "tensor")
    one_hot_BTV = targets_BT[..., None] == ids_V[None, None]
    if vocab_size is not None:
        picked_BT = jnp.where(one_hot_BTV, logits_BTV, 0).sum(-1)
    else:
        picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
    # On a CPU the exponentials take half of the time of this function. The barrier makes XLA
    # compute them once. Otherwise each matrix product of the gradient would compute them again.
    exp_BTV = jax.lax.optimization_barrier(jnp.exp(logits_BTV - largest_BT1))
    sum_BT = exp_BTV.sum(axis=-1)
    if vocab_size is not None:
        sum_BT, picked_BT = jax.lax.psum((sum_BT, picked_BT), "tensor")
    lse_BT = largest_BT1[..., 0] + jnp.log(sum_BT)
    return ((lse_BT - picked_BT) * weights_BT).sum(), (exp_BTV, sum_BT, one_hot_BTV)


def _cast_table(inputs: LMInputs) -> Array:
    """Returns the table in the dtype of the matrix products.

    The barrier makes XLA store the result. Otherwise XLA could convert the table for each piece.
    """
    return jax.lax.optimization_barrier(inputs.table.astype(inputs.x_BTD.dtype))


def total_loss(inputs: LMInputs, pieces: int, vocab_size: int | None = None) -> Array:
    """Returns the loss of `cross_entropy`, without its gradient.

    Args:
      inputs: the arrays. The table is [V, D], or the rows of it that are on this device.
      pieces: the number of pieces.
      vocab_size: None means that `inputs.table` is the whole table. Otherwise the rows of the table
        are sharded over `tensor`, and this is the number of rows of the whole table.
    """
    cast_VD = _cast_table(inputs)

    def add(total: Array, piece: _Piece) -> tuple[Array, None]:
        return total + _piece_loss(*piece, cast_VD, vocab_size)[0], None

    return jax.lax.scan(add, jnp.float32(0), _split(inputs, pieces))[0]


def total_loss_and_gradients(
    inputs: LMInputs, pieces: int, vocab_size: int | None = None
) -> tuple[Array, Array, Array]:
    """Returns the loss, the gradient of x [B, T, D], and the gradient of the table, float32 [D, V].

    The arguments are the arguments of `total_loss`.
    """
    dtype, cast_VD = inputs.x_BTD.dtype, _cast_table(inputs)

    def add(carry: tuple[Array, Array], piece: _Piece) -> tuple[tuple[Array, Array], Array]:
        total, d_table_DV = carry
        x, _, weights = piece
        loss, (exp, sum_exp, one_hot) = _piece_loss(*piece, cast_VD, vocab_size)
        d_logits = exp * (weights / sum_exp)[..., None] - one_hot * weights[..., None]
        d_logits = jax.lax.optimization_barrier(d_logits.astype(dtype))
        d_x = jnp.einsum("BTV,VD->BTD", d_logits, cast_VD, preferred_element_type=jnp.float32)
        # On a CPU `weight_gradient` transposes the smaller factor, which is x, and so it computes
        # [D, V]. To return [V, D] it would have to transpose this large result too.
        d_table_DV += matmul.weight_gradient(x, d_logits, 1)
        return (total + loss, d_table_DV), d_x.astype(dtype)

    split = _split(inputs, pieces)
    start = (jnp.float32(0), jnp.zeros(inputs.table.shape[::-1], jnp.float32))
    (total, d_table_DV), d_x = jax.lax.scan(add, start, split)
    return total, jnp.moveaxis(d_x, 0, 1).reshape(inputs.x_BTD.shape), d_table_DV


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def cross_entropy(inputs: LMInputs, pieces: int) -> Array:
    """Returns the sum over b and t of weight * -log softmax(x table^T)[target], a float32 scalar.

    When this function is differentiated, the forward pass also computes the gradients, because it
    has the logits of each piece. A piece then needs three matrix products, and none is repeated.

    Args:
      inputs: the arrays; the table is [V, D].
      pieces: the number of pieces into which the rows are divided along T, from `num_pieces`.
    """
    return total_loss(inputs, pieces)


def _forward(inputs: LMInputs, pieces: int) -> tuple[Array, tuple[Array, Array]]:
    total, d_x_BTD, d_table_DV = total_loss_and_gradients(inputs, pieces)
    return total, (d_x_BTD, d_table_DV)


def _backward(pieces: int, residuals: tuple[Array, Array], g: Array) -> tuple[LMInputs]:
    d_x_BTD, d_table_DV = residuals
    return (LMInputs((d_x_BTD * g).astype(d_x_BTD.dtype), (d_table_DV * g).T, None, None),)


cross_entropy.defvjp(_forward, _backward)


def add_bias_column(x_BTD: Array, table: Array, bias_V: Array | None) -> tuple[Array, Array]:
    """Appends the bias to the table as a column, and the number 1 to each hidden state.

    The product of both then includes the bias, so the losses in this file need no separate gradient
    of the bias.

    Args:
      x_BTD: the hidden states.
      table: the table [V, D], or a replicated table [N, V', D].
      bias_V: the bias of the LM head. None means that nothing is changed.
    """
    if bias_V is None:
        return x_BTD, table
    column_VD = bias_V[:, None]
    if table.ndim == 3:
        # A replicated table has V' rows. The rows after the first V rows are padding.
        column_VD = jnp.pad(column_VD, ((0, table.shape[1] - len(bias_V)), (0, 0)))[None]
        column_VD = jnp.broadcast_to(column_VD, (*table.shape[:2], 1))
    table = jnp.concatenate([table, column_VD], axis=-1)
    return jnp.concatenate([x_BTD, jnp.ones_like(x_BTD[..., :1])], axis=-1), table
