"""The language model's cross-entropy, computed for one piece of the sequence at a time.

With a vocabulary of 40,000 the logits of a batch need more memory than everything else. Therefore
only the logits of one piece exist at a time. This file has the computation on a single device;
`gptjax.ops.sharded` runs it on several.
"""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gptjax.ops import matmul

Array = jax.Array

# The most logits of a piece. 2^25 are 128 MiB of float32. Each piece reads and writes the float32
# gradient of the whole table, so that small pieces are slow on an accelerator. On a CPU pieces of
# half this size are faster, because of its caches.
_MAX_LOGITS = 2**25
_MAX_LOGITS_ON_CPU = 2**24


@flax.struct.dataclass
class LMHeadWeights:
    """The weights of the LM head: the logits are x table^T + bias."""

    table_VD: Array
    """float32; more rows than there are tokens if the softmax covers other outputs too."""
    bias_V: Array | None = None
    """float32; rounded to the dtype of the matrix products. None: no bias."""
    replicated_NVD: Array | None = None
    """The table as `ShardedOps.replicate_table` returns it, if that has been computed already."""


@flax.struct.dataclass
class LMInputs:
    """The arrays of a cross-entropy. The same class also has their layouts and gradients."""

    x_BTD: Any
    """States, in the dtype of the matrix products."""
    table: Any
    """float32 [V, D], or replicated [N, V', D]. Its gradient is float32 and is not rounded."""
    targets_BT: Any
    """int32, the tokens to predict."""
    weights_BT: Any
    """float32, 0 where nothing is predicted; has no gradient."""


_Piece = tuple[Array, Array, Array]
"""States, targets and weights of a piece of the sequence."""


def max_logits(platform: str) -> int:
    """Returns how many logits a device computes at a time."""
    return _MAX_LOGITS_ON_CPU if platform == "cpu" else _MAX_LOGITS


def num_pieces(rows: int, length: int, vocab_size: int, limit: int) -> int:
    """Returns the smallest divisor of `length` whose pieces have at most `limit` logits.

    If even pieces of a single token have more, the result is `length`.
    """
    wanted = min(length, math.ceil(rows * length * vocab_size / limit))
    return next(n for n in range(wanted, length + 1) if length % n == 0)


def _split(inputs: LMInputs, pieces: int) -> _Piece:
    """Returns the pieces of the states, targets and weights; the rows stay on their devices.

    [B, T, ...] -> [pieces, B, T / pieces, ...]
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
      x_BTD, targets_BT, weights_BT: the piece.
      table_VD: the table, or this device's rows of it.
      vocab_size: None if `table_VD` is the whole table. If each device along `tensor` has a part of
        the rows: the number of rows of the whole table, without its padding.

    Returns:
      The loss, and for its gradient: exp(logits - largest) [B, T, V], its sum over the whole
      vocabulary [B, T], and the one-hot targets, bool [B, T, V].
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
    # On a CPU the exponentials take half of the time here. The barrier makes XLA compute them once,
    # instead of once more inside of each matrix product of the gradient.
    exp_BTV = jax.lax.optimization_barrier(jnp.exp(logits_BTV - largest_BT1))
    sum_BT = exp_BTV.sum(axis=-1)
    if vocab_size is not None:
        sum_BT, picked_BT = jax.lax.psum((sum_BT, picked_BT), "tensor")
    lse_BT = largest_BT1[..., 0] + jnp.log(sum_BT)
    return ((lse_BT - picked_BT) * weights_BT).sum(), (exp_BTV, sum_BT, one_hot_BTV)


def _cast_table(inputs: LMInputs) -> Array:
    """Returns the table in the dtype of the matrix products; the barrier makes XLA store it."""
    return jax.lax.optimization_barrier(inputs.table.astype(inputs.x_BTD.dtype))


def total_loss(inputs: LMInputs, pieces: int, vocab_size: int | None = None) -> Array:
    """Returns the loss of `cross_entropy`, without its gradient.

    `vocab_size` is that of `_piece_loss`.
    """
    cast_VD = _cast_table(inputs)

    def add(total: Array, piece: _Piece) -> tuple[Array, None]:
        return total + _piece_loss(*piece, cast_VD, vocab_size)[0], None

    return jax.lax.scan(add, jnp.float32(0), _split(inputs, pieces))[0]


def total_loss_and_gradients(
    inputs: LMInputs, pieces: int, vocab_size: int | None = None
) -> tuple[Array, Array, Array]:
    """Returns the loss, the gradient of x [B, T, D], and that of the table, float32 [D, V]."""
    dtype, cast_VD = inputs.x_BTD.dtype, _cast_table(inputs)

    def add(carry: tuple[Array, Array], piece: _Piece) -> tuple[tuple[Array, Array], Array]:
        total, d_table_DV = carry
        x, _, weights = piece
        loss, (exp, sum_exp, one_hot) = _piece_loss(*piece, cast_VD, vocab_size)
        d_logits = exp * (weights / sum_exp)[..., None] - one_hot * weights[..., None]
        d_logits = jax.lax.optimization_barrier(d_logits.astype(dtype))
        d_x = jnp.einsum("BTV,VD->BTD", d_logits, cast_VD, preferred_element_type=jnp.float32)
        # The gradient is [D, V] and not [V, D], because this product transposes the smaller factor
        # on a CPU, and x is smaller than d_logits.
        d_table_DV += matmul.weight_gradient(x, d_logits, 1)
        return (total + loss, d_table_DV), d_x.astype(dtype)

    split = _split(inputs, pieces)
    start = (jnp.float32(0), jnp.zeros(inputs.table.shape[::-1], jnp.float32))
    (total, d_table_DV), d_x = jax.lax.scan(add, start, split)
    return total, jnp.moveaxis(d_x, 0, 1).reshape(inputs.x_BTD.shape), d_table_DV


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def cross_entropy(inputs: LMInputs, pieces: int) -> Array:
    """Returns the sum over b and t of weight * -log softmax(x table^T)[target], a float32 scalar.

    When it is differentiated, the forward pass computes the gradients too, while it has the logits:
    three matrix products a piece, none of them repeated.

    Args:
      inputs: with a table [V, D].
      pieces: number of pieces that the sequence is divided into, from `num_pieces`.
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
    """Makes the bias one more column of the table, and 1 one more element of each state.

    With that the losses here need no gradient of a bias.

    Args:
      x_BTD: states.
      table: [V, D], or a replicated table [N, V', D].
      bias_V: None: nothing is changed.
    """
    if bias_V is None:
        return x_BTD, table
    column_VD = bias_V[:, None]
    if table.ndim == 3:
        # A replicated table has V' rows; those after the first V are padding.
        column_VD = jnp.pad(column_VD, ((0, table.shape[1] - len(bias_V)), (0, 0)))[None]
        column_VD = jnp.broadcast_to(column_VD, (*table.shape[:2], 1))
    table = jnp.concatenate([table, column_VD], axis=-1)
    return jnp.concatenate([x_BTD, jnp.ones_like(x_BTD[..., :1])], axis=-1), table
