"""Causal attention in blocks of queries, for CPUs.

A block of queries meets the keys up to its own last one only, so that half of the scores are never
computed; in rows of many short sequences only the keys that a sequence may reach back to, which are
fewer still. The backward pass computes the weights again from the log-sum-exp of the scores (Dao et
al. 2022, section 3.1), so that no [T, T] array outlives its block. A few units at a time, so that
what a block computes stays in the cache. All products are of the kinds that are fast on a CPU (see
`products.py`).

A unit is what one call of the loop may share with others: a row, or a block of queries of a row
with its keys. Letters of shapes: U units, G groups of units, R units of a group, N units times
heads, T tokens of a unit, Q queries of a block, S keys, K width of a head.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.ops import dropout, matmul

Array = jax.Array

_BLOCK = 128
_SHORT_BLOCK = 64
# Scores computed at a time, in elements: 4 MiB of float32.
_SCORES = 2**20
_HIDDEN = float(jnp.finfo(jnp.float32).min)
# Segment ids of the keys and queries that are put before and after a row: none sees another.
_NO_KEY, _NO_QUERY = -2, -3


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of the queries of each block."""
    return ((start, min(start + _BLOCK, length)) for start in range(0, length, _BLOCK))


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """Product over one axis of each, batched over the first, accumulated in float32."""
    contract = (((x_axis,), (y_axis,)), ((0,), (0,)))
    return lax.dot_general(x, y, contract, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Group:
    """What the units of a group see, and what dropout keeps of it."""

    query_ids_RT: Array
    key_ids_RS: Array
    index_N: Array
    """uint32: of each unit and head's first query and key, in [B, H, T, T] of the whole batch."""
    words: Array
    length: int
    """T of the whole batch."""
    rate: float

    @property
    def before(self) -> int:
        """How many keys lie before the first query."""
        return self.key_ids_RS.shape[1] - self.query_ids_RT.shape[1]

    def scores(self, q_NTK: Array, k_NSK: Array, lo: int, hi: int) -> Array:
        """Of queries lo..hi - 1 and the keys up to the last of them, hidden ones at the floor."""
        end = hi + self.before
        scores_NQS = _dot(q_NTK[:, lo:hi], k_NSK[:, :end], 2, 2) / math.sqrt(q_NTK.shape[-1])
        visible_RQS = self.query_ids_RT[:, lo:hi, None] == self.key_ids_RS[:, None, :end]
        places_Q, places_S = jnp.arange(lo + self.before, end), jnp.arange(end)
        visible_RQS &= places_Q[None, :, None] >= places_S[None, None]
        scores_RHQS = scores_NQS.reshape(visible_RQS.shape[0], -1, *scores_NQS.shape[1:])
        return jnp.where(visible_RQS[:, None], scores_RHQS, _HIDDEN).reshape(scores_NQS.shape)

    def drop(self, x_NQS: Array, lo: int) -> Array:
        """Drops from the weights of the queries from `lo` on, without scaling the others.

        What it keeps is that part of `dropout.keep(words, [B, H, T, T], rate)`.
        """
        if not self.rate:
            return x_NQS
        query, key = (lax.broadcasted_iota(jnp.uint32, x_NQS.shape, axis) for axis in (1, 2))
        index = self.index_N[:, None, None] + (query + jnp.uint32(lo)) * jnp.uint32(self.length)
        keep = dropout.keep_at(index + key, (self.words[0], self.words[1]), self.rate)
        return jnp.where(keep, x_NQS, 0)


def _forward(group: _Group, q_NTK: Array, k_NSK: Array, v_NSK: Array) -> tuple[Array, Array]:
    """Returns of a group, in float32, output [N, T, K] and log-sum-exp of the scores [N, T, 1]."""
    outputs, lse = [], []
    for lo, hi in _blocks(q_NTK.shape[1]):
        scores_NQS = group.scores(q_NTK, k_NSK, lo, hi)
        largest_NQ1 = scores_NQS.max(-1, keepdims=True)
        weights_NQS = jnp.exp(scores_NQS - largest_NQ1)
        total_NQ1 = weights_NQS.sum(-1, keepdims=True)
        lse.append(largest_NQ1 + jnp.log(total_NQ1))
        dropped_NQS = group.drop(weights_NQS, lo).astype(v_NSK.dtype)
        y_NQK = _dot(dropped_NQS, v_NSK[:, : dropped_NQS.shape[2]], 2, 1)
        outputs.append(y_NQK / (total_NQ1 * (1 - group.rate)))
    return jnp.concatenate(outputs, 1), jnp.concatenate(lse, 1)


def _backward(
    group: _Group,
    q_NTK: Array,
    k_NSK: Array,
    v_NSK: Array,
    y_NTK: Array,
    lse_NT1: Array,
    dy_NTK: Array,
) -> tuple[Array, Array, Array]:
    """Returns the gradients of q, k and v of a group; rounded where the unit has all of a key."""
    heads, length, width = q_NTK.shape
    scale = 1 / (1 - group.rate)
    delta_NT1 = (dy_NTK.astype(jnp.float32) * y_NTK).sum(-1, keepdims=True)
    d_q = []
    d_k_NKS, d_v_NKS = (jnp.zeros((heads, width, k_NSK.shape[1]), jnp.float32) for _ in range(2))
    for lo, hi in _blocks(length):
        end = hi + group.before
        dy_NQK, q_NQK = dy_NTK[:, lo:hi], q_NTK[:, lo:hi]
        weights_NQS = jnp.exp(group.scores(q_NTK, k_NSK, lo, hi) - lse_NT1[:, lo:hi])
        d_weights_NQS = group.drop(_dot(dy_NQK, v_NSK[:, :end], 2, 2) * scale, lo)
        dropped_NQS = group.drop(weights_NQS * scale, lo).astype(v_NSK.dtype)
        d_scores_NQS = weights_NQS * (d_weights_NQS - delta_NT1[:, lo:hi]) / math.sqrt(width)
        d_scores_NQS = d_scores_NQS.astype(q_NTK.dtype)
        d_q.append(_dot(d_scores_NQS, k_NSK[:, :end], 2, 1))
        d_v = _dot(matmul.transposed(dy_NQK), dropped_NQS, 2, 1)
        d_k = _dot(matmul.transposed(q_NQK), d_scores_NQS, 2, 1)
        d_v_NKS, d_k_NKS = d_v_NKS.at[:, :, :end].add(d_v), d_k_NKS.at[:, :, :end].add(d_k)
    # The barrier keeps the transposes out of the products.
    d_k_NKS, d_v_NKS = lax.optimization_barrier((d_k_NKS, d_v_NKS))
    shared = jnp.float32 if group.before else q_NTK.dtype
    d_q_NTK = jnp.concatenate(d_q, 1).astype(q_NTK.dtype)
    return d_q_NTK, d_k_NKS.mT.astype(shared), d_v_NKS.mT.astype(shared)


def _bits(x: Array) -> Array:
    """bfloat16 as uint16, for what only moves it: XLA moves bfloat16 as float32 on CPUs."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _values(x: Array) -> Array:
    """Undoes `_bits`."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How the rows are cut into units; arrays are [B, T, ...] outside, [U, T, ...] inside."""

    length: int
    block: int
    """Queries of a unit; a whole row where there is nothing `before`."""
    before: int
    """Keys of a unit that lie before its first query, a multiple of `block`."""

    @classmethod
    def of(cls, length: int, longest: int) -> "_Cut":
        """Returns the cut for rows of `length` with sequences of up to `longest` tokens."""
        before = -(-max(1, longest - 1) // _SHORT_BLOCK) * _SHORT_BLOCK
        # Without a cut a query meets half of the keys on average.
        if 2 * (before + _SHORT_BLOCK) < length:
            return cls(length, _SHORT_BLOCK, before)
        return cls(length, length, 0)

    @property
    def units(self) -> int:
        """Of a row."""
        return -(-self.length // self.block)

    def _padded(self, x: Array, before: int, fill: int) -> Array:
        after = self.units * self.block - self.length
        widths = [(0, 0), (before, after), *[(0, 0)] * (x.ndim - 2)]
        return jnp.pad(x, widths, constant_values=fill)

    def queries(self, x: Array, fill: int = 0) -> Array:
        """Cuts what queries have; `fill` is put after the row."""
        if not self.before:
            return x
        return self._padded(x, 0, fill).reshape(-1, self.block, *x.shape[2:])

    def keys(self, x: Array, fill: int = 0) -> Array:
        """Cuts what keys have, those before the block included; `fill` is put around the row."""
        if not self.before:
            return x
        x = self._padded(x, self.before, fill)
        pieces = x.reshape(x.shape[0], -1, self.block, *x.shape[2:])
        windows = [pieces[:, i : i + self.units] for i in range(self.before // self.block + 1)]
        return jnp.concatenate(windows, 2).reshape(-1, self.before + self.block, *x.shape[2:])

    def join_queries(self, x: Array) -> Array:
        """Undoes `queries`."""
        return x.reshape(-1, self.units * self.block, *x.shape[2:])[:, : self.length]

    def join_keys(self, x: Array) -> Array:
        """Sums what the units have of each key."""
        if not self.before:
            return x
        count = self.before // self.block + 1
        x = x.reshape(-1, self.units, count, self.block, *x.shape[2:])
        total = jnp.zeros((x.shape[0], count - 1 + self.units, *x.shape[3:]), x.dtype)
        for i in range(count):
            total = total.at[:, i : i + self.units].add(x[:, :, i])
        return self.join_queries(total[:, count - 1 :].reshape(-1, *x.shape[3:]))

    def index_UH(self, heads_BH: Array) -> Array:
        """uint32 [U, H]: see `_Group.index_N`."""
        start = jnp.arange(self.units, dtype=jnp.uint32) * jnp.uint32(self.block)
        # Modulo 2^32: keys before the row wrap around, and nobody sees them.
        first = start * jnp.uint32(self.length) + start - jnp.uint32(self.before)
        index = heads_BH[:, None] * jnp.uint32(self.length**2 % 2**32) + first[None, :, None]
        return index.reshape(-1, heads_BH.shape[1])


def _grouped(x_UTHK: Array, rows: int) -> Array:
    """[U, T, H, K] -> [G, N, T, K], in memory."""
    x_UHTK = jnp.moveaxis(_bits(x_UTHK), 2, 1)
    return lax.optimization_barrier(x_UHTK.reshape(-1, rows * x_UHTK.shape[1], *x_UHTK.shape[2:]))


def _ungrouped(x_GNTK: Array, heads: int) -> Array:
    """Undoes `_grouped`."""
    return _values(jnp.moveaxis(x_GNTK.reshape(-1, heads, *x_GNTK.shape[2:]), 1, 2))


def _rows(units: int, heads: int, queries: int, keys: int) -> int:
    """Returns how many units are computed at a time: a divisor of their number."""
    fit = max(1, _SCORES // (heads * min(queries, _BLOCK) * keys))
    return next(rows for rows in range(min(fit, units), 0, -1) if units % rows == 0)


def _over_groups(function, rate, cut, rest, arrays):
    """Maps a function of a group and its arrays [N, T, K] over all groups of [G, N, T, K]."""
    (query_ids_BT, key_ids_BT), words, heads_BH = rest
    groups = arrays[0].shape[0]
    query_ids_UT = cut.queries(query_ids_BT, _NO_QUERY)
    query_ids_GRT = query_ids_UT.reshape(groups, -1, query_ids_UT.shape[1])
    key_ids_US = cut.keys(key_ids_BT, _NO_KEY)
    key_ids_GRS = key_ids_US.reshape(groups, -1, key_ids_US.shape[1])
    index_GN = cut.index_UH(heads_BH).reshape(groups, -1)

    def run(args):
        arrays, query_ids_RT, key_ids_RS, index_N = args
        group = _Group(query_ids_RT, key_ids_RS, index_N, words, cut.length, rate)
        return jax.tree.map(_bits, function(group, *map(_values, arrays)))

    return lax.map(run, (arrays, query_ids_GRT, key_ids_GRS, index_GN))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def blocked(
    rate: float,
    longest: int,
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
      rate, longest, q_BTHK, k_BTHK, v_BTHK, query_ids_BT, key_ids_BT, words: as there.
      heads_BH: uint32, b * H + h in the whole array, of which this may be a part: what the dropout
        mask of a row and head depends on.
    """
    rest = (query_ids_BT, key_ids_BT), words, heads_BH
    return _blocked_forward(rate, longest, q_BTHK, k_BTHK, v_BTHK, *rest[0], words, heads_BH)[0]


def _blocked_forward(rate, longest, q_BTHK, k_BTHK, v_BTHK, query_ids_BT, key_ids_BT, *rest):
    batch, length, heads, _ = q_BTHK.shape
    cut, rest = _Cut.of(length, longest), ((query_ids_BT, key_ids_BT), *rest)
    rows = _rows(batch * cut.units, heads, cut.block, cut.before + cut.block)
    cuts = (cut.queries(q_BTHK), cut.keys(k_BTHK), cut.keys(v_BTHK))
    qkv = tuple(_grouped(x, rows) for x in cuts)
    y_GNTK, lse_GNT1 = _over_groups(_forward, rate, cut, rest, qkv)
    y_BTHK = cut.join_queries(_ungrouped(y_GNTK, heads)).astype(q_BTHK.dtype)
    # Kept unrounded: the gradient is a difference of which sum(dy * y) is one part.
    return y_BTHK, ((q_BTHK, k_BTHK, v_BTHK), y_GNTK, lse_GNT1, rest)


def _blocked_backward(rate, longest, residuals, dy_BTHK):
    qkv, y_GNTK, lse_GNT1, rest = residuals
    _, length, heads, _ = dy_BTHK.shape
    cut, rows = _Cut.of(length, longest), y_GNTK.shape[1] // heads
    # The barrier: not those of the forward pass, which XLA would keep, and copy for the loop.
    q, k, v, dy = lax.optimization_barrier((*qkv, dy_BTHK))
    cuts = (cut.queries(q), cut.keys(k), cut.keys(v), cut.queries(dy))
    q, k, v, dy = (_grouped(x, rows) for x in cuts)
    d_q, d_k, d_v = (
        _ungrouped(x, heads)
        for x in _over_groups(_backward, rate, cut, rest, (q, k, v, y_GNTK, lse_GNT1, dy))
    )
    gradients = (cut.join_queries(d_q), cut.join_keys(d_k), cut.join_keys(d_v))
    return *(x.astype(dy_BTHK.dtype) for x in gradients), None, None, None, None


blocked.defvjp(_blocked_forward, _blocked_backward)
