"""Causal attention in blocks of queries, for CPUs.

A block of queries meets the keys up to its own last one only, so that half of the scores are never
computed; the backward pass computes the weights again from the log-sum-exp of the scores (Dao et
al. 2022, section 3.1), so that no [T, T] array outlives its block. A few rows of the batch at a
time, so that what a block computes stays in the cache. All products are of the kinds that are fast
on a CPU (see `products.py`).

Letters of shapes: G groups of rows, R rows of a group, N rows times heads, T tokens, Q queries of a
block, S keys, K width of a head.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gptjax import dropout, products

Array = jax.Array

_BLOCK = 128
# Scores computed at a time, in elements: 4 MiB of float32.
_SCORES = 2**20
_HIDDEN = float(jnp.finfo(jnp.float32).min)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of the queries of each block."""
    return ((start, min(start + _BLOCK, length)) for start in range(0, length, _BLOCK))


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """Product over one axis of each, batched over the first, accumulated in float32."""
    contract = (((x_axis,), (y_axis,)), ((0,), (0,)))
    return lax.dot_general(x, y, contract, preferred_element_type=jnp.float32)


def _scores(q_NTK: Array, k_NTK: Array, ids: tuple[Array, Array], lo: int, hi: int) -> Array:
    """Scores of the queries lo..hi - 1 and the keys 0..hi - 1, hidden ones at the floor."""
    query_ids_RT, key_ids_RT = ids
    scores_NQS = _dot(q_NTK[:, lo:hi], k_NTK[:, :hi], 2, 2) / math.sqrt(q_NTK.shape[-1])
    visible_RQS = query_ids_RT[:, lo:hi, None] == key_ids_RT[:, None, :hi]
    visible_RQS &= jnp.arange(lo, hi)[None, :, None] >= jnp.arange(hi)[None, None]
    scores_RHQS = scores_NQS.reshape(query_ids_RT.shape[0], -1, *scores_NQS.shape[1:])
    return jnp.where(visible_RQS[:, None], scores_RHQS, _HIDDEN).reshape(scores_NQS.shape)


@dataclasses.dataclass(frozen=True)
class _Dropout:
    """The part of `dropout.keep(words, [B, H, T, T], rate)` that belongs to a block."""

    words: Array
    heads_N: Array
    """uint32, b * H + h of each."""
    length: int
    rate: float

    def __call__(self, x_NQS: Array, lo: int) -> Array:
        """Drops from the weights of the queries from `lo` on, without scaling the others."""
        if not self.rate:
            return x_NQS
        query, key = (lax.broadcasted_iota(jnp.uint32, x_NQS.shape, axis) for axis in (1, 2))
        index = self.heads_N[:, None, None] * jnp.uint32(self.length) + query + jnp.uint32(lo)
        index = index * jnp.uint32(self.length) + key
        return jnp.where(
            dropout.keep_at(index, (self.words[0], self.words[1]), self.rate), x_NQS, 0
        )


def _forward(q_NTK: Array, k_NTK: Array, v_NTK: Array, ids: Any, drop: _Dropout):
    """Returns of a group, in float32, output [N, T, K] and log-sum-exp of the scores [N, T, 1]."""
    outputs, lse = [], []
    for lo, hi in _blocks(q_NTK.shape[1]):
        scores_NQS = _scores(q_NTK, k_NTK, ids, lo, hi)
        largest_NQ1 = scores_NQS.max(-1, keepdims=True)
        weights_NQS = jnp.exp(scores_NQS - largest_NQ1)
        total_NQ1 = weights_NQS.sum(-1, keepdims=True)
        lse.append(largest_NQ1 + jnp.log(total_NQ1))
        y_NQK = _dot(drop(weights_NQS, lo).astype(v_NTK.dtype), v_NTK[:, :hi], 2, 1)
        outputs.append(y_NQK / (total_NQ1 * (1 - drop.rate)))
    return jnp.concatenate(outputs, 1), jnp.concatenate(lse, 1)


def _backward(q_NTK, k_NTK, v_NTK, y_NTK, lse_NT1, dy_NTK, ids, drop: _Dropout):
    """Returns the gradients of q, k and v of a group."""
    heads, length, width = q_NTK.shape
    scale = 1 / (1 - drop.rate)
    delta_NT1 = (dy_NTK.astype(jnp.float32) * y_NTK).sum(-1, keepdims=True)
    d_q = []
    d_k_NKT, d_v_NKT = (jnp.zeros((heads, width, length), jnp.float32) for _ in range(2))
    for lo, hi in _blocks(length):
        dy_NQK, q_NQK = dy_NTK[:, lo:hi], q_NTK[:, lo:hi]
        weights_NQS = jnp.exp(_scores(q_NTK, k_NTK, ids, lo, hi) - lse_NT1[:, lo:hi])
        d_weights_NQS = drop(_dot(dy_NQK, v_NTK[:, :hi], 2, 2) * scale, lo)
        dropped_NQS = drop(weights_NQS * scale, lo).astype(v_NTK.dtype)
        d_scores_NQS = weights_NQS * (d_weights_NQS - delta_NT1[:, lo:hi]) / math.sqrt(width)
        d_scores_NQS = d_scores_NQS.astype(q_NTK.dtype)
        d_q.append(_dot(d_scores_NQS, k_NTK[:, :hi], 2, 1))
        d_v = _dot(products.transposed(dy_NQK), dropped_NQS, 2, 1)
        d_k = _dot(products.transposed(q_NQK), d_scores_NQS, 2, 1)
        d_v_NKT, d_k_NKT = d_v_NKT.at[:, :, :hi].add(d_v), d_k_NKT.at[:, :, :hi].add(d_k)
    # The barrier keeps the transposes out of the products.
    d_k_NKT, d_v_NKT = lax.optimization_barrier((d_k_NKT, d_v_NKT))
    d_q_NTK = jnp.concatenate(d_q, 1)
    return tuple(x.astype(q_NTK.dtype) for x in (d_q_NTK, d_k_NKT.mT, d_v_NKT.mT))


