"""Causal attention block by block, for CPUs (Dao et al. 2022, FlashAttention, section 3.1).

The queries of a row are computed in blocks. A block needs only the keys up to its last query, so
half of the scores are never computed. The backward pass computes the attention weights of a block
again, from the log-sum-exp of the scores. So no scores have to be stored between the two passes.

The rows are divided into tiles. A tile is a whole row if the sequences can be long. If all
sequences are short, a tile has 64 queries of a row and a window of keys. The window has all keys
that these queries can see, so the windows of neighbouring tiles overlap. A loop computes one group
of tiles at a time. A group has as many tiles as fit the caches of a CPU. All matrix products have a
form that is fast on a CPU (see `gptjax.ops.matmul`).

The letters of shapes are the letters of `gptjax.batch`, and in addition:

  U  tiles                                R  tiles in a group
  G  groups                               N  R * H, tiles in a group times heads
  T  queries in a tile (or in a row)      S  keys in a tile
  Q  queries in a block

The values have the names of the paper: p is an attention weight, lse is a log-sum-exp, d_x is the
gradient of x, and delta is the sum of d_y * y over a head.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from gptjax.ops import dropout, matmul
from gptjax.ops.attention.inputs import PADDING_KEY, PADDING_QUERY, AttentionInputs
from gptjax.ops.dropout import DropoutKey

Array = jax.Array

# The number of queries in a block.
_BLOCK = 128
# The number of queries in a tile that has a window of keys.
_WINDOW_QUERIES = 64
# The largest number of scores that a group computes at a time. They take 4 MiB in float32.
_MAX_SCORES = 2**20
# The batched matrix product; the first axis of both factors is the batch axis.
_product = functools.partial(matmul.product, batch=(0,))
_HIDDEN_SCORE = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How rows are divided into tiles: an array of rows [B, T, ...] becomes tiles [U, T, ...]."""

    length: int
    """The number of tokens in a row."""
    queries: int
    """The number of queries in a tile. If `lookback` is 0, a tile has all queries of a row."""
    lookback: int
    """The number of keys in a tile before its first query. It is a multiple of `queries`.

    0 means that a tile is a whole row.
    """

    @classmethod
    def choose(cls, length: int, max_sequence_length: int) -> "_Tiling":
        """Returns the faster of two tilings: whole rows, or tiles with windows of keys.

        Args:
          length: the number of tokens in a row.
          max_sequence_length: the largest number of tokens in a sequence.
        """
        windows = -(-max(1, max_sequence_length - 1) // _WINDOW_QUERIES)
        lookback = windows * _WINDOW_QUERIES
        # With a window a query is multiplied with all keys of the window. With whole rows it is
        # multiplied with half of the keys of its row, on average.
        if 2 * (lookback + _WINDOW_QUERIES) < length:
            return cls(length, _WINDOW_QUERIES, lookback)
        return cls(length, length, 0)

    @property
    def tiles_per_row(self) -> int:
        """The number of tiles in a row. The last tile of a row can contain padding."""
        return -(-self.length // self.queries)

    def _pad(self, x: Array, before: int, fill: int) -> Array:
        after = self.tiles_per_row * self.queries - self.length
        widths = [(0, 0), (before, after), *[(0, 0)] * (x.ndim - 2)]
        return jnp.pad(x, widths, constant_values=fill)

    def split_queries(self, x: Array, fill: int = 0) -> Array:
        """Divides an array with one entry for each query into tiles: [B, T, ...] -> [U, T, ...].

        `fill` is the value of the padding.
        """
        if not self.lookback:
            return x
        return self._pad(x, 0, fill).reshape(-1, self.queries, *x.shape[2:])

    def split_keys(self, x: Array, fill: int = 0) -> Array:
        """Divides an array with one entry for each key into tiles: [B, T, ...] -> [U, S, ...].

        If the tiles have windows of keys, the windows overlap. Padding with the value `fill` is
        then added before and after each row.
        """
        if not self.lookback:
            return x
        x = self._pad(x, self.lookback, fill)
        pieces = x.reshape(x.shape[0], -1, self.queries, *x.shape[2:])
        count = self.lookback // self.queries + 1
        windows = [pieces[:, i : i + self.tiles_per_row] for i in range(count)]
        return jnp.concatenate(windows, 2).reshape(-1, count * self.queries, *x.shape[2:])

    def join_queries(self, x: Array) -> Array:
        """Undoes `split_queries`: [U, T, ...] -> [B, T, ...]."""
        rows = x.reshape(-1, self.tiles_per_row * self.queries, *x.shape[2:])
        return rows[:, : self.length]

    def sum_keys(self, x: Array) -> Array:
        """Adds up the values that a key has in all tiles: [U, S, ...] -> [B, T, ...].

        The gradient of `split_keys` is this sum.
        """
        if not self.lookback:
            return x
        count = self.lookback // self.queries + 1
        x = x.reshape(-1, self.tiles_per_row, count, self.queries, *x.shape[2:])
        total = jnp.zeros((x.shape[0], count - 1 + self.tiles_per_row, *x.shape[3:]), x.dtype)
        for i in range(count):
            total = total.at[:, i : i + self.tiles_per_row].add(x[:, :, i])
        return self.join_queries(total[:, count - 1 :].reshape(-1, *x.shape[3:]))

    def first_index(self, heads_BH: Array) -> Array:
        """Returns the index of the first score of each tile and head, uint32 [U, H].

        It is the row-major index in the array of all scores of the whole batch, [B, H, T, T].

        Args:
          heads_BH: the index b * H + h of each row and head in the whole batch, uint32.
        """
        start = jnp.arange(self.tiles_per_row, dtype=jnp.uint32) * jnp.uint32(self.queries)
        # If a window begins before its row, the difference wraps around modulo 2^32. Only the
        # indices of the padding keys before the row are then wrong, and no query sees these keys.
        first = start * jnp.uint32(self.length) + start - jnp.uint32(self.lookback)
        index = heads_BH[:, None] * jnp.uint32(self.length**2 % 2**32) + first[None, :, None]
        return index.reshape(-1, heads_BH.shape[1])


@dataclasses.dataclass(frozen=True)
class _Group:
    """The attention mask and the dropout mask of a group of tiles."""

    query_ids_RT: Array
    key_ids_RS: Array
    first_index_N: Array
    """The index of the first score of each tile and head, from `_Tiling.first_index`."""
    dropout_key: DropoutKey
    row_length: int
    """The number of tokens in a whole row."""

    @property
    def lookback(self) -> int:
        """The number of keys in a tile before its first query."""
        return self.key_ids_RS.shape[1] - self.query_ids_RT.shape[1]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yields the range (start, end) of each block of queries in a tile; `end` is exclusive."""
        length = self.query_ids_RT.shape[1]
        return ((start, min(start + _BLOCK, length)) for start in range(0, length, _BLOCK))

    def scores(self, q_NTK: Array, k_NSK: Array, lo: int, hi: int) -> Array:
        """Returns the scores of the queries lo to hi - 1 with all keys up to query hi - 1.

        They are float32 [N, Q, S]. A key that a query must not see has the score `_HIDDEN_SCORE`.
        """
        end = hi + self.lookback
        scores_NQS = _product(q_NTK[:, lo:hi], k_NSK[:, :end], 2, 2) / math.sqrt(q_NTK.shape[-1])
        visible_RQS = self.query_ids_RT[:, lo:hi, None] == self.key_ids_RS[:, None, :end]
        places_Q, places_S = jnp.arange(lo + self.lookback, end), jnp.arange(end)
        visible_RQS &= places_Q[None, :, None] >= places_S[None, None]
        scores_RHQS = scores_NQS.reshape(visible_RQS.shape[0], -1, *scores_NQS.shape[1:])
        visible_RHQS = visible_RQS[:, None]
        return jnp.where(visible_RHQS, scores_RHQS, _HIDDEN_SCORE).reshape(scores_NQS.shape)

    def drop(self, x_NQS: Array, lo: int) -> Array:
        """Sets the values of the dropped attention weights to 0.

        The other values are not multiplied by 1 / (1 - rate). The dropout mask is a part of the
        mask `dropout.keep(key, [B, H, T, T])` of the whole batch.

        Args:
          x_NQS: the attention weights of a block of queries, or the gradients of these weights.
          lo: the index of the first query of the block in its tile.
        """
        key = self.dropout_key
        if not key.rate:
            return x_NQS
        q, s = (lax.broadcasted_iota(jnp.uint32, x_NQS.shape, axis) for axis in (1, 2))
        first_N11 = self.first_index_N[:, None, None]
        index_NQS = first_N11 + (q + jnp.uint32(lo)) * jnp.uint32(self.row_length) + s
        kept_NQS = dropout.keep_at(index_NQS, (key.bits[0], key.bits[1]), key.rate)
        return jnp.where(kept_NQS, x_NQS, 0)


def _forward(group: _Group, q_NTK: Array, k_NSK: Array, v_NSK: Array) -> tuple[Array, Array]:
    """Returns y [N, T, K] and the log-sum-exp of the scores [N, T, 1], both float32."""
    outputs, lse = [], []
    for lo, hi in group.blocks():
        scores_NQS = group.scores(q_NTK, k_NSK, lo, hi)
        largest_NQ1 = scores_NQS.max(-1, keepdims=True)
        exp_NQS = jnp.exp(scores_NQS - largest_NQ1)
        sum_NQ1 = exp_NQS.sum(-1, keepdims=True)
        lse.append(largest_NQ1 + jnp.log(sum_NQ1))
        dropped_NQS = group.drop(exp_NQS, lo).astype(v_NSK.dtype)
        y_NQK = _product(dropped_NQS, v_NSK[:, : dropped_NQS.shape[2]], 2, 1)
        outputs.append(y_NQK / (sum_NQ1 * (1 - group.dropout_key.rate)))
    return jnp.concatenate(outputs, 1), jnp.concatenate(lse, 1)


def _backward(
    group: _Group,
    q_NTK: Array,
    k_NSK: Array,
    v_NSK: Array,
    y_NTK: Array,
    lse_NT1: Array,
    d_y_NTK: Array,
) -> tuple[Array, Array, Array]:
    """Returns the gradients of q, k and v of a group.

    If the windows of the tiles overlap, the gradients of k and v are float32, because
    `_Tiling.sum_keys` adds them up later. Otherwise they have the dtype of q. The gradient of q
    always has the dtype of q.

    Args:
      group: the masks of the group.
      q_NTK, k_NSK, v_NSK: the arguments of `_forward`.
      y_NTK, lse_NT1: the results of `_forward`.
      d_y_NTK: the gradient of y.
    """
    heads, _, width = q_NTK.shape
    scale = 1 / (1 - group.dropout_key.rate)
    delta_NT1 = (d_y_NTK.astype(jnp.float32) * y_NTK).sum(-1, keepdims=True)
    d_q = []
    d_k_NKS, d_v_NKS = (jnp.zeros((heads, width, k_NSK.shape[1]), jnp.float32) for _ in range(2))
    for lo, hi in group.blocks():
        end = hi + group.lookback
        d_y_NQK, q_NQK = d_y_NTK[:, lo:hi], q_NTK[:, lo:hi]
        p_NQS = jnp.exp(group.scores(q_NTK, k_NSK, lo, hi) - lse_NT1[:, lo:hi])
        d_p_NQS = group.drop(_product(d_y_NQK, v_NSK[:, :end], 2, 2) * scale, lo)
        dropped_NQS = group.drop(p_NQS * scale, lo).astype(v_NSK.dtype)
        d_scores_NQS = p_NQS * (d_p_NQS - delta_NT1[:, lo:hi]) / math.sqrt(width)
        d_scores_NQS = d_scores_NQS.astype(q_NTK.dtype)
        d_q.append(_product(d_scores_NQS, k_NSK[:, :end], 2, 1))
        d_v = _product(matmul.transposed(d_y_NQK), dropped_NQS, 2, 1)
        d_k = _product(matmul.transposed(q_NQK), d_scores_NQS, 2, 1)
        d_v_NKS, d_k_NKS = d_v_NKS.at[:, :, :end].add(d_v), d_k_NKS.at[:, :, :end].add(d_k)
    # Without the barrier XLA would move the transposes of the results into the products.
    d_k_NKS, d_v_NKS = lax.optimization_barrier((d_k_NKS, d_v_NKS))
    key_dtype = jnp.float32 if group.lookback else q_NTK.dtype
    d_q_NTK = jnp.concatenate(d_q, 1).astype(q_NTK.dtype)
    return d_q_NTK, d_k_NKS.mT.astype(key_dtype), d_v_NKS.mT.astype(key_dtype)


def _to_bits(x: Array) -> Array:
    """Reinterprets a bfloat16 array as uint16, so that it can be copied without a conversion.

    On CPUs XLA would convert bfloat16 to float32 in order to copy it. Other arrays are returned
    unchanged.
    """
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _from_bits(x: Array) -> Array:
    """Undoes `_to_bits`."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _to_groups(x_UTHK: Array, tiles: int) -> Array:
    """Divides the tiles into groups of `tiles` tiles, and returns `_to_bits` of [G, N, T, K].

    On the axis N the heads of a tile are next to each other.
    """
    x_UHTK = jnp.moveaxis(_to_bits(x_UTHK), 2, 1)
    x_GNTK = x_UHTK.reshape(-1, tiles * x_UHTK.shape[1], *x_UHTK.shape[2:])
    # The barrier makes XLA store the transposed array. Otherwise the loop would transpose it again.
    return lax.optimization_barrier(x_GNTK)


def _from_groups(x_GNTK: Array, heads: int) -> Array:
    """Undoes `_to_groups`: [G, N, T, K] -> [U, T, H, K]."""
    return _from_bits(jnp.moveaxis(x_GNTK.reshape(-1, heads, *x_GNTK.shape[2:]), 1, 2))


@flax.struct.dataclass
class _Problem:
    """The arguments of `blocked` that have no gradient."""

    query_ids_BT: Array
    key_ids_BT: Array
    dropout_key: DropoutKey
    heads_BH: Array
    """uint32, the index b * H + h of each row and head in the whole batch."""
    max_sequence_length: int = flax.struct.field(pytree_node=False)

    @property
    def tiling(self) -> _Tiling:
        """How the rows are divided into tiles."""
        return _Tiling.choose(self.query_ids_BT.shape[1], self.max_sequence_length)

    @property
    def tiles_per_group(self) -> int:
        """The number of tiles in a group.

        It is the largest divisor of the number of all tiles with which one block of queries of the
        whole group has at most `_MAX_SCORES` scores. It is 1 if a single tile has more scores.
        """
        tiling, (rows, heads) = self.tiling, self.heads_BH.shape
        tiles = rows * tiling.tiles_per_row
        scores = heads * min(tiling.queries, _BLOCK) * (tiling.lookback + tiling.queries)
        fit = max(1, _MAX_SCORES // scores)
        return next(count for count in range(min(fit, tiles), 0, -1) if tiles % count == 0)

    def map_groups(self, function: Callable[..., tuple[Array, ...]], *arrays: Array) -> Any:
        """Calls a function for each group, one group after the other.

        Args:
          function: `_forward` or `_backward`. Its arguments are the group and the arrays of the
            group, for example [N, T, K].
          *arrays: the arrays of all groups, for example [G, N, T, K] from `_to_groups`.

        Returns:
          The results of all groups. Each array has a leading axis G, and bfloat16 arrays are uint16
          (see `_to_bits`).
        """
        tiling, groups = self.tiling, arrays[0].shape[0]
        query_ids_UT = tiling.split_queries(self.query_ids_BT, PADDING_QUERY)
        query_ids_GRT = query_ids_UT.reshape(groups, -1, query_ids_UT.shape[1])
        key_ids_US = tiling.split_keys(self.key_ids_BT, PADDING_KEY)
        key_ids_GRS = key_ids_US.reshape(groups, -1, key_ids_US.shape[1])
        first_index_GN = tiling.first_index(self.heads_BH).reshape(groups, -1)

        def run(args: tuple[tuple[Array, ...], Array, Array, Array]) -> tuple[Array, ...]:
            arrays, query_ids_RT, key_ids_RS, first_index_N = args
            group = _Group(query_ids_RT, key_ids_RS, first_index_N, self.dropout_key, tiling.length)
            return jax.tree.map(_to_bits, function(group, *map(_from_bits, arrays)))

        return lax.map(run, (arrays, query_ids_GRT, key_ids_GRS, first_index_GN))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def blocked(
    inputs: AttentionInputs, dropout_key: DropoutKey, heads_BH: Array, max_sequence_length: int
) -> Array:
    """Returns `gptjax.ops.attention.causal` of these arguments, [B, T, H, K].

    Args:
      inputs: the queries, keys, values and ids of whole rows.
      dropout_key: the key for the dropout of the attention weights. Its rate is 0 if there is no
        dropout.
      heads_BH: uint32, the index b * H + h of each row and head in the whole batch. The dropout
        mask depends on this index. `inputs` can be the part of the batch on one device.
      max_sequence_length: the largest number of tokens in a sequence, padding not counted.
    """
    return _blocked_forward(inputs, dropout_key, heads_BH, max_sequence_length)[0]


_Residuals = tuple[tuple[Array, Array, Array], Array, Array, _Problem]


def _blocked_forward(
    inputs: AttentionInputs, dropout_key: DropoutKey, heads_BH: Array, max_sequence_length: int
) -> tuple[Array, _Residuals]:
    q, k, v = inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHK
    problem = _Problem(
        inputs.query_ids_BT, inputs.key_ids_BT, dropout_key, heads_BH, max_sequence_length
    )
    tiling, tiles = problem.tiling, problem.tiles_per_group
    split = (tiling.split_queries(q), tiling.split_keys(k), tiling.split_keys(v))
    groups = (_to_groups(x, tiles) for x in split)
    y_GNTK, lse_GNT1 = problem.map_groups(_forward, *groups)
    y_BTHK = tiling.join_queries(_from_groups(y_GNTK, q.shape[2])).astype(q.dtype)
    # y is saved in float32, because the gradient of the scores is p * (d_p - sum(d_y * y)). If y
    # were rounded, this rounding would be the largest error of the gradient.
    return y_BTHK, ((q, k, v), y_GNTK, lse_GNT1, problem)


def _blocked_backward(
    max_sequence_length: int, residuals: _Residuals, d_y_BTHK: Array
) -> tuple[AttentionInputs, None, None]:
    qkv, y_GNTK, lse_GNT1, problem = residuals
    heads, tiling = d_y_BTHK.shape[2], problem.tiling
    tiles = y_GNTK.shape[1] // heads
    # q, k and v are divided into groups again. Without the barrier XLA would reuse the groups of
    # the forward pass. It would keep them in memory until now and copy them for the loop.
    q, k, v, d_y = lax.optimization_barrier((*qkv, d_y_BTHK))
    split = (
        tiling.split_queries(q), tiling.split_keys(k), tiling.split_keys(v),
        tiling.split_queries(d_y),
    )  # fmt: skip
    q, k, v, d_y = (_to_groups(x, tiles) for x in split)
    gradients = problem.map_groups(_backward, q, k, v, y_GNTK, lse_GNT1, d_y)
    d_q, d_k, d_v = (_from_groups(x, heads) for x in gradients)
    d_q, d_k, d_v = (
        x.astype(d_y_BTHK.dtype)
        for x in (tiling.join_queries(d_q), tiling.sum_keys(d_k), tiling.sum_keys(d_v))
    )
    return AttentionInputs(d_q, d_k, d_v, None, None), None, None


blocked.defvjp(_blocked_forward, _blocked_backward)
