"""Masked self-attention.

`causal` computes it for whole sequences, and `cached` for new tokens and a key/value cache.
`inputs.AttentionInputs` defines the attention mask of `causal`. Each implementation computes this
mask itself: `plain` and `cudnn` with `plain.causal_segments`, `blocked` in `_Group.scores`, and
`flash` in `_scores`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gptjax.config.schema import AttentionKind
from gptjax.errors import require
from gptjax.ops.attention import blocked, plain
from gptjax.ops.attention.inputs import AttentionInputs, shard_over_batch_and_heads
from gptjax.ops.dropout import DropoutKey

Array = jax.Array
Cache = dict[str, Array]
"""The keys and values that one layer has computed so far: "key" and "value", each [B * H, S, K]."""


def cached(
    q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, cache: Cache, offset: Array | int
) -> tuple[Array, Cache]:
    """Computes the attention of new tokens to themselves and to all tokens before them.

    Args:
      q_BTHK, k_BTHK, v_BTHK: the queries, keys and values of the new tokens, which have the
        positions offset, offset + 1, ..., offset + T - 1.
      cache: the keys and values of the tokens at positions 0 to offset - 1.
      offset: the position of the first new token, an int32 scalar.

    Returns:
      The result [B, T, H, K], and the cache with the new keys and values.
    """
    batch, length, heads, width = q_BTHK.shape
    q_NTK, k_NTK, v_NTK = (
        jnp.moveaxis(x, 2, 1).reshape(-1, length, width).astype(cache["key"].dtype)
        for x in (q_BTHK, k_BTHK, v_BTHK)
    )
    cache = {
        name: jax.lax.dynamic_update_slice_in_dim(cache[name], new_NTK, offset, 1)
        for name, new_NTK in (("key", k_NTK), ("value", v_NTK))
    }
    positions_T = offset + jnp.arange(length)
    visible_1TS = plain.causal_cached(positions_T, cache["key"].shape[1])
    y_NTK = plain.attend(q_NTK, cache["key"], cache["value"], visible_1TS)
    y_BHTK = y_NTK.reshape(batch, heads, length, width)
    return jnp.moveaxis(y_BHTK, 1, 2).astype(q_BTHK.dtype), cache


def choose(
    kind: str, platform: str, compute_capability: float, q_BTHK: Array, dropout_rate: float
) -> str:
    """Returns the implementation of `causal` to use: `kind`, or the fastest implementation.

    The fastest implementation is returned if `kind` is "auto". cuDNN has the conditions of
    `jax._src.cudnn`: bfloat16, an even number of tokens, a head width that is a multiple of 8 and
    at most 128, and a GPU of the Ampere generation or newer. cuDNN is not used with dropout,
    because its dropout masks would differ from `gptjax.ops.dropout`.

    Args:
      kind: the value of `ModelConfig.attention`.
      platform: the platform of the devices: "cpu", "gpu" or "tpu".
      compute_capability: the compute capability of NVIDIA GPUs, from
        `gptjax.mesh.compute_capability`.
      q_BTHK: the queries. Only their shape and dtype are used.
      dropout_rate: the dropout rate of the attention weights.

    Raises:
      UserError: `kind` is "pallas" and the devices are not TPUs, or `kind` is "cudnn" and the
        conditions above do not hold.
    """
    _, length, _, head_width = q_BTHK.shape
    shape_fits = length % 2 == 0 and head_width % 8 == 0 and head_width <= 128
    fits = q_BTHK.dtype == jnp.bfloat16 and not dropout_rate and shape_fits
    cudnn = platform == "gpu" and compute_capability >= 8 and fits
    if kind == AttentionKind.AUTO:
        own = {"cpu": AttentionKind.BLOCKED, "tpu": AttentionKind.PALLAS}
        return own.get(platform, AttentionKind.CUDNN if cudnn else AttentionKind.PLAIN)
    require(
        kind != AttentionKind.PALLAS or platform == "tpu",
        f"`model.attention`=pallas: is for TPUs, not for this {platform}; use auto",
    )
    require(
        kind != AttentionKind.CUDNN or cudnn,
        "`model.attention`=cudnn: is for NVIDIA GPUs from Ampere on, bfloat16, no "
        "attention_dropout, heads of a multiple of 8 up to 128, rows of even length; use auto",
    )
    return kind


def cudnn(inputs: AttentionInputs, implementation: Literal["cudnn", "xla"] = "cudnn") -> Array:
    """Returns `causal` without dropout, [B, T, H, K], computed by `jax.nn.dot_product_attention`.

    Args:
      inputs: the queries, keys, values and ids.
      implementation: "cudnn", or "xla" to compute the same on any platform.
    """
    visible_BTT = plain.causal_segments(inputs.query_ids_BT, inputs.key_ids_BT)
    return jax.nn.dot_product_attention(
        inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHK, mask=visible_BTT[:, None],
        implementation=implementation,
    )  # fmt: skip


def causal(
    inputs: AttentionInputs,
    dropout_key: DropoutKey | None = None,
    *,
    kind: str = AttentionKind.PLAIN,
    mesh: Mesh | None = None,
    max_sequence_length: int | None = None,
) -> Array:
    """Returns dropout(softmax(q k^T / sqrt(K))) v over the keys that a query sees, [B, T, H, K].

    All implementations compute the same, with the same dropout mask on every mesh. The result has
    the dtype of q.

    Args:
      inputs: the queries, keys, values and ids. Every query must see at least one key.
      dropout_key: the key for the dropout of the attention weights. None means no dropout.
      kind: the implementation, from `choose`.
      mesh: the devices over which the rows and heads are sharded. None means a single device.
      max_sequence_length: the largest number of tokens in a sequence of a row. The padding of a row
        can be longer, but its results are then undefined. None means the length of the rows. A
        small number makes only the implementation `blocked` faster.
    """
    if kind == AttentionKind.PLAIN:
        return plain.plain(inputs, dropout_key)
    if kind == AttentionKind.CUDNN:
        assert dropout_key is None, "`choose` excludes it"
        return cudnn(inputs)
    if kind == AttentionKind.PALLAS:
        # The import is inside the function, because only TPUs need Pallas.
        from gptjax.ops.attention import flash

        return flash.flash(inputs, dropout_key, mesh=mesh)
    if not inputs.q_BTHK.size:
        return inputs.q_BTHK
    length = inputs.q_BTHK.shape[1]

    def kernel(inputs: AttentionInputs, dropout_key: DropoutKey, heads_BH: Array) -> Array:
        return blocked.blocked(inputs, dropout_key, heads_BH, max_sequence_length or length)

    return shard_over_batch_and_heads(kernel, mesh, inputs, dropout_key)
