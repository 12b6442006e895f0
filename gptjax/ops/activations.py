"""The activation functions of the feed-forward layer. The result has the dtype of x.

GELU is computed in float32. Its backward pass computes the intermediate values again from x,
because this takes less time and memory than storing them.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gptjax.config.schema import Activation

Array = jax.Array

# The tanh form of GELU is x / 2 * (1 + tanh(_SLOPE * (x + _CUBIC * x^3))).
_SLOPE = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def _tanh(x: Array) -> Array:
    return jnp.tanh(_SLOPE * x * (1 + _CUBIC * x * x))


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """Returns x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016)."""
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + _tanh(y))).astype(x.dtype)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Array, g: Array) -> tuple[Array]:
    # This function takes half of the time of JAX's automatic gradient. Without the barrier XLA
    # would store the tanh of the forward pass instead of computing it again.
    y = jax.lax.optimization_barrier(x).astype(jnp.float32)
    tanh = _tanh(y)
    slope = _SLOPE * (1 + 3 * _CUBIC * y * y)
    derivative = 0.5 * (1 + tanh) + 0.5 * y * (1 - tanh * tanh) * slope
    return ((g.astype(jnp.float32) * derivative).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)

FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    Activation.GELU_TANH: gelu,
    Activation.RELU: jax.nn.relu,
}
