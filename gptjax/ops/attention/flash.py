"""Flash attention as a Pallas kernel for TPUs: causal, in segments, with dropout, differentiable.

FlashAttention (Dao et al. 2022, algorithms 2 and 4), with the two gradients in one pass. The
scores exist one block at a time, so that memory is O(T). The dropout mask is that of
`ops.dropout.keep` on [B, H, T, T], recomputed from each element's global index: the same as in
`ops.attention.attend`, and the same on every mesh.

Letters of shapes: B batch, T queries, S keys, H heads, K width of a head. Inside, arrays are
[B, H, K, T] and blocks of scores [S, T]. With tokens on the lanes a head of width 64 is not padded
to 128 of them, a query's statistics are rows [1, T], and sums over keys run over sublanes, which is
cheaper than over lanes.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from gptjax.ops import dropout
from gptjax.ops.attention import partition

Array = jax.Array
Ref = Any

LANES = 128
BLOCK = 256


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a kernel is compiled for. Hashable, as custom_vjp wants it."""

    length: int
    """Tokens before padding: the dropout index counts in them."""
    heads: int
    """Of the whole array, on all devices."""
    rate: float
    block: int
    interpret: bool


def _block_size(length: int) -> int:
    """Returns 256 where that adds no padding to a multiple of 128 (the lanes), else 128."""
    return BLOCK if pl.cdiv(length, LANES) * LANES % BLOCK == 0 else LANES


def _product(x: Array, y: Array, contract_x: int, contract_y: int) -> Array:
    """A matrix product over the given axes, accumulated in float32."""
    dimensions = (((contract_x,), (contract_y,)), ((), ()))
    return lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _scores(q_KT: Array, k_KS: Array, query_ids_1T: Array, key_ids_1S: Array, ahead: Any) -> Array:
    """Returns float32 [S, T], -inf where hidden; the block's first query is `ahead` of its key."""
    s_ST = _product(k_KS, q_KT, 0, 0) * (1 / math.sqrt(q_KT.shape[0]))
    key, query = (lax.broadcasted_iota(jnp.int32, s_ST.shape, axis) for axis in range(2))
    visible_ST = (key - query <= ahead) & (key_ids_1S.reshape(-1, 1) == query_ids_1T)
    return jnp.where(visible_ST, s_ST, -jnp.inf)


def _kept(plan: _Plan, scalars_ref: Ref, shape: tuple[int, ...], b: Any, h: Any, t: Any, s: Any):
    """Returns bool [S, T]: the dropout mask of the block that begins at query t and key s.

    The scalars are the two words of the dropout, and what `_padded` says of the first row and head.
    """
    words, first = (scalars_ref[0], scalars_ref[1]), scalars_ref[2]
    row, head, t, s = (x.astype(jnp.uint32) for x in (b, h, t, s))
    length = jnp.uint32(plan.length)
    start = ((first + row * jnp.uint32(plan.heads) + head) * length + t) * length + s
    key, query = (
        lax.broadcasted_iota(jnp.int32, shape, axis).astype(jnp.uint32) for axis in range(2)
    )
    return dropout.keep_at(query * length + key + start, words, plan.rate)


