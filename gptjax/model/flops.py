"""The number of floating-point operations of a training step, and the speed of the device."""

import functools
import timeit

import jax
import jax.numpy as jnp

from gptjax.config.schema import ModelConfig


def train_flops_per_token(
    config: ModelConfig, length: int, frozen: int = 0, lm_head: bool = True
) -> float:
    """Returns the number of floating-point operations in training for one token.

    The number is the sum for the forward and the backward pass. Only matrix products are counted,
    including the product of the LM head. A multiply-add is two operations. The backward pass has
    twice as many operations as the forward pass. In attention a token sees (length + 1) / 2 keys
    on average.

    Args:
      config: the configuration of the model.
      length: the number of tokens in the sequence.
      frozen: the number of frozen blocks. They are not computed in a step, and a tied LM head needs
        no gradient of its table (see `gptjax.model.frozen`).
      lm_head: whether the product of the LM head is counted.
    """
    width = config.width
    projections = 4 * width * width + 2 * width * config.hidden_ffn_width
    attention = 2 * width * (length + 1) / 2
    layers = config.num_layers - frozen
    # The products of the LM head are the logits, the gradient of the states and that of the table.
    products = 3 if not (frozen and config.tied) else 2
    if not layers:
        products -= 1
    head = products * width * config.vocab_size if lm_head else 0
    return 2 * (3 * layers * (projections + attention) + head)


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
