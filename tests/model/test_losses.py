"""The losses against closed forms, plain full-logits code and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small

from gptjax.batch import Batch
from gptjax.model import losses


def lm_batch(tokens, weights):
    tokens = np.asarray(tokens, np.int32)
    ones = np.ones_like(tokens)
    return Batch(tokens, ones, ones, ones, np.asarray(weights, np.float32))


def test_uniform_logits_cost_log_V_a_token():
    rng = np.random.default_rng(0)
    tokens, weights = rng.integers(41, size=(3, 8)), rng.random((3, 8))
    for x, table in ((np.zeros((3, 8, 5)), rng.normal(size=(41, 5))),
                     (rng.normal(size=(3, 8, 5)), np.zeros((41, 5)))):  # fmt: skip
        got = losses.lm_loss(
            jnp.asarray(x, jnp.float32), jnp.asarray(table, jnp.float32), lm_batch(tokens, weights)
        )
        assert float(got.total / got.weight) == pytest.approx(np.log(41), rel=1e-6)
        assert float(got.weight) == pytest.approx(weights.sum(), rel=1e-6)


def plain(x, table, targets, weights):
    """All logits at once, in float32, differentiated by JAX."""
    logits = jnp.einsum("BTD,VD->BTV", x, table, preferred_element_type=jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return -(picked * weights).sum()


SHAPES = [(2, 12, 7, 29), (3, 15, 5, 31), (1, 7, 9, 2)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunked_loss_and_gradients_equal_the_plain_ones(shape, dtype):
    """For every number of chunks, with weights that are 0, 1 and in between, scaled from outside.

    float32: summation order alone. bfloat16: the chunked gradient of the logits is rounded before
    its products, and sums, which JAX's plain code does not do in the same places; both are held to
    the float64 gradient of the same (rounded) inputs, within 2 eps (rounding of d_logits, and of
    the result) of the largest entry.
    """
    B, T, D, V = shape
    rng = np.random.default_rng(1)
    x, table = (jnp.asarray(rng.normal(size=s), dtype) for s in ((B, T, D), (V, D)))
    master = table.astype(jnp.float32)
    targets = rng.integers(V, size=(B, T)).astype(np.int32)
    weights = np.where(rng.random((B, T)) < 0.3, 0, rng.choice([1, 0.37], (B, T)))
    weights = weights.astype(np.float32)
    x64, table64 = (np.asarray(a, np.float64) for a in (x, table))
    log_p = reference.log_softmax(x64 @ table64.T)
    hot = np.eye(V)[targets]
    exact = -((log_p * hot).sum(-1) * weights).sum()
    d_logits = 3 * (np.exp(log_p) - hot) * weights[..., None]
    exact_x, exact_table = d_logits @ table64, np.einsum("BTV,BTD->VD", d_logits, x64)
    eps = float(jnp.finfo(dtype).eps)
    tolerance = 2 * eps if dtype == "bfloat16" else 20 * eps

    want, want_grads = jax.value_and_grad(lambda *a: 3 * plain(*a, targets, weights), (0, 1))(
        x, table
    )
    divisors = [n for n in range(1, T + 1) if T % n == 0]
    for chunks in divisors:

        def chunked(x, table, chunks=chunks):
            return 3 * losses.lm_cross_entropy(x, table, targets, weights, chunks)

        got, grads = small.fast_jit(jax.value_and_grad(chunked, (0, 1)))(x, master)
        assert float(got) == pytest.approx(3 * exact, rel=1e-6)
        assert float(got) == pytest.approx(float(want), rel=1e-6)
        assert [g.dtype for g in grads] == [x.dtype, jnp.float32]
        small.assert_trees_close(grads, (exact_x, exact_table), tolerance)
        small.assert_trees_close(grads, want_grads, 2 * tolerance)
        assert not np.any(np.asarray(grads[0], np.float32)[weights == 0])
    alone = losses.lm_cross_entropy(x, master, targets, weights, divisors[1])
    assert float(alone) == pytest.approx(exact, rel=1e-6), "without differentiation"


def test_bfloat16_loss_is_exact_for_its_inputs():
    """Logits accumulate and stay in float32: no bfloat16 rounding of the loss itself."""
    rng = np.random.default_rng(2)
    x, table = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((2, 8, 64), (50, 64)))
    targets, weights = rng.integers(50, size=(2, 8)).astype(np.int32), np.ones((2, 8), np.float32)
    x64, table64 = (np.asarray(a, np.float64) for a in (x, table))
    log_p = reference.log_softmax(x64 @ table64.T)
    exact = -np.take_along_axis(log_p, targets[..., None], -1).sum()
    got = losses.lm_cross_entropy(x, table, targets, weights, 2)
    assert float(got) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("limit", [2**24, 2**25])
def test_lm_chunks_divides_and_bounds_the_logits(limit):
    for rows, length, vocabulary in [
        (1, 1, 5), (64, 512, 40478), (32, 511, 40478), (8, 509, 40478), (3, 96, 97), (1, 7, 10**9),
    ]:  # fmt: skip
        chunks = losses.lm_chunks(rows, length, vocabulary, limit)
        assert length % chunks == 0
        assert chunks == length or rows * length // chunks * vocabulary <= limit
        # The fewest such: every smaller divisor would be over the bound.
        for n in range(1, chunks):
            assert length % n or rows * (length // n) * vocabulary > limit


def test_no_weight_no_loss_no_gradient():
    rng = np.random.default_rng(3)
    x, table = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 6, 4), (9, 4)))
    batch = lm_batch(rng.integers(9, size=(2, 6)), np.zeros((2, 6)))
    total, grads = jax.value_and_grad(
        lambda x, table: losses.lm_loss(x, table, batch).total, (0, 1)
    )(x, table)
    assert float(total) == 0
    assert float(losses.lm_loss(x, table, batch).weight) == 0
    assert not any(np.any(g) for g in grads)


def test_targets_are_the_next_tokens():
    batch = lm_batch([[3, 1, 4, 1], [5, 9, 2, 6]], np.ones((2, 4)))
    np.testing.assert_array_equal(
        np.asarray(losses.lm_targets(batch))[:, :-1], [[1, 4, 1], [9, 2, 6]]
    )


def task_batch(labels, example_mask, candidate_mask):
    none = np.zeros((2, 1), np.int32)
    return Batch(
        none, none, none, none, none, None,
        np.asarray(candidate_mask, np.float32), np.asarray(example_mask, np.float32), labels,
    )  # fmt: skip


@pytest.mark.parametrize("kind", small.KINDS)
def test_task_loss_is_its_formula(kind):
    """Slots without an example count nothing, whatever they hold, NaN and infinity included."""
    rng = np.random.default_rng(4)
    width = {"regression": 1, "multiple_choice": 3}.get(kind, 4)
    logits = rng.normal(size=(2, 5, width)).astype(np.float32)
    mask = np.array([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0]])
    if kind == "regression":
        labels = rng.normal(size=(2, 5)).astype(np.float32)
    else:
        labels = rng.integers(width, size=(2, 5)).astype(np.int32)
    candidates = np.repeat(mask[..., None], 3, axis=-1)
    expected = sum(
        reference.task_loss(kind, logits[b, e].astype(np.float64), labels[b, e])
        for b, e in zip(*np.nonzero(mask), strict=True)
    )
    batch = task_batch(labels, mask, candidates)

    def total(logits):
        return losses.task_loss(kind, logits, batch).total

    got, gradient = jax.value_and_grad(total)(logits)
    assert float(got) == pytest.approx(expected, rel=1e-5)
    assert float(losses.task_loss(kind, logits, batch).weight) == mask.sum()
    assert not np.asarray(gradient)[mask == 0].any()
    assert np.asarray(gradient)[mask == 1].all()
    wild = logits.copy()
    wild[0, 2], wild[1, 0] = np.nan, np.inf
    assert float(total(wild)) == pytest.approx(expected, rel=1e-5)


def test_an_answer_that_is_not_there_has_no_probability():
    logits = np.array([[[1.0, 2.0, 30.0]]], np.float32)
    batch = task_batch(np.array([[1]], np.int32), [[1]], [[[1, 1, 0]]])
    got = losses.task_loss("multiple_choice", jnp.asarray(logits), batch)
    assert float(got.total) == pytest.approx(np.log1p(np.exp(-1)), rel=1e-6)


def test_sums_add_before_they_divide():
    one, two = (
        losses.Sum(jnp.float32(6), jnp.float32(2)),
        losses.Sum(jnp.float32(1), jnp.float32(5)),
    )
    both = one + two
    assert float(both.total / both.weight) == 1