def _forward_kernel(
    plan: _Plan, first_ref: Ref, scalars_ref: Ref,
    q_ref: Ref, k_ref: Ref, v_ref: Ref, query_ids_ref: Ref, key_ids_ref: Ref,
    y_ref: Ref, *saved_refs: Ref,
) -> None:  # fmt: skip
    """One block of queries against its blocks of keys, by the running softmax.

    Writes y and, for the gradient, what y's rounding left out (0 if float32) and the log-sum-exp.
    """
    b, h, i = (pl.program_id(axis) for axis in range(3))
    q_KT, query_ids_1T = q_ref[...], query_ids_ref[...]
    block = plan.block

    def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        max_1T, sum_1T, y_KT = carry
        at = pl.ds(pl.multiple_of(j * block, block), block)
        s_ST = _scores(q_KT, k_ref[:, at], query_ids_1T, key_ids_ref[:, at], (i - j) * block)
        new_1T = jnp.maximum(max_1T, s_ST.max(0, keepdims=True))
        # The maximum starts finite, so that exp(-inf - max) is 0 even before the first key is seen.
        p_ST = jnp.exp(s_ST - new_1T)
        shrink_1T = jnp.exp(max_1T - new_1T)
        sum_1T = sum_1T * shrink_1T + p_ST.sum(0, keepdims=True)
        if plan.rate:
            kept_ST = _kept(plan, scalars_ref, p_ST.shape, b, h, i * block, j * block)
            p_ST = jnp.where(kept_ST, p_ST, 0)
        v_KS = v_ref[:, at]
        return new_1T, sum_1T, y_KT * shrink_1T + _product(v_KS, p_ST.astype(v_KS.dtype), 1, 0)

    start = (
        jnp.full((1, block), jnp.finfo(jnp.float32).min, jnp.float32),
        jnp.zeros((1, block), jnp.float32),
        jnp.zeros(q_KT.shape, jnp.float32),
    )
    first = first_ref[b * pl.num_programs(2) + i]
    max_1T, sum_1T, y_KT = lax.fori_loop(first, i + 1, step, start)
    # At least the 1 of the largest score; 0 where no key was visible, which must not give NaN.
    sum_1T = jnp.maximum(sum_1T, 1)
    y_KT = y_KT / (sum_1T * (1 - plan.rate))
    y_ref[...] = y_KT.astype(y_ref.dtype)
    if saved_refs:
        rest_ref, lse_ref = saved_refs
        rest_ref[...] = (y_KT - y_ref[...].astype(jnp.float32)).astype(rest_ref.dtype)
        lse_ref[...] = max_1T + jnp.log(sum_1T)


def _backward_kernel(
    plan: _Plan, last_ref: Ref, scalars_ref: Ref,
    q_ref: Ref, k_ref: Ref, v_ref: Ref, query_ids_ref: Ref, key_ids_ref: Ref,
    g_ref: Ref, lse_ref: Ref, delta_ref: Ref,
    dq_ref: Ref, dk_ref: Ref, dv_ref: Ref, dq_sum_ref: Ref,
) -> None:  # fmt: skip
    """One block of keys against its blocks of queries; dq adds up over the blocks of keys."""
    b, h, j = (pl.program_id(axis) for axis in range(3))
    blocks = pl.num_programs(2)
    k_KS, v_KS, key_ids_1S = k_ref[...], v_ref[...], key_ids_ref[...]
    block = plan.block

    @pl.when(j == 0)
    def _() -> None:
        dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dk_KS, dv_KS = carry
        at = pl.ds(pl.multiple_of(i * block, block), block)
        q_KT, g_KT = q_ref[:, at], g_ref[:, at]
        s_ST = _scores(q_KT, k_KS, query_ids_ref[:, at], key_ids_1S, (i - j) * block)
        p_ST = jnp.exp(s_ST - lse_ref[:, at])
        dp_ST = _product(v_KS, g_KT, 0, 0)
        p_kept_ST = p_ST
        if plan.rate:
            kept_ST = _kept(plan, scalars_ref, p_ST.shape, b, h, i * block, j * block)
            p_kept_ST, dp_ST = (jnp.where(kept_ST, x, 0) for x in (p_ST, dp_ST))
        # All of ds and p is short of the factor 1 / (1 - rate), which the sums get in the end.
        ds_ST = (p_ST * (dp_ST - delta_ref[:, at] * (1 - plan.rate))).astype(k_KS.dtype)
        dq_sum_ref[:, at] += _product(k_KS, ds_ST, 1, 0)
        dk_KS += _product(q_KT, ds_ST, 1, 1)
        return dk_KS, dv_KS + _product(g_KT, p_kept_ST.astype(g_KT.dtype), 1, 1)

    zeros_KS = jnp.zeros(k_KS.shape, jnp.float32)
    dk_KS, dv_KS = lax.fori_loop(j, last_ref[b * blocks + j] + 1, step, (zeros_KS, zeros_KS))
    factor = 1 / (1 - plan.rate)
    factor_qk = factor / math.sqrt(k_KS.shape[0])
    dk_ref[...] = (dk_KS * factor_qk).astype(dk_ref.dtype)
    dv_ref[...] = (dv_KS * factor).astype(dv_ref.dtype)

    @pl.when(j == blocks - 1)
    def _() -> None:
        dq_ref[...] = (dq_sum_ref[...] * factor_qk).astype(dq_ref.dtype)


