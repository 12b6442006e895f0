"""The counter hash is random enough, and dropout is what its definition says, on every mesh.

Statistical bounds are 5 to 6 standard deviations of the exact distribution; keys are fixed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.ops import dropout
from gptjax.ops.dropout import DropoutKey

pytestmark = pytest.mark.devices(8)

SHAPES = [(100_003,), (64, 768), (4, 3, 65, 65), (2, 128, 1, 96)]


def key(seed, rate):
    return DropoutKey(dropout.key_bits(jax.random.key(seed)), rate)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_kept_elements_is_binomial(shape, rate):
    for seed in range(3):
        kept = np.asarray(dropout.keep(key(seed, rate), shape))
        sigma = np.sqrt(rate * (1 - rate) / kept.size)
        assert abs(kept.mean() - (1 - rate)) < 5 * sigma
        # The same holds along every axis.
        for axis in range(len(shape)):
            others = tuple(a for a in range(len(shape)) if a != axis)
            n = kept.size // shape[axis]
            if others and n * min(rate, 1 - rate) > 50:
                deviation = np.abs(kept.mean(others) - (1 - rate)).max()
                assert deviation < 6 * np.sqrt(rate * (1 - rate) / n)


def correlation_in_sigmas(a, b, rate):
    """Returns the correlation of two masks, divided by its deviation for independent masks."""
    a, b = (x.astype(np.float64) - (1 - rate) for x in (a, b))
    return abs((a * b).mean()) / (rate * (1 - rate)) * np.sqrt(a.size)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_masks_of_different_keys_are_independent(rate):
    """The keys are random ones from `key_bits`, and some that share their second number."""
    shape = (64, 1024)
    bits = [np.asarray(key(i, rate).bits) for i in range(8)]
    bits += [np.array([one[0], bits[0][1]], np.uint32) for one in bits[1:3]]
    masks = [np.asarray(dropout.keep(DropoutKey(jnp.asarray(one), rate), shape)) for one in bits]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert correlation_in_sigmas(a, b, rate) < 5


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_elements_near_each_other_are_independent(rate):
    """Compares elements at small distances, one row apart, and at powers of two.

    At such distances the masks of weak hash functions are correlated.
    """
    flat = np.asarray(dropout.keep(key(3, rate), (512, 768))).ravel()
    for lag in (1, 2, 3, 4, 7, 8, 16, 64, 256, 767, 768, 769, 1024, 4096, 65536):
        assert correlation_in_sigmas(flat[lag:], flat[:-lag], rate) < 5, lag


def test_each_element_is_binomial_over_keys():
    """Each pair of neighbours is independent too, over 4,000 keys."""
    rate, count = 0.1, 4000
    bits = jax.vmap(dropout.key_bits)(jax.random.split(jax.random.key(0), count))
    masks = np.asarray(jax.vmap(lambda b: dropout.keep(DropoutKey(b, rate), (16, 48)))(bits))
    sigma = np.sqrt(rate * (1 - rate) / count)
    assert np.abs(masks.mean(0) - (1 - rate)).max() < 5 * sigma
    both = (masks[:, :, 1:] & masks[:, :, :-1]).mean(0)
    p = (1 - rate) ** 2
    assert np.abs(both - p).max() < 5 * np.sqrt(p * (1 - p) / count)
    # The number of kept elements of a mask has the variance of independent draws.
    totals = masks.sum(axis=(1, 2))
    n = 16 * 48
    ratio = totals.var() / (n * rate * (1 - rate))
    assert abs(ratio - 1) < 5 * np.sqrt(2 / count)


def test_rate_0_keeps_everything():
    assert np.asarray(dropout.keep(key(0, 0.0), (1000,))).all()


def test_keep_at_is_a_part_of_the_mask():
    """The indices are those of a block of the array."""
    kept = np.asarray(dropout.keep(key(2, 0.4), (3, 40, 50)))
    index = (np.arange(3)[:, None, None] * 40 + np.arange(10, 30)[:, None]) * 50 + np.arange(7, 33)
    bits = tuple(key(2, 0.4).bits)
    got = dropout.keep_at(jnp.asarray(index, jnp.uint32), bits, 0.4)
    np.testing.assert_array_equal(got, kept[:, 10:30, 7:33])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_and_gradient_use_one_mask(dtype):
    rate, shape = 0.3, (33, 17)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    kept = np.asarray(dropout.keep(key(1, rate), shape))
    y, pull = jax.vjp(lambda x: dropout.dropout(x, key(1, rate)), x)
    assert y.dtype == x.dtype
    scaled = np.where(kept, np.asarray(x, np.float64) / (1 - rate), 0)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(y, np.float64), scaled, rtol=eps)
    (g,) = pull(jnp.ones_like(y))
    np.testing.assert_allclose(np.asarray(g, np.float64), kept / (1 - rate), rtol=eps)


def test_the_expectation_is_the_input():
    bits = jax.vmap(dropout.key_bits)(jax.random.split(jax.random.key(1), 4000))
    x = jnp.linspace(-2, 3, 101)
    mean = np.asarray(jax.vmap(lambda b: dropout.dropout(x, DropoutKey(b, 0.2)))(bits)).mean(0)
    assert (np.abs(mean - x) <= 5 * np.abs(x) * np.sqrt(0.2 / 0.8 / 4000) + 1e-6).all()


@pytest.mark.parametrize("spec", [P("data"), P(None, "fsdp"), P(("data", "fsdp"), None, "tensor")])
def test_jit_and_sharding_draw_the_same_mask(spec):
    mesh = small.mesh(2, 2, 2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 10)), jnp.float32)
    expected = dropout.dropout(x, key(9, 0.4))
    place = NamedSharding(mesh, spec)
    run = jax.jit(dropout.dropout, out_shardings=place)
    got = run(jax.device_put(x, place), key(9, 0.4))
    assert got.sharding.is_equivalent_to(place, 3)
    np.testing.assert_array_equal(got, expected)
