"""The floating-point operations of a training step, and the most that a device can do a second."""

import functools
import timeit

import jax
import jax.numpy as jnp

from gptjax.config.schema import ModelConfig


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """Returns the floating-point operations of the forward and backward pass for one token.

    Only matrix products are counted, those of the LM head included. A multiply-add is two
    operations. The backward pass takes twice as many as the forward pass. In attention a token
    sees (length + 1) / 2 keys on average.

    Args:
      config: of the model.
      length: of the sequence, in tokens.
    """
    width = config.width
    projections = 4 * width * width + 2 * width * config.hidden_ffn_width
    attention = 2 * width * (length + 1) / 2
    per_token = config.num_layers * (projections + attention) + width * config.vocab_size
    return 3 * 2 * per_token


@functools.cache
def matmul_ceiling(dtype: str, size: int = 1536) -> float:
    """Returns the operations per second of a square matrix product, the fastest of five.

    Args:
      dtype: of the matrices.
      size: their number of rows.
    """
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.float32))
    product(a).block_until_ready()
    seconds = timeit.repeat(lambda: product(a).block_until_ready(), number=1, repeat=5)
    return 2 * size**3 / min(seconds)
