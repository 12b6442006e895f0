"""Masked attention behind two functions: `causal` over whole sequences, `attend` to a cache.

Letters of shapes: B batch, T queries, S keys, H heads, K width of a head, X leading axes.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gptjax.config.schema import AttentionKind, Dtype
from gptjax.errors import require
from gptjax.ops import dropout
from gptjax.ops.attention import blocked, partition

Array = jax.Array
# Of a layer: key and value [B * H, S, K].
Cache = dict[str, Array]


def causal_segments(query_ids_BT: Array, key_ids_BT: Array | None = None) -> Array:
    """Returns bool [B, T, T]: query t sees key s if s <= t and both have one id.

    Args:
      query_ids_BT: segment ids. Padding (segment 0) sees the padding before it and itself: its rows
        stay finite and nothing reads them.
      key_ids_BT: the same, but for keys that nobody may see; None: the same.
    """
    key_ids_BT = query_ids_BT if key_ids_BT is None else key_ids_BT
    same_BTS = query_ids_BT[:, :, None] == key_ids_BT[:, None, :]
    length = query_ids_BT.shape[1]
    return same_BTS & jnp.tril(jnp.ones((1, length, length), bool))


def causal_cached(query_positions_T: Array, cache_length: int) -> Array:
    """Returns bool [1, T, S]: a query at position p sees cache entries 0..p."""
    return (jnp.arange(cache_length)[None, :] <= query_positions_T[:, None])[None]


def attend(
    q_XTK: Array,
    k_XSK: Array,
    v_XSK: Array,
    visible_XTS: Array,
    dropout_rate: float = 0.0,
    dropout_words: Array | None = None,
) -> Array:
    """Returns softmax(q k^T / sqrt(K), hidden keys at weight 0) v, as [X..., T, K].

    The plain way, with all scores at once. Scores and softmax are float32 whatever the dtype of q,
    k and v.

    Args:
      q_XTK, k_XSK, v_XSK: queries, keys, values, with any leading axes.
      visible_XTS: bool, which keys a query may see; every query must see at least one.
      dropout_rate: of the attention weights.
      dropout_words: uint32 [2]; None: no dropout.
    """
    scale = 1 / math.sqrt(q_XTK.shape[-1])
    scores_XTS = jnp.einsum("...TK,...SK->...TS", q_XTK, k_XSK, preferred_element_type=jnp.float32)
    scores_XTS = jnp.where(visible_XTS, scores_XTS * scale, jnp.finfo(jnp.float32).min)
    weights_XTS = jax.nn.softmax(scores_XTS, axis=-1)
    if dropout_words is not None and dropout_rate > 0:
        weights_XTS = dropout.dropout(weights_XTS, dropout_words, dropout_rate)
    return jnp.einsum("...TS,...SK->...TK", weights_XTS.astype(v_XSK.dtype), v_XSK)


def cached(
    q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, cache: Cache, offset: Array | int
) -> tuple[Array, Cache]:
    """Returns the attention of new tokens to a cache, [B, T, H, K], and it with them written in.

    Args:
      q_BTHK, k_BTHK, v_BTHK: queries, keys, values of the tokens at offset..offset + T - 1.
      cache: filled up to there.
      offset: int32 scalar.
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
    visible_1TS = causal_cached(positions_T, cache["key"].shape[1])
    y_NTK = attend(q_NTK, cache["key"], cache["value"], visible_1TS)
    y_BHTK = y_NTK.reshape(batch, heads, length, width)
    return jnp.moveaxis(y_BHTK, 1, 2).astype(q_BTHK.dtype), cache


def choose(
    kind: str,
    platform: str,
    dtype: str,
    dropout_rate: float,
    length: int,
    head_width: int,
    capability: float,
) -> str:
    """Returns which implementation computes `causal`: `kind`, or where it is "auto" the best one.

    What cuDNN takes is read from `jax._src.cudnn`: bfloat16, an even number of tokens, heads of a
    multiple of 8 up to 128, Ampere or newer. Its dropout masks would not be ours.

    Args:
      kind: as `ModelConfig.attention`.
      platform: cpu, gpu or tpu.
      dtype: of the products.
      dropout_rate: of the attention weights.
      length: T.
      head_width: K.
      capability: from `sharding.compute_capability`.

    Raises:
      UserError: there is no such kernel for these devices, or it cannot do what is asked.
    """
    fits = length % 2 == 0 and head_width % 8 == 0 and head_width <= 128 and capability >= 8
    cudnn = platform == "gpu" and dtype == Dtype.BFLOAT16 and not dropout_rate and fits
    if kind == AttentionKind.AUTO:
        other = AttentionKind.CUDNN if cudnn else AttentionKind.PLAIN
        own = {"cpu": AttentionKind.BLOCKED, "tpu": AttentionKind.PALLAS}
        return own.get(platform, other)
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


def _plain(q_BTHK, k_BTHK, v_BTHK, query_ids_BT, key_ids_BT, rate, words):
    visible_BTT = causal_segments(query_ids_BT, key_ids_BT)
    # Heads beside the batch first: XLA's CPU products are a third faster so, on others it is free.
    q_BHTK, k_BHTK, v_BHTK = (jnp.moveaxis(x, 2, 1) for x in (q_BTHK, k_BTHK, v_BTHK))
    y_BHTK = attend(q_BHTK, k_BHTK, v_BHTK, visible_BTT[:, None], rate, words)
    return jnp.moveaxis(y_BHTK, 1, 2)


def _cudnn(q_BTHK, k_BTHK, v_BTHK, query_ids_BT, key_ids_BT, implementation="cudnn"):
    visible_BTT = causal_segments(query_ids_BT, key_ids_BT)
    return jax.nn.dot_product_attention(
        q_BTHK, k_BTHK, v_BTHK, mask=visible_BTT[:, None], implementation=implementation
    )


def causal(
    q_BTHK: Array,
    k_BTHK: Array,
    v_BTHK: Array,
    query_ids_BT: Array,
    key_ids_BT: Array,
    rate: float = 0.0,
    words: Array | None = None,
    *,
    kind: str = AttentionKind.PLAIN,
    mesh: Mesh | None = None,
    longest: int = 0,
) -> Array:
    """Returns causal attention within segments, [B, T, H, K] in the dtype of q.

    All kinds compute the same, with the same dropout mask on every mesh.

    Args:
      q_BTHK, k_BTHK, v_BTHK: queries, keys, values.
      query_ids_BT, key_ids_BT: int32, query t sees key s if s <= t and their ids are equal; every
        query must see at least one.
      rate: of the dropout on the attention weights.
      words: uint32 [2], its key; None: no dropout.
      kind: from `choose`.
      mesh: of the devices that share the batch (and the heads); None: one device.
      longest: no query whose result is used sees a key that is so many tokens or more before it;
        0: it may be any. Only the blocked kind makes use of it.
    """
    if words is None:
        rate = 0.0
    inputs = (q_BTHK, k_BTHK, v_BTHK, query_ids_BT, key_ids_BT)
    if kind == AttentionKind.PLAIN:
        return _plain(*inputs, rate, words)
    if kind == AttentionKind.CUDNN:
        assert not rate, "see `choose`"
        return _cudnn(*inputs)
    if kind == AttentionKind.PALLAS:
        from gptjax.ops.attention import flash

        return flash.flash(*inputs, rate, words, mesh=mesh)
    if not q_BTHK.size:
        return q_BTHK
    kernel = functools.partial(blocked.blocked, rate, longest or q_BTHK.shape[1])
    return partition.shard_over_batch_and_heads(kernel, mesh, *inputs, words)
