"""The activations against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config.schema import Activation
from gptjax.ops import activations
from tests import reference

X = np.concatenate([np.linspace(-30, 30, 4001), [0.0, -1e4, 1e4, 1e-20]]).astype(np.float32)


def slope(function, x):
    """Returns the central difference of a float64 function."""
    step = 1e-6 * np.maximum(1, np.abs(x))
    return (function(x + step) - function(x - step)) / (2 * step)


def test_every_activation_of_the_config_is_there():
    assert set(activations.FUNCTIONS) == set(Activation)


def test_gelu_and_its_gradient_equal_the_formula():
    y, pull = jax.vjp(activations.gelu, jnp.asarray(X))
    x = X.astype(np.float64)
    np.testing.assert_allclose(y, reference.gelu(x), rtol=1e-6, atol=1e-6)
    exact = slope(reference.gelu, x)
    error = np.abs(pull(jnp.ones_like(y))[0] - exact)
    # Near |x| = 5 the term 1 - tanh^2 loses digits and is multiplied by x^3, as it is in JAX's own
    # gradient.
    jax_pull = jax.vjp(lambda x: jax.nn.gelu(x, approximate=True), jnp.asarray(X))[1]
    of_jax = np.abs(jax_pull(jnp.ones_like(y))[0] - exact)
    assert error.max() <= 1.2 * of_jax.max()
    assert error[np.abs(x) < 3].max() < 1e-6


@pytest.mark.parametrize("name", sorted(activations.FUNCTIONS))
def test_bfloat16_is_rounded_once(name):
    x = jnp.asarray(X[np.abs(X) < 10], jnp.bfloat16)
    exact = {"gelu_tanh": reference.gelu, "relu": reference.relu}[name]
    y, pull = jax.vjp(activations.FUNCTIONS[name], x)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact(wide), rtol=2**-8, atol=1e-6)
    (dx,) = pull(jnp.ones_like(x))
    assert dx.dtype == jnp.bfloat16
    inside = np.abs(wide) > 1e-3  # ReLU has no slope at 0
    error = np.asarray(dx, np.float64) - slope(exact, wide)
    np.testing.assert_allclose(error[inside], 0, atol=2**-7)
