"""Flash attention for TPUs, in Pallas: causal, with segments and dropout, and differentiable.

The kernels follow algorithms 2 and 4 of FlashAttention (Dao et al. 2022). The forward pass is one
kernel, and the backward pass is one kernel that computes the gradients of q, k and v. Only one
block of scores exists at a time, so the memory grows with T and not with T^2. The dropout mask is
the mask `gptjax.ops.dropout.keep` of an array [B, H, T, T]. Both kernels compute the mask of a
block from the index of each score. Therefore the mask is the same as in
`gptjax.ops.attention.plain`, and the same on every mesh.

The letters of shapes are defined in `gptjax.batch`. In the kernels the arrays are [B, H, K, T], and
a block of scores is [S, T]. The last axis, which has the tokens, lies on the lanes of a TPU. This
has three advantages:

- A head of width 64 is not padded to 128 lanes.
- The statistics of the queries are rows [1, T].
- The sums over keys run over sublanes, which is cheaper than sums over lanes.

The values have the names of the paper: s is a score, p is an attention weight, lse is the
log-sum-exp of the scores of a query, dx is the gradient of x, g is the gradient of the result y,
and delta is the sum of g * y over a head.
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
    """The constants of a compiled kernel. The class is hashable, because `custom_vjp` needs it."""

    length: int
    """The number of tokens in a row, without the padding to whole blocks. The dropout mask depends
    on this number."""
    heads: int
    """The number of heads on all devices together. The dropout mask depends on this number."""
    rate: float
    """The probability that dropout sets an attention weight to 0. 0 means no dropout."""
    block: int
    """The number of queries in a block of queries, and of keys in a block of keys."""
    interpret: bool
    """Whether the kernel's operations are run one by one, which works on any device."""


class _KernelInputs(NamedTuple):
    """The arrays of a kernel. T is a multiple of the number of tokens in a block."""

    q: Array
    """[B, H, K, T]; k and v have the same shape."""
    k: Array
    v: Array
    query_ids: Array
    """int32 [B, 1, T]; `key_ids` has the same shape."""
    key_ids: Array
    scalars: Array
    """uint32 [3]: the two numbers of the dropout key, and the index b * H + h (in the whole batch)
    of the first row and head on this device."""


def _block_size(length: int) -> int:
    """Returns the number of tokens in a block.

    It is 256 if a row then needs no more padding than with 128, the number of lanes; otherwise it
    is 128.
    """
    return BLOCK if pl.cdiv(length, LANES) * LANES % BLOCK == 0 else LANES


