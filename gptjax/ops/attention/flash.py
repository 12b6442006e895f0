"""Flash attention as a Pallas kernel for TPUs: causal, in segments, with dropout, differentiable.

FlashAttention (Dao et al. 2022, algorithms 2 and 4); one kernel computes all three gradients. Only
one block of scores exists at a time, so that the memory grows with T and not with T^2. The dropout
mask is that of `gptjax.ops.dropout.keep` on [B, H, T, T], computed again from the index of each
score: the same as in `gptjax.ops.attention.plain`, and the same on every mesh.

Letters of shapes are those of `gptjax.batch`. In the kernels arrays are [B, H, K, T] and a block of
scores is [S, T]. The last axis is on the lanes of a TPU. With tokens there, a head of width 64 is
not padded to 128 lanes, the statistics of the queries are rows [1, T], and sums over keys run over
sublanes, which is cheaper than over lanes. Values have the names of the paper: s are the scores, p
the attention weights, lse the log-sum-exp of the scores of a query, dx is the gradient of x, g that
of the result y, and delta is the sum of g * y over a head.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from gptjax.ops import dropout
from gptjax.ops.attention.inputs import AttentionInputs, shard_over_batch_and_heads
from gptjax.ops.dropout import DropoutKey
from gptjax.ops.matmul import product

Array = jax.Array
Ref = Any

LANES = 128
BLOCK = 256


@dataclasses.dataclass(frozen=True)
class _KernelConfig:
    """The constants that a kernel is compiled with. Hashable, because `custom_vjp` needs that."""

    length: int
    """Tokens of a row without padding; the dropout mask depends on it."""
    heads: int
    """Heads of the whole model, on all devices; the dropout mask depends on it."""
    rate: float
    """The dropout rate; 0: no dropout."""
    block: int
    """Queries, and keys, of a block."""
    interpret: bool
    """Run the kernel's operations one by one, on any device."""


class _KernelInputs(NamedTuple):
    """The arrays of a kernel; T is a multiple of the block."""

    q: Array
    """[B, H, K, T], as are k and v."""
    k: Array
    v: Array
    query_ids: Array
    """int32 [B, 1, T], as are the key_ids."""
    key_ids: Array
    scalars: Array
    """uint32 [3]: the two numbers of the dropout key, and b * H + h in the whole batch of the first
    row and head here."""


def _block_size(length: int) -> int:
    """Returns 256 if that needs no more padding than 128, the number of lanes; else 128."""
    return BLOCK if pl.cdiv(length, LANES) * LANES % BLOCK == 0 else LANES


def _scores(
    q_KT: Array, k_KS: Array, query_ids_1T: Array, key_ids_1S: Array, distance: Any
) -> Array:
    """Returns the scores of a block, float32 [S, T], -inf for hidden keys.

    `distance` is the place of the first query in the row, minus the place of the first key.
    """
    s_ST = product(k_KS, q_KT, 0, 0) * (1 / math.sqrt(q_KT.shape[0]))
    key, query = (lax.broadcasted_iota(jnp.int32, s_ST.shape, axis) for axis in range(2))
    visible_ST = (key - query <= distance) & (key_ids_1S.reshape(-1, 1) == query_ids_1T)
    return jnp.where(visible_ST, s_ST, -jnp.inf)


def _kept(
    config: _KernelConfig, scalars_ref: Ref, shape: tuple[int, ...],
    b: Any, h: Any, t: Any, s: Any,
) -> Array:  # fmt: skip
    """Returns the dropout mask of a block of scores, bool [S, T].

    Args:
      config: of the kernel.
      scalars_ref: as `_KernelInputs.scalars`.
      shape: of the block.
      b, h: the row and the head, counted from the first of this device.
      t, s: the places of the block's first query and first key in the row.
    """
    bits, first = (scalars_ref[0], scalars_ref[1]), scalars_ref[2]
    row, head, t, s = (x.astype(jnp.uint32) for x in (b, h, t, s))
    length = jnp.uint32(config.length)
    start = ((first + row * jnp.uint32(config.heads) + head) * length + t) * length + s
    key, query = (
        lax.broadcasted_iota(jnp.int32, shape, axis).astype(jnp.uint32) for axis in range(2)
    )
    return dropout.keep_at(query * length + key + start, bits, config.rate)


