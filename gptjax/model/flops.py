"""The number of floating-point operations of a training step, and the speed of the device."""

import functools
import timeit

import jax
import jax.numpy as jnp

from gptjax.config.schema import ModelConfig


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """Returns the number of floating-point operations in training for one token.

    The number is the sum for the forward and the backward pass. Only matrix products are counted,
    including the product of the LM head. A multiply-add is two operations. The backward pass has
    twice as many operations as the forward pass. In attention a token sees (length + 1) / 2 keys
    on average.

    Args:
      config: the configuration of the model.
      length: the number of tokens in the sequence.
    """
    width = config.width
    projections = 4 * width * width + 2 * width * config.hidden_ffn_width
    attention = 2 * width * (length + 1) / 2
    per_token = config.num_layers * (projections + attention) + width * config.vocab_size
    return 3 * 2 * per_token


@functools.cache
def matmul_ceiling(dtype: str, size: int = 1536) -> float:
    """Measures the operations per second of a square matrix product; returns the best of five runs.

    Args:
      dtype: the dtype of the matrices.
      size: the number of rows of each matrix.
    """
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.float32))
    product(a).block_until_ready()
    seconds = timeit.repeat(lambda: product(a).block_until_ready(), number=1, repeat=5)
    return 2 * size**3 / min(seconds)