def _scores(
    q_KT: Array, k_KS: Array, query_ids_1T: Array, key_ids_1S: Array, distance: Any
) -> Array:
    """Returns the scores of a block, float32 [S, T].

    The score is -inf if the query must not see the key. `distance` is the index of the block's
    first query in the row, minus the index of its first key in the row.
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
      config: the constants of the kernel.
      scalars_ref: a reference to `_KernelInputs.scalars`.
      shape: the shape of the block, (S, T).
      b, h: the indices of the row and the head on this device.
      t, s: the indices of the block's first query and first key in the row.
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
    """Computes y of one block of queries, in a loop over the blocks of keys that they can see.

    Each step of the loop updates the softmax with one block of keys.

    Args:
      config: the constants of the kernel.
      first_ref: int32 [B * blocks], the index of the first block of keys that each block of queries
        can see.
      scalars_ref: a reference to `_KernelInputs.scalars`.
      q_ref, query_ids_ref: references to the block of queries.
      k_ref, v_ref, key_ids_ref: references to all keys of the row.
      y_ref: the reference that the result is written to.
      *saved_refs: two references for results that the backward pass needs, or nothing. The first
        result is the rounding error of y (y in float32 minus y in its dtype), and the second result
        is the log-sum-exp.
    """
    b, h, i = (pl.program_id(axis) for axis in range(3))
    q_KT, query_ids_1T = q_ref[...], query_ids_ref[...]
    block = config.block

    def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        max_1T, sum_1T, y_KT = carry
        at = pl.ds(pl.multiple_of(j * block, block), block)
        s_ST = _scores(q_KT, k_ref[:, at], query_ids_1T, key_ids_ref[:, at], (i - j) * block)
        new_1T = jnp.maximum(max_1T, s_ST.max(0, keepdims=True))
        # The maximum starts at a finite number. Therefore exp(-inf - max) is 0 and not NaN if the
        # query can see no key of this block and of the blocks before it.
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
    # The sum is at least 1, because the largest score adds exp(0) = 1. Only a query that sees no
    # key has the sum 0. The sum is then replaced by 1, so that y is 0 and not NaN.
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
    """Computes the gradients for one block of keys, in a loop over the queries that can see them.

    Args:
      config: the constants of the kernel.
      last_ref: int32 [B * blocks], the index of the last block of queries that can see each block
        of keys.
      scalars_ref: a reference to `_KernelInputs.scalars`.
      q_ref, query_ids_ref, g_ref, lse_ref, delta_ref: references to all queries of the row.
      k_ref, v_ref, key_ids_ref: references to the block of keys.
      dk_ref, dv_ref: the references that the gradients of this block of keys are written to.
      dq_ref: the reference that the gradient of all queries of the row is written to, after the
        last block of keys.
      dq_sum_ref: a float32 buffer, to which all blocks of keys of a row and head add.
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
        # ds and p lack the factor 1 / (1 - rate), because the sums are multiplied by it at the end.
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
    """Returns the part of an array [B, H, K, T] or [B, 1, T] that one grid step of a kernel gets.

    It is a block of `block` tokens of one row (and head). 0 means all tokens of the row.
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
    """Runs a kernel on a grid that has one step for every row, head and block of tokens.

    Args:
      kernel: the kernel. Each grid step calls it with references to the arguments below, in their
        order.
      config: the constants of the kernel.
      scalars: arrays for the scalar memory.
      inputs, outputs: name -> the array (or its shape), and the number of its tokens that a grid
        step gets. 0 means all tokens of the row.
      scratch: buffers that keep their contents from one block of a row to the next.
    """
    B, H, K, T = inputs["q"][0].shape
    # XLA uses this estimate for its schedule, and `--mode=compile` reports it. For each pair of
    # blocks on or below the diagonal, the forward kernel has two matrix products and the backward
    # kernel has five.
    products, pairs = 5 if "g" in inputs else 2, T * (T + config.block) // 2
    moved = [array for array, _ in (*inputs.values(), *outputs.values())]
    cost = pl.CostEstimate(
        flops=products * 2 * B * H * K * pairs,
        bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in moved),
        transcendentals=B * H * pairs,
    )
    # Only the steps along the last axis of the grid must run in order, because each of them reads
    # the `scratch` that the step before it wrote.
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
    """Returns bool [B, I, J]: whether a query of block i might see a key of block j.

    The function compares the ranges of the blocks' segment ids. The result is exact if the segments
    of a row are in the order of their ids. Otherwise it can be True although no key is visible, and
    the block is then computed without need.
    """
    query, key = (x.reshape(x.shape[0], -1, block) for x in (query_ids_B1T, key_ids_B1T))
    common = query.min(-1)[:, :, None] <= key.max(-1)[:, None, :]
    common &= key.min(-1)[:, None, :] <= query.max(-1)[:, :, None]
    return common & jnp.tril(jnp.ones((1, *common.shape[1:]), bool))


def _run_forward(config: _KernelConfig, inputs: _KernelInputs, save: bool) -> list[Array]:
    """Returns [y], or [y, rounding error of y, log-sum-exp [B, H, 1, T]] if `save` is True."""
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
    # delta is computed from y in float32. An error of delta changes the gradients of all scores of
    # a query in the same direction. If y were bfloat16, this would be the largest error of dq and
    # dk.
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
    """Transposes the arrays for the kernel, pads them to whole blocks, and runs the kernel.

    The result is transposed back to [B, T, H, K].
    """
    # The kernel needs only the first index of heads_BH. On each device the heads of a row are
    # consecutive, and the index grows by `config.heads` from row to row.
    scalars = jnp.concatenate([dropout_key.bits, heads_BH[0, :1]])
    length = inputs.q_BTHK.shape[1]
    more = -length % config.block
    q, k, v = (
        jnp.pad(x.transpose(0, 2, 3, 1), [(0, 0)] * 3 + [(0, more)])
        for x in (inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHK)
    )
    # All padding gets the id 0, so that each padding query sees a key. Real queries do not see this
    # padding, because it comes after them.
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

    Neither the forward pass nor the backward pass has an array [T, T]. The scores and the softmax
    are float32. The factors of the matrix products have the dtype of q, k and v, and the sums are
    float32. For float32 factors, `jax_default_matmul_precision` sets the precision. The result of a
    query without a visible key is 0.

    Args:
      inputs: the queries, keys and values, bfloat16 or float32, with any T and K. The q, k and v of
        one row and head must fit into the vector memory of the TPU together. For example, 16,384
        tokens of width 64 compile for a v5e.
      dropout_key: the key for the dropout of the attention weights. None means no dropout.
      mesh: the devices over which the rows and heads are sharded. None means a single device.
      interpret: whether to run the kernel's operations one by one on any device, for tests.
      block: the number of tokens in a block. It is a multiple of 128, except if `interpret` is
        True. None means that `_block_size` chooses the number.
    """
    length, heads = inputs.q_BTHK.shape[1:3]
    rate = 0.0 if dropout_key is None else dropout_key.rate
    config = _KernelConfig(length, heads, rate, block or _block_size(length), interpret)
    kernel = functools.partial(_pad_and_run, config)
    return shard_over_batch_and_heads(kernel, mesh, inputs, dropout_key)