def _forward_kernel(  # noqa: PLR0913 (Pallas passes one reference for each array)
    config: _KernelConfig, first_ref: Ref, scalars_ref: Ref,
    q_ref: Ref, k_ref: Ref, v_ref: Ref, query_ids_ref: Ref, key_ids_ref: Ref,
    y_ref: Ref, *saved_refs: Ref,
) -> None:  # fmt: skip
    """Computes y of one block of queries, in a loop over the blocks of keys that they may see.

    The softmax is updated with each block of keys.

    Args:
      config: of the kernel.
      first_ref: int32 [B * blocks], the first block of keys of each block of queries.
      scalars_ref: as `_KernelInputs.scalars`.
      q_ref, query_ids_ref: the block of queries.
      k_ref, v_ref, key_ids_ref: the whole row.
      y_ref: is written.
      *saved_refs: are written if the gradient needs them: the rounding error of y (y in float32
        minus y in its dtype), and the log-sum-exp.
    """
    b, h, i = (pl.program_id(axis) for axis in range(3))
    q_KT, query_ids_1T = q_ref[...], query_ids_ref[...]
    block = config.block

    def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        max_1T, sum_1T, y_KT = carry
        at = pl.ds(pl.multiple_of(j * block, block), block)
        s_ST = _scores(q_KT, k_ref[:, at], query_ids_1T, key_ids_ref[:, at], (i - j) * block)
        new_1T = jnp.maximum(max_1T, s_ST.max(0, keepdims=True))
        # The maximum starts at a finite number, so that exp(-inf - max) is 0 and not NaN while all
        # keys so far are hidden.
        p_ST = jnp.exp(s_ST - new_1T)
        shrink_1T = jnp.exp(max_1T - new_1T)
        sum_1T = sum_1T * shrink_1T + p_ST.sum(0, keepdims=True)
        if config.rate:
            kept_ST = _kept(config, scalars_ref, p_ST.shape, b, h, i * block, j * block)
            p_ST = jnp.where(kept_ST, p_ST, 0)
        v_KS = v_ref[:, at]
        return new_1T, sum_1T, y_KT * shrink_1T + product(v_KS, p_ST.astype(v_KS.dtype), 1, 0)

    start = (
        jnp.full((1, block), jnp.finfo(jnp.float32).min, jnp.float32),
        jnp.zeros((1, block), jnp.float32),
        jnp.zeros(q_KT.shape, jnp.float32),
    )
    first = first_ref[b * pl.num_programs(2) + i]
    max_1T, sum_1T, y_KT = lax.fori_loop(first, i + 1, step, start)
    # The largest score adds 1 to the sum, so that it is at least 1. Only a query that sees no key
    # has the sum 0; with 1 instead its y is 0 and not NaN.
    sum_1T = jnp.maximum(sum_1T, 1)
    y_KT = y_KT / (sum_1T * (1 - config.rate))
    y_ref[...] = y_KT.astype(y_ref.dtype)
    if saved_refs:
        error_ref, lse_ref = saved_refs
        error_ref[...] = (y_KT - y_ref[...].astype(jnp.float32)).astype(error_ref.dtype)
        lse_ref[...] = max_1T + jnp.log(sum_1T)


def _backward_kernel(  # noqa: PLR0913 (see `_forward_kernel`)
    config: _KernelConfig, last_ref: Ref, scalars_ref: Ref,
    q_ref: Ref, k_ref: Ref, v_ref: Ref, query_ids_ref: Ref, key_ids_ref: Ref,
    g_ref: Ref, lse_ref: Ref, delta_ref: Ref,
    dq_ref: Ref, dk_ref: Ref, dv_ref: Ref, dq_sum_ref: Ref,
) -> None:  # fmt: skip
    """Computes the gradients of one block of keys, in a loop over the queries that may see them.

    Args:
      config: of the kernel.
      last_ref: int32 [B * blocks], the last block of queries of each block of keys.
      scalars_ref: as `_KernelInputs.scalars`.
      q_ref, query_ids_ref, g_ref, lse_ref, delta_ref: the whole row.
      k_ref, v_ref, key_ids_ref: the block of keys.
      dk_ref, dv_ref: of the block of keys, are written.
      dq_ref: of the whole row, is written after the last block of keys.
      dq_sum_ref: float32 buffer that all blocks of keys of a row and head add to.
    """
    b, h, j = (pl.program_id(axis) for axis in range(3))
    blocks = pl.num_programs(2)
    k_KS, v_KS, key_ids_1S = k_ref[...], v_ref[...], key_ids_ref[...]
    block = config.block

    @pl.when(j == 0)
    def _() -> None:
        dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dk_KS, dv_KS = carry
        at = pl.ds(pl.multiple_of(i * block, block), block)
        q_KT, g_KT = q_ref[:, at], g_ref[:, at]
        s_ST = _scores(q_KT, k_KS, query_ids_ref[:, at], key_ids_1S, (i - j) * block)
        p_ST = jnp.exp(s_ST - lse_ref[:, at])
        dp_ST = product(v_KS, g_KT, 0, 0)
        p_kept_ST = p_ST
        if config.rate:
            kept_ST = _kept(config, scalars_ref, p_ST.shape, b, h, i * block, j * block)
            p_kept_ST, dp_ST = (jnp.where(kept_ST, x, 0) for x in (p_ST, dp_ST))
        # ds and p lack the factor 1 / (1 - rate); the sums are multiplied with it at the end.
        ds_ST = (p_ST * (dp_ST - delta_ref[:, at] * (1 - config.rate))).astype(k_KS.dtype)
        dq_sum_ref[:, at] += product(k_KS, ds_ST, 1, 0)
        dk_KS += product(q_KT, ds_ST, 1, 1)
        return dk_KS, dv_KS + product(g_KT, p_kept_ST.astype(g_KT.dtype), 1, 1)

    zeros_KS = jnp.zeros(k_KS.shape, jnp.float32)
    dk_KS, dv_KS = lax.fori_loop(j, last_ref[b * blocks + j] + 1, step, (zeros_KS, zeros_KS))
    factor = 1 / (1 - config.rate)
    factor_qk = factor / math.sqrt(k_KS.shape[0])
    dk_ref[...] = (dk_KS * factor_qk).astype(dk_ref.dtype)
    dv_ref[...] = (dv_KS * factor).astype(dv_ref.dtype)

    @pl.when(j == blocks - 1)
    def _() -> None:
        dq_ref[...] = (dq_sum_ref[...] * factor_qk).astype(dq_ref.dtype)


