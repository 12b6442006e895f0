"""Attention against float64 NumPy, its masks against their definitions, and what it hides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import attention, dropout


def by_hand(q, k, v, visible):
    """Query by query, over the visible keys alone."""
    y = np.zeros(q.shape)
    for b, t, h in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(visible[b, t])
        scores = k[b, seen, h] @ q[b, t, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        y[b, t, h] = weights / weights.sum() @ v[b, seen, h]
    return y


def draw(shape_q=(2, 7, 3, 5), keys=9, seed=0):
    rng = np.random.default_rng(seed)
    B, _, H, K = shape_q
    q, k, v = (
        2 * rng.normal(size=s).astype(np.float32)
        for s in (shape_q, (B, keys, H, K), (B, keys, H, K))
    )
    visible = rng.random((B, shape_q[1], keys)) < 0.5
    visible[..., 0] = True  # every query sees at least one key
    return q, k, v, visible


def test_attend_equals_the_formula():
    q, k, v, visible = draw()
    got = attention.attend(q, k, v, visible)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, by_hand(q, k, v, visible), atol=2e-6)


def test_bfloat16_rounds_inputs_and_weights_only():
    """Scores and softmax stay float32: the error is that of rounding weights and output to 2^-9.

    Weights sum to 1, so that it is below 2 * 2^-9 of the largest value. Scores in bfloat16 (here up
    to 20, off by 2^-9 * 20 = 4%) would be far outside.
    """
    q, k, v, visible = draw(seed=1)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (3 * q, k, v))
    got = attention.attend(q, k, v, visible)
    assert got.dtype == jnp.bfloat16
    exact = by_hand(*(np.asarray(x, np.float64) for x in (q, k, v)), visible)
    error = np.abs(np.asarray(got, np.float64) - exact).max()
    assert error < 2 * 2**-9 * np.abs(np.asarray(v, np.float64)).max()


def test_causal_segments_is_its_definition():
    rng = np.random.default_rng(0)
    segments = rng.integers(0, 4, (3, 11)).astype(np.int32)
    got = np.asarray(attention.causal_segments(jnp.asarray(segments)))
    for b, t, s in np.ndindex(3, 11, 11):
        assert got[b, t, s] == (s <= t and segments[b, t] == segments[b, s])
    assert got.any(-1).all(), "a query that sees nothing has no softmax"


def test_causal_cached_is_its_definition():
    got = np.asarray(attention.causal_cached(jnp.array([0, 3, 7]), 6))
    assert got.shape == (1, 3, 6)
    for t, position in enumerate((0, 3, 7)):
        np.testing.assert_array_equal(got[0, t], np.arange(6) <= position)


def test_hidden_keys_have_exactly_no_weight_and_no_gradient():
    q, k, v, visible = draw(seed=2)
    visible[:, :, 4] = False
    huge_k, huge_v = k.copy(), v.copy()
    huge_k[:, 4], huge_v[:, 4] = 1e18, -1e30
    np.testing.assert_array_equal(
        attention.attend(q, k, v, visible), attention.attend(q, huge_k, huge_v, visible)
    )
    gradients = jax.grad(lambda *x: jnp.square(attention.attend(*x, visible)).sum(), (0, 1, 2))(
        q, k, v
    )
    assert not np.any(gradients[1][:, 4])
    assert not np.any(gradients[2][:, 4])
    assert all(np.isfinite(g).all() and np.any(g) for g in gradients)


def test_large_scores_stay_finite():
    q, k, v, visible = draw(seed=3)
    got = attention.attend(1e4 * q, 1e4 * k, v, visible)
    np.testing.assert_allclose(got, by_hand(1e4 * q, 1e4 * k, v, visible), atol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_whole_weights_after_the_softmax(rate):
    """With the mask known: softmax, times mask / (1 - rate), times v. Weights do not sum to 1."""
    q, k, v, visible = draw(seed=4)
    words = dropout.key_words(jax.random.key(5))
    got = attention.attend(q, k, v, visible, rate, words)
    kept_BHTS = np.asarray(dropout.keep(words, (2, 3, 7, 9), rate))
    scores = np.einsum("BTHK,BSHK->BHTS", q, k, dtype=np.float64) / np.sqrt(5)
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True) * kept_BHTS / (1 - rate)
    np.testing.assert_allclose(got, np.einsum("BHTS,BSHK->BTHK", weights, v), atol=5e-6)
    np.testing.assert_array_equal(
        attention.attend(q, k, v, visible, 0.0, words), attention.attend(q, k, v, visible)
    )