def _spec(array: Any, block: int) -> pl.BlockSpec:
    """One program's part of [B, H, K, T] or [B, 1, T]: a block of tokens, or all (block 0)."""

    def index(b: Any, h: Any, i: Any, *_: Any) -> tuple[Any, ...]:
        return (*(b, h)[: array.ndim - 2], 0, i if block else 0)

    lead = (None,) * (array.ndim - 2)
    return pl.BlockSpec((*lead, array.shape[-2], block or array.shape[-1]), index)


def _call(
    kernel: Any, plan: _Plan, scalars: tuple[Array, Array], inputs: dict[str, tuple[Array, int]],
    outputs: dict[str, tuple[Any, int]], scratch: tuple[Any, ...] = (),
) -> list[Array]:  # fmt: skip
    """Runs a kernel for every row, head and block of tokens.

    Args:
      kernel: gets plan, scalars, inputs, outputs, scratch.
      plan: of the kernel.
      scalars: arrays for the scalar memory.
      inputs, outputs: name -> the array (or its shape), and the block of tokens that a program
        gets of it (0: all of them).
      scratch: buffers that stay from block to block.
    """
    B, H, K, T = inputs["q"][0].shape
    # Two products forward, five backward, of a block with those up to itself: what XLA plans with,
    # and what `--mode=compile` reads.
    products, pairs = 5 if "g" in inputs else 2, T * (T + plan.block) // 2
    moved = [array for array, _ in (*inputs.values(), *outputs.values())]
    cost = pl.CostEstimate(
        flops=products * 2 * B * H * K * pairs,
        bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in moved),
        transcendentals=B * H * pairs,
    )
    # A program of the last axis reads what the one before it left in `scratch`.
    order = (pltpu.PARALLEL, pltpu.PARALLEL, pltpu.ARBITRARY)
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, H, T // plan.block),
            in_specs=[_spec(*pair) for pair in inputs.values()],
            out_specs=[_spec(*pair) for pair in outputs.values()],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(shape.shape, shape.dtype) for shape, _ in outputs.values()],
        compiler_params=pltpu.CompilerParams(dimension_semantics=order),
        interpret=plan.interpret,
        cost_estimate=cost,
    )(*scalars, *(array for array, _ in inputs.values()))


def _common(query_ids_B1T: Array, key_ids_B1T: Array, block: int) -> Array:
    """Returns bool [B, I, J]: block i of queries may see something of block j of keys.

    By the ranges of their ids, which is exact for segments one after the other.
    """
    query, key = (x.reshape(x.shape[0], -1, block) for x in (query_ids_B1T, key_ids_B1T))
    common = query.min(-1)[:, :, None] <= key.max(-1)[:, None, :]
    common &= key.min(-1)[:, None, :] <= query.max(-1)[:, :, None]
    return common & jnp.tril(jnp.ones((1, *common.shape[1:]), bool))