def _spec(array: Any, block: int) -> pl.BlockSpec:
    """Returns which part of [B, H, K, T] or [B, 1, T] one run of a kernel gets.

    A block of this many tokens, or if `block` is 0 the whole row.
    """

    def index(b: Any, h: Any, i: Any, *_: Any) -> tuple[Any, ...]:
        return (*(b, h)[: array.ndim - 2], 0, i if block else 0)

    lead = (None,) * (array.ndim - 2)
    return pl.BlockSpec((*lead, array.shape[-2], block or array.shape[-1]), index)


def _call(
    kernel: Any,
    config: _KernelConfig,
    scalars: tuple[Array, Array],
    inputs: dict[str, tuple[Array, int]],
    outputs: dict[str, tuple[Any, int]],
    scratch: tuple[Any, ...] = (),
) -> list[Array]:
    """Runs a kernel for every row, head and block of tokens.

    Args:
      kernel: is called with the arguments below, in this order.
      config: of the kernel.
      scalars: arrays for the scalar memory.
      inputs, outputs: name -> the array (or its shape), and how many of its tokens a run of the
        kernel gets; 0 means the whole row.
      scratch: buffers that keep their contents from one block of a row to the next.
    """
    B, H, K, T = inputs["q"][0].shape
    # XLA schedules by this estimate, and the mode `compile` reports it. There are two matrix
    # products forward and five backward for each pair of blocks on or below the diagonal.
    products, pairs = 5 if "g" in inputs else 2, T * (T + config.block) // 2
    moved = [array for array, _ in (*inputs.values(), *outputs.values())]
    cost = pl.CostEstimate(
        flops=products * 2 * B * H * K * pairs,
        bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in moved),
        transcendentals=B * H * pairs,
    )
    # Along the last axis of the grid a run of the kernel reads the `scratch` of the run before it.
    order = (pltpu.PARALLEL, pltpu.PARALLEL, pltpu.ARBITRARY)
    return pl.pallas_call(
        functools.partial(kernel, config),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, H, T // config.block),
            in_specs=[_spec(*pair) for pair in inputs.values()],
            out_specs=[_spec(*pair) for pair in outputs.values()],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(shape.shape, shape.dtype) for shape, _ in outputs.values()],
        compiler_params=pltpu.CompilerParams(dimension_semantics=order),
        interpret=config.interpret,
        cost_estimate=cost,
    )(*scalars, *(array for array, _ in inputs.values()))


def _common(query_ids_B1T: Array, key_ids_B1T: Array, block: int) -> Array:
    """Returns bool [B, I, J]: whether block i of queries may see a key of block j of keys.

    It compares the ranges of their ids. That is exact if the segments of a row follow each other in
    the order of their ids; otherwise some blocks may be computed although nothing is visible.
    """
    query, key = (x.reshape(x.shape[0], -1, block) for x in (query_ids_B1T, key_ids_B1T))
    common = query.min(-1)[:, :, None] <= key.max(-1)[:, None, :]
    common &= key.min(-1)[:, None, :] <= query.max(-1)[:, :, None]
    return common & jnp.tril(jnp.ones((1, *common.shape[1:]), bool))


