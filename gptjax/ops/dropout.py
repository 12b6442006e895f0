"""Dropout from a counter hash: as good as free, and the same on every mesh.

Each element's bit is a 32-bit mix of its index and the key, so the mask is recomputed in the
backward pass instead of stored, and does not depend on how the array is split over devices.
The mixer is the two-round multiply-xorshift of Chris Wellons' hash prospector ("lowbias32"), keyed
between its rounds. Indices wrap at 2**32: arrays larger than that repeat their mask.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def key_words(key: Array) -> Array:
    """Returns uint32 [2] from a JAX random key: what `keep` and `dropout` take."""
    return jax.random.bits(key, (2,), jnp.uint32)


def keep_at(index: Array, words: tuple[Array, Array], rate: float) -> Array:
    """Returns bool like `index`: the mask of `keep` at the elements of these row-major indices.

    For kernels, which see an array in blocks.

    Args:
      index: uint32, any shape.
      words: the key's two words, uint32 scalars.
      rate: probability of False.
    """
    x = index * jnp.uint32(0x9E3779B9) + words[0]
    x ^= x >> 16
    x *= jnp.uint32(0x7FEB352D)
    x ^= x >> 15
    x ^= words[1]
    x *= jnp.uint32(0x846CA68B)
    x ^= x >> 16
    return x >= jnp.uint32(int(rate * 2**32))


def keep(words: Array, shape: tuple[int, ...], rate: float) -> Array:
    """Returns bool `shape`, each element True with probability 1 - rate.

    Args:
      words: uint32 [2], the key.
      shape: of the array to drop from.
      rate: probability of False.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for axis, stride in enumerate(math.prod(shape[i + 1 :]) for i in range(len(shape))):
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
    return keep_at(index, (words[0], words[1]), rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dropout(x: Array, words: Array, rate: float) -> Array:
    """Zeroes elements of `x` with probability `rate` and scales the rest by 1 / (1 - rate)."""
    # In float32: bfloat16 would round the factor itself, and so bias every expectation.
    scaled = x.astype(jnp.float32) * (1 / (1 - rate))
    return jnp.where(keep(words, x.shape, rate), scaled, 0).astype(x.dtype)


def _forward(x: Array, words: Array, rate: float) -> tuple[Array, Array]:
    return dropout(x, words, rate), words


def _backward(rate: float, words: Array, g: Array) -> tuple[Array, None]:
    return dropout(g, words, rate), None


dropout.defvjp(_forward, _backward)