def _group(batch: int, heads: int, length: int) -> int:
    """Returns how many rows are computed at a time: a divisor of the batch."""
    fit = max(1, _SCORES // (heads * min(length, _BLOCK) * length))
    return next(rows for rows in range(min(fit, batch), 0, -1) if batch % rows == 0)


def _bits(x: Array) -> Array:
    """bfloat16 as uint16, for what only moves it: XLA moves bfloat16 as float32 on CPUs."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _values(x: Array) -> Array:
    """Undoes `_bits`."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _grouped(x_BTHK: Array) -> Array:
    """[B, T, H, K] -> [G, N, T, K], in memory."""
    batch, length, heads, width = x_BTHK.shape
    rows = _group(batch, heads, length)
    x_BHTK = jnp.moveaxis(_bits(x_BTHK), 2, 1)
    return lax.optimization_barrier(x_BHTK.reshape(batch // rows, rows * heads, length, width))


def _ungrouped(x_GNTK: Array, heads: int) -> Array:
    """Undoes `_grouped`."""
    length, width = x_GNTK.shape[2:]
    return _values(jnp.moveaxis(x_GNTK.reshape(-1, heads, length, width), 1, 2))


def _over_groups(function, rate, rest, arrays):
    """Maps a function of arrays [N, T, K], ids and dropout over the groups of [G, N, T, K]."""
    ids_BT, words, heads_BH = rest
    groups, (rows, length) = arrays[0].shape[0], ids_BT[0].shape
    ids_GRT = tuple(x.reshape(groups, rows // groups, length) for x in ids_BT)
    heads_GN = heads_BH.reshape(groups, -1)

    def group(args):
        arrays, ids_RT, heads_N = args
        drop = _Dropout(words, heads_N, length, rate)
        return jax.tree.map(_bits, function(*map(_values, arrays), ids_RT, drop))

    return lax.map(group, (arrays, ids_GRT, heads_GN))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked(
    rate: float,
    q_BTHK: Array,
    k_BTHK: Array,
    v_BTHK: Array,
    query_ids_BT: Array,
    key_ids_BT: Array,
    words: Array,
    heads_BH: Array,
) -> Array:
    """Returns what `attention.causal` does, [B, T, H, K].

    Args:
      rate, q_BTHK, k_BTHK, v_BTHK, query_ids_BT, key_ids_BT, words: as there.
      heads_BH: uint32, b * H + h in the whole array, of which this may be a part: what the dropout
        mask of a row and head depends on.
    """
    return _blocked_forward(
        rate, q_BTHK, k_BTHK, v_BTHK, query_ids_BT, key_ids_BT, words, heads_BH
    )[0]


def _blocked_forward(rate, q_BTHK, k_BTHK, v_BTHK, query_ids_BT, key_ids_BT, words, heads_BH):
    rest = (query_ids_BT, key_ids_BT), words, heads_BH
    qkv = tuple(map(_grouped, (q_BTHK, k_BTHK, v_BTHK)))
    y_GNTK, lse_GNT1 = _over_groups(_forward, rate, rest, qkv)
    y_BTHK = _ungrouped(y_GNTK, q_BTHK.shape[2]).astype(q_BTHK.dtype)
    # Kept unrounded: the gradient is a difference of which sum(dy * y) is one part.
    return y_BTHK, ((q_BTHK, k_BTHK, v_BTHK), y_GNTK, lse_GNT1, rest)


def _blocked_backward(rate, residuals, dy_BTHK):
    qkv, y_GNTK, lse_GNT1, rest = residuals
    # The barrier: not those of the forward pass, which XLA would keep, and copy for the loop.
    qkvd = tuple(map(_grouped, lax.optimization_barrier((*qkv, dy_BTHK))))
    arrays = (*qkvd[:3], y_GNTK, lse_GNT1, qkvd[3])
    gradients = _over_groups(_backward, rate, rest, arrays)
    return *(_ungrouped(x, dy_BTHK.shape[2]) for x in gradients), None, None, None, None


blocked.defvjp(_blocked_forward, _blocked_backward)
