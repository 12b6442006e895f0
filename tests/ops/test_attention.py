"""Attention against float64 NumPy, and its masks against their definitions."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gptjax import mesh as mesh_lib
from gptjax.config.schema import MeshConfig
from gptjax.errors import UserError
from gptjax.ops import attention, dropout
from gptjax.ops.attention import blocked as blocked_lib
from gptjax.ops.attention import plain
from gptjax.ops.attention.inputs import AttentionInputs
from gptjax.ops.dropout import DropoutKey

pytestmark = pytest.mark.devices(8)


def by_hand(q, k, v, visible):
    """Returns the attention, computed for one query at a time over its visible keys."""
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


def dropout_key(seed, rate):
    return DropoutKey(dropout.key_bits(jax.random.key(seed)), rate)


def test_attend_equals_the_formula():
    q, k, v, visible = draw()
    got = small.attend(q, k, v, visible)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, by_hand(q, k, v, visible), atol=2e-6)


def test_bfloat16_rounds_inputs_and_weights_only():
    """Scores and softmax are float32; only weights and output are rounded, to 2^-9.

    The weights sum to 1, so that the error is below 2 * 2^-9 of the largest value. Scores up to 20
    in bfloat16 would have an error of 2^-9 * 20 = 4%, far above that.
    """
    q, k, v, visible = draw(seed=1)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (3 * q, k, v))
    got = small.attend(q, k, v, visible)
    assert got.dtype == jnp.bfloat16
    exact = by_hand(*(np.asarray(x, np.float64) for x in (q, k, v)), visible)
    error = np.abs(np.asarray(got, np.float64) - exact).max()
    assert error < 2 * 2**-9 * np.abs(np.asarray(v, np.float64)).max()


def test_causal_segments_is_its_definition():
    rng = np.random.default_rng(0)
    segments = rng.integers(0, 4, (3, 11)).astype(np.int32)
    got = np.asarray(plain.causal_segments(jnp.asarray(segments), jnp.asarray(segments)))
    for b, t, s in np.ndindex(3, 11, 11):
        assert got[b, t, s] == (s <= t and segments[b, t] == segments[b, s])
    assert got.any(-1).all(), "a query that sees nothing has no softmax"


def test_causal_cached_is_its_definition():
    got = np.asarray(plain.causal_cached(jnp.array([0, 3, 7]), 6))
    assert got.shape == (1, 3, 6)
    for t, position in enumerate((0, 3, 7)):
        np.testing.assert_array_equal(got[0, t], np.arange(6) <= position)


def test_hidden_keys_have_exactly_no_weight_and_no_gradient():
    q, k, v, visible = draw(seed=2)
    visible[:, :, 4] = False
    huge_k, huge_v = k.copy(), v.copy()
    huge_k[:, 4], huge_v[:, 4] = 1e18, -1e30
    np.testing.assert_array_equal(
        small.attend(q, k, v, visible), small.attend(q, huge_k, huge_v, visible)
    )
    gradients = jax.grad(lambda *x: jnp.square(small.attend(*x, visible)).sum(), (0, 1, 2))(q, k, v)
    assert not np.any(gradients[1][:, 4])
    assert not np.any(gradients[2][:, 4])
    assert all(np.isfinite(g).all() and np.any(g) for g in gradients)


def test_large_scores_stay_finite():
    q, k, v, visible = draw(seed=3)
    got = small.attend(1e4 * q, 1e4 * k, v, visible)
    np.testing.assert_allclose(got, by_hand(1e4 * q, 1e4 * k, v, visible), atol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_whole_weights_after_the_softmax(rate):
    """The expected value is (softmax * mask / (1 - rate)) v; the weights do not sum to 1."""
    q, k, v, visible = draw(seed=4)
    key = dropout_key(5, rate)
    got = small.attend(q, k, v, visible, key)
    kept_BHTS = np.asarray(dropout.keep(key, (2, 3, 7, 9)))
    scores = np.einsum("BTHK,BSHK->BHTS", q, k, dtype=np.float64) / np.sqrt(5)
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True) * kept_BHTS / (1 - rate)
    np.testing.assert_allclose(got, np.einsum("BHTS,BSHK->BTHK", weights, v), atol=5e-6)
    np.testing.assert_array_equal(
        small.attend(q, k, v, visible, dropout_key(5, 0.0)), small.attend(q, k, v, visible)
    )


# The following tests compare the kinds of `causal` that run here with the plain one.


def packed_ids(rng, batch, length):
    """Returns the ids of queries and keys: segments in order, padding, and some hidden keys.

    The first key of a segment is never hidden, so that every query sees at least one key.
    """
    ids = np.sort(rng.integers(1, 4, (batch, length)), axis=1)
    ids[0, -length // 5 :] = 0
    hidden = (rng.random((batch, length)) < 0.1) & (np.diff(ids, axis=1, prepend=-1) == 0)
    return ids.astype(np.int32), np.where(hidden, -1, ids).astype(np.int32)


def cases(batch, length, heads, width, dtype, seed=0):
    rng = np.random.default_rng(seed)
    shape = (batch, length, heads, width)
    qkvg = tuple(jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4))
    ids, key_ids = packed_ids(rng, batch, length)
    return qkvg, ids, key_ids


def value_and_gradients(kind, qkvg, ids, key_ids, key=None, mesh=None, longest=None):
    def run(q, k, v, g, key):
        def function(q, k, v):
            inputs = AttentionInputs(q, k, v, ids, key_ids)
            return attention.causal(inputs, key, kind=kind, mesh=mesh, max_sequence_length=longest)

        y, back = jax.vjp(function, q, k, v)
        return y, *back(g)

    return jax.jit(run)(*qkvg, key)


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "width"), [(3, 7, 2, 5), (2, 128, 3, 16), (2, 300, 2, 8)]
)
def test_blocked_equals_plain_in_value_and_gradient(batch, length, heads, width, rate, monkeypatch):
    """Only the order of float32 sums differs, with one group of tiles and with several."""
    qkvg, ids, key_ids = cases(batch, length, heads, width, "float32")
    key = dropout_key(1, rate) if rate else None
    want = value_and_gradients("plain", qkvg, ids, key_ids, key)
    for scores in (2**20, 1):
        monkeypatch.setattr(blocked_lib, "_MAX_SCORES", scores)
        got = value_and_gradients("blocked", qkvg, ids, key_ids, key)
        for one, other in zip(got, want, strict=True):
            assert one.dtype == other.dtype
            # The sums have up to 300 terms, which float32 rounds to 3e-6 of the largest value.
            assert np.abs(one - other).max() <= 3e-6 * np.abs(other).max()


def short_segments(rng, batch, length, longest):
    """Returns the segment ids of sequences of 1 to `longest` tokens, then padding (0)."""
    ids = np.zeros((batch, length), np.int32)
    for row in ids:
        at, segment = 0, 0
        while at < length - longest - 3:
            size, segment = rng.integers(1, longest + 1), segment + 1
            if segment % 5 == 0:
                size = longest
            row[at : at + size] = segment
            at += size
    return ids


@pytest.mark.parametrize("scores", [2**20, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize(("length", "longest"), [(257, 64), (500, 65), (700, 150), (384, 1)])
def test_blocks_meet_only_keys_in_reach(length, longest, rate, dtype, scores, monkeypatch):
    """Value and gradient are those of the plain attention, except in padding."""
    monkeypatch.setattr(blocked_lib, "_MAX_SCORES", scores)
    assert blocked_lib._Tiling.choose(length, longest).lookback
    rng = np.random.default_rng(length)
    ids = short_segments(rng, 2, length, longest)
    (q, k, v, g), _, _ = cases(2, length, 3, 8, dtype)
    hidden = (rng.random(ids.shape) < 0.1) & (np.diff(ids, axis=1, prepend=-1) == 0)
    key_ids = np.where(hidden, -1, ids)
    real = ids[..., None, None] > 0
    g = jnp.where(real, g, 0)
    key = dropout_key(1, rate) if rate else None
    wide = [x.astype(jnp.float32) for x in (q, k, v, g)]
    want = value_and_gradients("plain", wide, ids, key_ids, key)
    got = value_and_gradients("blocked", (q, k, v, g), ids, key_ids, key, None, longest)
    bound = {"float32": 3e-6, "bfloat16": 2**-6}[dtype]
    for one, other in zip(got, want, strict=True):
        assert one.dtype == q.dtype
        error = np.abs(np.where(real, np.asarray(one, np.float32) - other, 0)).max()
        # At least 1, because all gradients are 0 where each query sees a single key.
        assert error <= bound * max(1, np.abs(other).max())


@pytest.mark.parametrize(
    ("length", "longest", "windows"),
    [(512, 512, False), (1720, 140, True), (384, 60, True), (200, 60, False)],
)
def test_windows_hold_every_visible_key_in_half_of_the_scores(length, longest, windows):
    """Whole rows compute half of the scores; windows are for rows where they compute fewer."""
    tiling = blocked_lib._Tiling.choose(length, longest)
    assert bool(tiling.lookback) == windows
    if windows:
        assert tiling.lookback >= longest - 1
        keys = tiling.lookback + tiling.queries
        assert tiling.tiles_per_row * tiling.queries * keys < length**2 / 2


def test_blocked_in_bfloat16_is_as_near_to_float64_as_plain():
    qkvg, ids, key_ids = cases(2, 160, 2, 32, "bfloat16")
    key = dropout_key(2, 0.1)
    exact = value_and_gradients("plain", [x.astype(jnp.float32) for x in qkvg], ids, key_ids, key)
    in_plain, blocked = (
        value_and_gradients(kind, qkvg, ids, key_ids, key) for kind in ("plain", "blocked")
    )
    for want, one, other in zip(exact, in_plain, blocked, strict=True):
        errors = [np.sqrt(np.square(np.asarray(x, np.float32) - want).mean()) for x in (one, other)]
        # The blocked kind also rounds the gradient of the scores, which adds up to half the error.
        assert errors[1] <= 1.6 * errors[0]


@pytest.mark.slow
@pytest.mark.parametrize(("length", "longest"), [(130, None), (260, 40)])
def test_blocked_on_a_mesh_equals_one_device(length, longest):
    qkvg, ids, key_ids = cases(4, length, 2, 16, "float32")
    if longest:
        ids = key_ids = short_segments(np.random.default_rng(0), 4, length, longest)
    key = dropout_key(3, 0.3)
    want = value_and_gradients("blocked", qkvg, ids, key_ids, key, None, longest)
    for sizes in ((2, 1, 2), (2, 2, 1), (1, 4, 1), (1, 2, 2)):
        config = MeshConfig(**dict(zip(mesh_lib.AXES, sizes, strict=True)))
        mesh = mesh_lib.make_mesh(config, jax.devices()[:4])
        got = value_and_gradients("blocked", qkvg, ids, key_ids, key, mesh, longest)
        for one, other in zip(got, want, strict=True):
            assert np.abs(one - other).max() <= 3e-6 * np.abs(other).max()


def test_blocked_keeps_no_square_array_of_a_whole_sequence():
    """The scores of 1,024 tokens exist in blocks of 128 queries, also in the backward pass."""
    qkvg, ids, key_ids = cases(1, 1024, 1, 8, "float32")

    def run(q, k, v, g):
        y, back = jax.vjp(
            lambda *qkv: attention.causal(AttentionInputs(*qkv, ids, key_ids), kind="blocked"),
            q, k, v,
        )  # fmt: skip
        return y, *back(g)

    text = jax.jit(run).lower(*qkvg).as_text()
    assert "128x1024" in text
    assert "1024x1024" not in text


def test_what_cudnn_is_asked_for_is_the_same_attention():
    """`jax.nn.dot_product_attention` computes the same with XLA, which runs on a CPU."""
    (q, k, v, _), ids, key_ids = cases(2, 33, 2, 8, "float32")
    inputs = AttentionInputs(q, k, v, ids, key_ids)
    got = attention.cudnn(inputs, implementation="xla")
    want = attention.causal(inputs, kind="plain")
    np.testing.assert_allclose(got, want, atol=2e-6)


def queries(dtype, length=128, width=64):
    """Returns the shape and dtype of queries, with 2 rows and 3 heads."""
    return jax.ShapeDtypeStruct((2, length, 3, width), dtype)


@pytest.mark.parametrize(
    ("kind", "platform", "dtype", "rate", "expected"),
    [
        ("auto", "cpu", "float32", 0.1, "blocked"),
        ("auto", "tpu", "bfloat16", 0.1, "pallas"),
        ("auto", "gpu", "bfloat16", 0.0, "cudnn"),
        ("auto", "gpu", "bfloat16", 0.1, "plain"),
        ("auto", "gpu", "float32", 0.0, "plain"),
        ("plain", "tpu", "float32", 0.0, "plain"),
        ("blocked", "tpu", "float32", 0.1, "blocked"),
        ("pallas", "tpu", "float32", 0.1, "pallas"),
        ("cudnn", "gpu", "bfloat16", 0.0, "cudnn"),
    ],
)
def test_auto_is_the_one_for_the_platform(kind, platform, dtype, rate, expected):
    assert attention.choose(kind, platform, 9.0, queries(dtype), rate) == expected


@pytest.mark.parametrize(
    ("length", "width", "capability"),
    [(511, 64, 9.0), (512, 20, 9.0), (512, 136, 9.0), (512, 64, 7.5)],
)
def test_what_cudnn_does_not_take_is_left_to_the_plain_way(length, width, capability):
    q = queries("bfloat16", length, width)
    assert attention.choose("auto", "gpu", capability, q, 0.0) == "plain"
    with pytest.raises(UserError, match=r"^`model.attention`=cudnn: .*use auto$"):
        attention.choose("cudnn", "gpu", capability, q, 0.0)


def test_compute_capability():
    """The attribute is a version on CUDA devices, another text on ROCm, and missing on CPUs."""

    def mesh(**attributes):
        device = types.SimpleNamespace(**attributes)
        return types.SimpleNamespace(devices=np.array([device]))

    assert mesh_lib.compute_capability(mesh(compute_capability="7.5")) == 7.5
    assert mesh_lib.compute_capability(mesh(compute_capability="12.0")) == 12.0
    assert mesh_lib.compute_capability(mesh(compute_capability="gfx90a")) == 0
    assert mesh_lib.compute_capability(None) == 0


@pytest.mark.parametrize(
    ("kind", "platform", "dtype", "rate"),
    [
        ("pallas", "cpu", "float32", 0.0),
        ("cudnn", "cpu", "bfloat16", 0.0),
        ("cudnn", "gpu", "float32", 0.0),
        ("cudnn", "gpu", "bfloat16", 0.1),  # it would be left out in silence
    ],
)
def test_a_kernel_that_cannot_do_it_is_one_line(kind, platform, dtype, rate):
    with pytest.raises(UserError, match=f"^`model.attention`={kind}: .*use auto$"):
        attention.choose(kind, platform, 9.0, queries(dtype), rate)


@pytest.mark.parametrize("shape", [(0, 8, 2, 4), (2, 0, 2, 4)])
def test_nothing_in_nothing_out(shape):
    q, ids = jnp.zeros(shape), jnp.zeros(shape[:2], jnp.int32)
    for kind in ("plain", "blocked"):
        inputs = AttentionInputs(q, q, q, ids, ids)
        assert attention.causal(inputs, kind=kind).shape == shape
