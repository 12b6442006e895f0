"""Attention by its definition, with all scores in memory at once.

The implementation `cudnn` and the attention to a key/value cache also use the masks of this file.
`blocked` and `flash` compute their own masks.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.ops import dropout
from gptjax.ops.attention.inputs import AttentionInputs
from gptjax.ops.dropout import DropoutKey

Array = jax.Array

HIDDEN_SCORE = float(np.finfo(np.float32).min)
"""The score of a key that a query does not see. Its weight is 0."""


def causal_segments(query_ids_BT: Array, key_ids_BT: Array) -> Array:
    """Returns the mask, bool [B, T, T]: query t sees key s if s <= t and their ids are equal.

    Padding at the end of a row has the id 0 and sees this padding up to itself. Therefore its
    results are finite. No other computation uses these results.

    Args:
      query_ids_BT, key_ids_BT: the ids of the queries and keys (see `AttentionInputs`).
    """
    same_BTS = query_ids_BT[:, :, None] == key_ids_BT[:, None, :]
    length = query_ids_BT.shape[1]
    return same_BTS & jnp.tril(jnp.ones((1, length, length), bool))


def causal_cached(query_positions_T: Array, cache_length: int) -> Array:
    """Returns the mask, bool [1, T, S]: a query at position p sees the cache entries 0 to p."""
    return (jnp.arange(cache_length)[None, :] <= query_positions_T[:, None])[None]


def attend(
    q_XTK: Array,
    k_XSK: Array,
    v_XSK: Array,
    visible_XTS: Array,
    dropout_key: DropoutKey | None = None,
) -> Array:
    """Returns dropout(softmax(q k^T / sqrt(K))) v over the visible keys, [X..., T, K].

    The scores and the softmax are float32 for every dtype of q, k and v.

    Args:
      q_XTK, k_XSK, v_XSK: the queries, keys and values. X means any number of leading axes.
      visible_XTS: the attention mask, bool. It is True if the query sees the key. Every query must
        see at least one key.
      dropout_key: the key for the dropout of the attention weights. None means no dropout.
    """
    weights_XTS = jax.nn.softmax(_scores(q_XTK, k_XSK, visible_XTS), axis=-1)
    if dropout_key is not None and dropout_key.rate > 0:
        weights_XTS = dropout.dropout(weights_XTS, dropout_key)
    return jnp.einsum("...TS,...SK->...TK", weights_XTS.astype(v_XSK.dtype), v_XSK)


def _scores(q_XTK: Array, k_XSK: Array, visible_XTS: Array) -> Array:
    """Returns q k^T / sqrt(K), float32 [X..., T, S], with `HIDDEN_SCORE` for invisible keys."""
    scale = 1 / math.sqrt(q_XTK.shape[-1])
    scores_XTS = jnp.einsum("...TK,...SK->...TS", q_XTK, k_XSK, preferred_element_type=jnp.float32)
    return jnp.where(visible_XTS, scores_XTS * scale, HIDDEN_SCORE)


def scores_and_weights(inputs: AttentionInputs) -> tuple[Array, Array]:
    """Returns the scores and the weights of `plain` without dropout, both float32 [B, H, T, T].

    A score is `HIDDEN_SCORE` if the query does not see the key.
    """
    visible_BTT = causal_segments(inputs.query_ids_BT, inputs.key_ids_BT)
    q_BHTK, k_BHTK = (jnp.moveaxis(x, 2, 1) for x in (inputs.q_BTHK, inputs.k_BTHK))
    scores_BHTT = _scores(q_BHTK, k_BHTK, visible_BTT[:, None])
    return scores_BHTT, jax.nn.softmax(scores_BHTT, axis=-1)


def plain(inputs: AttentionInputs, dropout_key: DropoutKey | None) -> Array:
    """Returns `gptjax.ops.attention.causal` of these arguments, [B, T, H, K]."""
    visible_BTT = causal_segments(inputs.query_ids_BT, inputs.key_ids_BT)
    # With arrays [B, H, T, K] XLA's matrix products take a third less time on a CPU. On other
    # platforms the order of the axes makes no difference.
    q_BHTK, k_BHTK, v_BHTK = (
        jnp.moveaxis(x, 2, 1) for x in (inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHK)
    )
    y_BHTK = attend(q_BHTK, k_BHTK, v_BHTK, visible_BTT[:, None], dropout_key)
    return jnp.moveaxis(y_BHTK, 1, 2)