def _run_forward(plan: _Plan, arrays: tuple[Array, ...], save: bool) -> list[Array]:
    """Returns y and, where `save`, what its rounding left out and the log-sum-exp [B, H, 1, T]."""
    q, k, v, query_ids, key_ids, scalars = arrays
    first = jnp.argmax(_common(query_ids, key_ids, plan.block), axis=2).astype(jnp.int32).ravel()
    outputs: dict[str, tuple[Any, int]] = {"y": (v, plan.block)}
    if save:
        lse = jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[3]), jnp.float32)
        outputs |= {"rest": (v, plan.block), "lse": (lse, plan.block)}
    inputs = {
        "q": (q, plan.block), "k": (k, 0), "v": (v, 0),
        "query_ids": (query_ids, plan.block), "key_ids": (key_ids, 0),
    }  # fmt: skip
    return _call(_forward_kernel, plan, (first, scalars), inputs, outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(plan: _Plan, *arrays: Array) -> Array:
    """Of q, k, v [B, H, K, T], ids [B, 1, T], T a multiple of the block, and the scalars [3]."""
    return _run_forward(plan, arrays, save=False)[0]


def _forward(plan: _Plan, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    """Returns y and what the gradient needs: all of size O(T)."""
    saved = _run_forward(plan, arrays, save=True)
    return saved[0], (*arrays, *saved)


def _backward(plan: _Plan, saved: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    """Returns dq, dk, dv, and no gradient of ids and scalars."""
    q, k, v, query_ids, key_ids, scalars, y, rest, lse = saved
    common = _common(query_ids, key_ids, plan.block)
    last = common.shape[1] - 1 - jnp.argmax(common[:, ::-1], axis=1).astype(jnp.int32).ravel()
    # y is needed more exactly than bfloat16 has it: its error would shift all of a query's dS at
    # once, and be the largest error of dq and dk.
    y = y.astype(jnp.float32) + rest.astype(jnp.float32)
    delta = (g.astype(jnp.float32) * y).sum(2, keepdims=True)
    dq, dk, dv = _call(
        _backward_kernel, plan, (last, scalars),
        {
            "q": (q, 0), "k": (k, plan.block), "v": (v, plan.block),
            "query_ids": (query_ids, 0), "key_ids": (key_ids, plan.block),
            "g": (g, 0), "lse": (lse, 0), "delta": (delta, 0),
        },
        {"dq": (q, 0), "dk": (k, plan.block), "dv": (v, plan.block)},
        (pltpu.VMEM(q.shape[2:], jnp.float32),),
    )  # fmt: skip
    return dq, dk, dv, None, None, None


_flash.defvjp(_forward, _backward)


def _padded(
    plan: _Plan, q_BTHK: Array, k_BTHK: Array, v_BTHK: Array,
    query_ids_BT: Array, key_ids_BT: Array, words: Array, heads_BH: Array,
) -> Array:  # fmt: skip
    """Brings the arrays into the kernels' layout, with whole blocks of tokens, and back."""
    length = q_BTHK.shape[1]
    more = -length % plan.block
    heads = (
        jnp.pad(x.transpose(0, 2, 3, 1), [(0, 0)] * 3 + [(0, more)])
        for x in (q_BTHK, k_BTHK, v_BTHK)
    )
    # One id for all padding, so that no row of it is empty. Which one does not matter: padding is
    # after every real query, so hidden from it.
    ids = (jnp.pad(x, [(0, 0), (0, more)])[:, None] for x in (query_ids_BT, key_ids_BT))
    # Of rows and heads the first number, b * H + h in the whole array, says the others.
    scalars = jnp.concatenate([words, heads_BH[0, :1]])
    return _flash(plan, *heads, *ids, scalars)[..., :length].transpose(0, 3, 1, 2)


def flash(
    q_BTHK: Array,
    k_BTHK: Array,
    v_BTHK: Array,
    query_ids_BT: Array,
    key_ids_BT: Array,
    dropout_rate: float = 0.0,
    dropout_words: Array | None = None,
    *,
    mesh: Mesh | None = None,
    interpret: bool = False,
    block: int | None = None,
) -> Array:
    """Returns dropout(softmax(q k^T / sqrt(K), hidden keys at weight 0)) v, as [B, T, H, K].

    Query t sees key s if s <= t and query_ids[b, t] == key_ids[b, s]. As `ops.attention.attend`
    with those keys visible, and with its dropout mask, but without an array [T, T], in the forward
    pass as in the gradient. Scores and softmax are float32; the products take the dtype of q, k, v
    (float32 in the precision that `jax_default_matmul_precision` says) and add up in float32. The
    result does not depend on the mesh, its dropout mask included.

    Args:
      q_BTHK, k_BTHK, v_BTHK: queries, keys, values; bfloat16 or float32, any T and K. The fast
        memory holds one row and head of all of them: 16,384 tokens of width 64 compile for a v5e.
      query_ids_BT: int32, the segment of each query.
      key_ids_BT: int32, the same, but another number for a key that no query shall see. A query
        without any visible key gets 0.
      dropout_rate: of the attention weights.
      dropout_words: uint32 [2]; None: no dropout.
      mesh: of the devices that share the rows and heads, as in `gptjax.mesh.by_rows_and_heads`;
        None: one device.
      interpret: run the kernel's operations one by one on any device, for tests.
      block: tokens of a block, a multiple of 128 (any where interpreted); None: chosen by T.
    """
    length, heads = q_BTHK.shape[1:3]
    rate = 0.0 if dropout_words is None else dropout_rate
    plan = _Plan(length, heads, rate, block or _block_size(length), interpret)
    inputs = (q_BTHK, k_BTHK, v_BTHK, query_ids_BT, key_ids_BT, dropout_words)
    return partition.shard_over_batch_and_heads(functools.partial(_padded, plan), mesh, *inputs)
