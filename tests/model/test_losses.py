"""The losses of a batch against closed forms and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small

from gptjax.batch import Batch
from gptjax.model import losses
from gptjax.ops.cross_entropy import LMHeadWeights
from gptjax.ops.sharded import ShardedOps


def lm_batch(tokens, weights):
    tokens = np.asarray(tokens, np.int32)
    ones = np.ones_like(tokens)
    return Batch(tokens, ones, ones, ones, np.asarray(weights, np.float32))


def lm_loss(x, table, batch):
    """Returns the LM loss on one device, with a head without a bias."""
    return losses.lm_loss(x, LMHeadWeights(table), batch, ShardedOps())


def test_uniform_logits_cost_log_V_a_token():
    rng = np.random.default_rng(0)
    tokens, weights = rng.integers(41, size=(3, 8)), rng.random((3, 8))
    for x, table in ((np.zeros((3, 8, 5)), rng.normal(size=(41, 5))),
                     (rng.normal(size=(3, 8, 5)), np.zeros((41, 5)))):  # fmt: skip
        got = lm_loss(
            jnp.asarray(x, jnp.float32), jnp.asarray(table, jnp.float32), lm_batch(tokens, weights)
        )
        assert float(got.total / got.weight) == pytest.approx(np.log(41), rel=1e-6)
        assert float(got.weight) == pytest.approx(weights.sum(), rel=1e-6)


def test_no_weight_no_loss_no_gradient():
    rng = np.random.default_rng(3)
    x, table = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 6, 4), (9, 4)))
    batch = lm_batch(rng.integers(9, size=(2, 6)), np.zeros((2, 6)))
    total, grads = jax.value_and_grad(lambda x, table: lm_loss(x, table, batch).total, (0, 1))(
        x, table
    )
    assert float(total) == 0
    assert float(lm_loss(x, table, batch).weight) == 0
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
    """Slots without an example do not count, even if their logits are NaN or infinite."""
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


@pytest.mark.parametrize("kind", ["classification", "multiple_choice"])
def test_smoothing_and_class_weights_are_their_formulas(kind):
    """The cross-entropy with the target (1 - e) * one-hot + e / K, where K counts what is there."""
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(2, 3, 4)).astype(np.float32)
    mask, labels = np.array([[1, 1, 0], [0, 1, 1]]), rng.integers(2, size=(2, 3)).astype(np.int32)
    there = np.repeat(mask[..., None], 4, axis=-1)
    weights = ()
    if kind == "multiple_choice":
        there[0, 1, 3] = there[1, 1, 2:] = 0
    else:
        weights = (0.5, 3.0, 1.0, 1.0)
    total = 0.0
    for b, e in zip(*np.nonzero(mask), strict=True):
        values = logits[b, e][there[b, e] > 0].astype(np.float64)
        target = 0.7 * np.eye(len(values))[labels[b, e]] + 0.3 / len(values)
        loss = -(target * (values - np.log(np.exp(values).sum()))).sum()
        total += loss * (weights[labels[b, e]] if weights else 1.0)
    batch = task_batch(labels, mask, there)

    def measure(logits):
        found = losses.task_loss(kind, logits, batch, weights, 0.3)
        return found.total, found.weight

    (got, got_weight), gradient = jax.value_and_grad(measure, has_aux=True)(logits)
    assert float(got) == pytest.approx(total, rel=1e-5)
    assert float(got_weight) == mask.sum()  # the number of examples, whatever their weights
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[mask == 0].any()


@pytest.mark.parametrize("size", [1, 4, 32])
def test_balanced_classes_count_the_same_with_batches_of_any_size(size):
    """One of 20 rows has the rare class. Its part of the mean losses of an epoch is a half."""
    labels = (np.arange(640) % 20 == 0).astype(np.int32)
    labels = np.random.default_rng(8).permutation(labels)
    parts = np.zeros(2)
    for some in labels.reshape(-1, size):
        logits = jnp.zeros((2, size, 2))
        both = np.stack([some, np.zeros_like(some)])
        mask = np.stack([np.ones(size), np.zeros(size)])  # the second row has no example
        batch = task_batch(both, mask, np.ones((2, size, 2)))
        found = losses.task_loss("classification", logits, batch, (1 / 1.9, 10.0))
        mean = float(found.total / found.weight)
        rare = 10.0 * np.log(2) * some.sum() / size
        parts += [mean - rare, rare]
    assert parts[1] / parts.sum() == pytest.approx(0.5, rel=1e-5)


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
