"""Floating-point operations of training, counted from the model, and what a device can do."""

import functools
import time

import jax
import jax.numpy as jnp

from gptjax.config.schema import ModelConfig


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """Returns the operations of forward and backward for one token of a sequence of `length`.

    Matrix products alone, two operations a multiply-add, backward twice the forward; attention
    counts the keys that the causal mask leaves, (length + 1) / 2 on average; the tied LM head too.
    """
    width = config.width
    projections = 4 * width * width + 2 * width * config.hidden_ffn_width
    attention = 2 * width * (length + 1) / 2
    per_token = config.num_layers * (projections + attention) + width * config.vocab_size
    return 3 * 2 * per_token


@functools.cache
def matmul_ceiling(dtype: str, size: int = 1536) -> float:
    """Returns operations per second of the best of several square products on one device."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.float32))
    product(a).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
