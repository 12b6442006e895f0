"""Attention in the plain way, with all scores in memory at once.

Its masks also serve cuDNN and the key/value cache. `blocked` and `flash` have their own.
"""

import math

import jax
import jax.numpy as jnp

from gptjax.ops import dropout
from gptjax.ops.attention.inputs import AttentionInputs
from gptjax.ops.dropout import DropoutKey

Array = jax.Array


def causal_segments(query_ids_BT: Array, key_ids_BT: Array) -> Array:
    """Returns bool [B, T, T]: whether query t sees key s (s <= t, and equal ids).

    Padding has the id 0 and sees the padding up to itself. So its results are finite; nothing uses
    them.

    Args:
      query_ids_BT, key_ids_BT: as in `AttentionInputs`.
    """
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
    dropout_key: DropoutKey | None = None,
) -> Array:
    """Returns dropout(softmax(q k^T / sqrt(K))) v over the visible keys, [X..., T, K].

    Scores and softmax are float32, whatever the dtype of q, k and v.

    Args:
      q_XTK, k_XSK, v_XSK: queries, keys and values; X stands for any leading axes.
      visible_XTS: bool, which keys a query sees; every query must see at least one.
      dropout_key: of the attention weights; None: no dropout.
    """
    scale = 1 / math.sqrt(q_XTK.shape[-1])
    scores_XTS = jnp.einsum("...TK,...SK->...TS", q_XTK, k_XSK, preferred_element_type=jnp.float32)
    scores_XTS = jnp.where(visible_XTS, scores_XTS * scale, jnp.finfo(jnp.float32).min)
    weights_XTS = jax.nn.softmax(scores_XTS, axis=-1)
    if dropout_key is not None and dropout_key.rate > 0:
        weights_XTS = dropout.dropout(weights_XTS, dropout_key)
    return jnp.einsum("...TS,...SK->...TK", weights_XTS.astype(v_XSK.dtype), v_XSK)


def plain(inputs: AttentionInputs, dropout_key: DropoutKey | None) -> Array:
    """Returns `gptjax.ops.attention.causal` of these arguments, [B, T, H, K]."""
    visible_BTT = causal_segments(inputs.query_ids_BT, inputs.key_ids_BT)
    # With the layout [B, H, T, K] XLA's matrix products take a third less time on a CPU. On other
    # platforms the layout makes no difference.
    q_BHTK, k_BHTK, v_BHTK = (
        jnp.moveaxis(x, 2, 1) for x in (inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHK)
    )
    y_BHTK = attend(q_BHTK, k_BHTK, v_BHTK, visible_BTT[:, None], dropout_key)
    return jnp.moveaxis(y_BHTK, 1, 2)
