"""Masked attention behind one function.

Letters of shapes: B batch, T queries, S keys, H heads, K width of a head.
"""

import math

import jax
import jax.numpy as jnp

from gptjax import dropout as dropout_lib

Array = jax.Array


def causal_segments(segment_ids_BT: Array) -> Array:
    """Returns bool [B, T, T]: query t sees key s if s <= t and both are in one segment.

    Padding (segment 0) sees the padding before it and itself: its rows stay finite and nothing
    reads them.
    """
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    length = segment_ids_BT.shape[1]
    return same_BTS & jnp.tril(jnp.ones((1, length, length), bool))


def causal_cached(query_positions_T: Array, cache_length: int) -> Array:
    """Returns bool [1, T, S]: a query at position p sees cache entries 0..p."""
    return (jnp.arange(cache_length)[None, :] <= query_positions_T[:, None])[None]


def attend(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    visible_BTS: Array,
    dropout_rate: float = 0.0,
    dropout_words: Array | None = None,
) -> Array:
    """Returns softmax(q k^T / sqrt(K), hidden keys at weight 0) v, as [B, T, H, K].

    Scores and softmax are float32 whatever the dtype of q, k and v.

    Args:
      q_BTHK, k_BSHK, v_BSHK: queries, keys, values.
      visible_BTS: bool, which keys a query may see; every query must see at least one.
      dropout_rate: of the attention weights.
      dropout_words: uint32 [2]; None: no dropout.
    """
    scale = 1 / math.sqrt(q_BTHK.shape[-1])
    # Heads beside the batch first: XLA's CPU products are a third faster so, on others it is free.
    q_BHTK, k_BHSK, v_BHSK = (jnp.moveaxis(x, 2, 1) for x in (q_BTHK, k_BSHK, v_BSHK))
    scores_BHTS = jnp.einsum("BHTK,BHSK->BHTS", q_BHTK, k_BHSK, preferred_element_type=jnp.float32)
    scores_BHTS = jnp.where(visible_BTS[:, None], scores_BHTS * scale, jnp.finfo(jnp.float32).min)
    weights_BHTS = jax.nn.softmax(scores_BHTS, axis=-1)
    if dropout_words is not None and dropout_rate > 0:
        weights_BHTS = dropout_lib.dropout(weights_BHTS, dropout_words, dropout_rate)
    y_BHTK = jnp.einsum("BHTS,BHSK->BHTK", weights_BHTS.astype(v_BSHK.dtype), v_BHSK)
    return jnp.moveaxis(y_BHTK, 1, 2)
