"""The LM's cross-entropy against plain code with all logits, and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small

from gptjax.ops import cross_entropy
from gptjax.ops.cross_entropy import LMInputs


def plain(x, table, targets, weights):
    """Returns the loss from all logits at once; JAX derives its gradient."""
    logits = jnp.einsum("BTD,VD->BTV", x, table, preferred_element_type=jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return -(picked * weights).sum()


SHAPES = [(2, 12, 7, 29), (3, 15, 5, 31), (1, 7, 9, 2)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_in_pieces_and_gradients_equal_the_plain_ones(shape, dtype):
    """Tests every number of pieces, with weights from 0 to 1 and a factor outside of the loss.

    In float32 only the order of sums differs. In bfloat16 the gradient of the logits is rounded, in
    other places than in JAX's gradient. So both are compared with the float64 gradient of the same
    inputs. Two roundings, of d_logits and of the result, allow for 2 eps of the largest value.
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
    for pieces in divisors:

        def in_pieces(x, table, pieces=pieces):
            inputs = LMInputs(x, table, targets, weights)
            return 3 * cross_entropy.cross_entropy(inputs, pieces)

        got, grads = small.fast_jit(jax.value_and_grad(in_pieces, (0, 1)))(x, master)
        assert float(got) == pytest.approx(3 * exact, rel=1e-6)
        assert float(got) == pytest.approx(float(want), rel=1e-6)
        assert [g.dtype for g in grads] == [x.dtype, jnp.float32]
        small.assert_trees_close(grads, (exact_x, exact_table), tolerance)
        small.assert_trees_close(grads, want_grads, 2 * tolerance)
        assert not np.any(np.asarray(grads[0], np.float32)[weights == 0])
    alone = cross_entropy.cross_entropy(LMInputs(x, master, targets, weights), divisors[1])
    assert float(alone) == pytest.approx(exact, rel=1e-6), "without differentiation"


def test_bfloat16_loss_is_exact_for_its_inputs():
    """Logits are summed and stored in float32, so that the loss is not rounded to bfloat16."""
    rng = np.random.default_rng(2)
    x, table = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((2, 8, 64), (50, 64)))
    targets, weights = rng.integers(50, size=(2, 8)).astype(np.int32), np.ones((2, 8), np.float32)
    x64, table64 = (np.asarray(a, np.float64) for a in (x, table))
    log_p = reference.log_softmax(x64 @ table64.T)
    exact = -np.take_along_axis(log_p, targets[..., None], -1).sum()
    got = cross_entropy.cross_entropy(LMInputs(x, table, targets, weights), 2)
    assert float(got) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("limit", [2**24, 2**25])
def test_num_pieces_divides_and_bounds_the_logits(limit):
    for rows, length, vocabulary in [
        (1, 1, 5), (64, 512, 40478), (32, 511, 40478), (8, 509, 40478), (3, 96, 97), (1, 7, 10**9),
    ]:  # fmt: skip
        pieces = cross_entropy.num_pieces(rows, length, vocabulary, limit)
        assert length % pieces == 0
        assert pieces == length or rows * length // pieces * vocabulary <= limit
        # Every smaller divisor would exceed the limit.
        for n in range(1, pieces):
            assert length % n or rows * (length // n) * vocabulary > limit