def _run_forward(config: _KernelConfig, inputs: _KernelInputs, save: bool) -> list[Array]:
    """Returns [y], or if `save` is True y, its rounding error and the log-sum-exp [B, H, 1, T]."""
    q, k, v, query_ids, key_ids, scalars = inputs
    first = jnp.argmax(_common(query_ids, key_ids, config.block), axis=2).astype(jnp.int32).ravel()
    outputs: dict[str, tuple[Any, int]] = {"y": (v, config.block)}
    if save:
        lse = jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[3]), jnp.float32)
        outputs |= {"error": (v, config.block), "lse": (lse, config.block)}
    arrays = {
        "q": (q, config.block), "k": (k, 0), "v": (v, 0),
        "query_ids": (query_ids, config.block), "key_ids": (key_ids, 0),
    }  # fmt: skip
    return _call(_forward_kernel, config, (first, scalars), arrays, outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(config: _KernelConfig, inputs: _KernelInputs) -> Array:
    """Returns y [B, H, K, T]."""
    return _run_forward(config, inputs, save=False)[0]


_Residuals = tuple[_KernelInputs, Array, Array, Array]


def _forward(config: _KernelConfig, inputs: _KernelInputs) -> tuple[Array, _Residuals]:
    y, error, lse = _run_forward(config, inputs, save=True)
    return y, (inputs, y, error, lse)


def _backward(config: _KernelConfig, saved: _Residuals, g: Array) -> tuple[_KernelInputs]:
    (q, k, v, query_ids, key_ids, scalars), y, error, lse = saved
    common = _common(query_ids, key_ids, config.block)
    last = common.shape[1] - 1 - jnp.argmax(common[:, ::-1], axis=1).astype(jnp.int32).ravel()
    # delta needs y in float32. An error of delta changes the gradients of all scores of a query in
    # the same direction; with y in bfloat16 it would be the largest error of dq and dk.
    y = y.astype(jnp.float32) + error.astype(jnp.float32)
    delta = (g.astype(jnp.float32) * y).sum(2, keepdims=True)
    dq, dk, dv = _call(
        _backward_kernel, config, (last, scalars),
        {
            "q": (q, 0), "k": (k, config.block), "v": (v, config.block),
            "query_ids": (query_ids, 0), "key_ids": (key_ids, config.block),
            "g": (g, 0), "lse": (lse, 0), "delta": (delta, 0),
        },
        {"dq": (q, 0), "dk": (k, config.block), "dv": (v, config.block)},
        (pltpu.VMEM(q.shape[2:], jnp.float32),),
    )  # fmt: skip
    return (_KernelInputs(dq, dk, dv, None, None, None),)  # type: ignore[arg-type]


_flash.defvjp(_forward, _backward)


def _pad_and_run(
    config: _KernelConfig, inputs: AttentionInputs, dropout_key: DropoutKey, heads_BH: Array
) -> Array:
    """Runs the kernel on arrays in its layout, padded to whole blocks; returns [B, T, H, K]."""
    # The numbers in heads_BH are consecutive on each device, so that the first one is enough.
    scalars = jnp.concatenate([dropout_key.bits, heads_BH[0, :1]])
    length = inputs.q_BTHK.shape[1]
    more = -length % config.block
    q, k, v = (
        jnp.pad(x.transpose(0, 2, 3, 1), [(0, 0)] * 3 + [(0, more)])
        for x in (inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHK)
    )
    # All padding gets the same id, 0, so that each padding query sees a key. Real queries do not
    # see padding, because it comes after them.
    query_ids, key_ids = (
        jnp.pad(x, [(0, 0), (0, more)])[:, None] for x in (inputs.query_ids_BT, inputs.key_ids_BT)
    )
    y = _flash(config, _KernelInputs(q, k, v, query_ids, key_ids, scalars))
    return y[..., :length].transpose(0, 3, 1, 2)


def flash(
    inputs: AttentionInputs,
    dropout_key: DropoutKey | None = None,
    *,
    mesh: Mesh | None = None,
    interpret: bool = False,
    block: int | None = None,
) -> Array:
    """Returns `gptjax.ops.attention.causal` of these arguments, [B, T, H, K].

    No array is [T, T], neither in the forward pass nor in the backward pass. Scores and softmax are
    float32. The matrix products take the dtype of q, k and v (for float32 in the precision of
    `jax_default_matmul_precision`) and are summed in float32. A query without a visible key gets 0.

    Args:
      inputs: bfloat16 or float32, with any T and K. All of q, k and v of one row and head must fit
        the vector memory of the TPU: 16,384 tokens of width 64 compile for a v5e.
      dropout_key: of the attention weights; None: no dropout.
      mesh: the devices that share the rows and heads; None: a single device.
      interpret: run the kernel's operations one by one on any device, for tests.
      block: tokens of a block, a multiple of 128 unless `interpret` is True; None: chosen by T.
    """
    length, heads = inputs.q_BTHK.shape[1:3]
    rate = 0.0 if dropout_key is None else dropout_key.rate
    config = _KernelConfig(length, heads, rate, block or _block_size(length), interpret)
    kernel = functools.partial(_pad_and_run, config)
    return shard_over_batch_and_heads(kernel, mesh, inputs, dropout_key)
