"""Dropout with a mask that is computed by a hash function: nearly free, and equal on every mesh.

An element is kept or dropped according to a 32-bit hash of its row-major index and the key.
Therefore the backward pass computes the mask again instead of storing it, and the mask does not
depend on the sharding of the array. The hash function is the two-round multiply-xorshift of Chris
Wellons' hash prospector ("lowbias32"). One number of the key enters before the first round, and the
other number enters between the two rounds. Indices are taken modulo 2**32, so the mask of a larger
array repeats.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


@flax.struct.dataclass
class DropoutKey:
    """The dropout of one array: the rate, and the random key that selects the dropped elements."""

    bits: Array
    """The two numbers of the key, uint32 [2], from `key_bits`."""
    rate: float = flax.struct.field(pytree_node=False)
    """The probability that an element is dropped."""


def key_bits(key: Array) -> Array:
    """Returns two random numbers, uint32 [2], for a JAX random key."""
    return jax.random.bits(key, (2,), jnp.uint32)


def keep_at(index: Array, bits: tuple[Array, Array], rate: float) -> Array:
    """Returns the elements of the mask `keep` at the given row-major indices.

    Attention kernels use this function, because they compute an array block by block.

    Args:
      index: the row-major indices, uint32 in any shape.
      bits: the two numbers of a key, uint32 scalars.
      rate: the probability of False.

    Returns:
      The elements, bool in the shape of `index`.
    """
    x = index * jnp.uint32(0x9E3779B9) + bits[0]
    x ^= x >> 16
    x *= jnp.uint32(0x7FEB352D)
    x ^= x >> 15
    x ^= bits[1]
    x *= jnp.uint32(0x846CA68B)
    x ^= x >> 16
    return x >= jnp.uint32(int(rate * 2**32))


def keep(key: DropoutKey, shape: tuple[int, ...]) -> Array:
    """Returns the mask of an array of this shape: bool, True if the element is kept."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis, stride in enumerate(math.prod(shape[i + 1 :]) for i in range(len(shape))):
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
    return keep_at(index, (key.bits[0], key.bits[1]), key.rate)


@jax.custom_vjp
def dropout(x: Array, key: DropoutKey) -> Array:
    """Sets each element of `x` to 0 with probability `rate`, or divides it by 1 - rate."""
    # The product is float32. bfloat16 would round the factor and so change the expected value.
    scaled = x.astype(jnp.float32) * (1 / (1 - key.rate))
    return jnp.where(keep(key, x.shape), scaled, 0).astype(x.dtype)


def _forward(x: Array, key: DropoutKey) -> tuple[Array, DropoutKey]:
    return dropout(x, key), key


def _backward(key: DropoutKey, g: Array) -> tuple[Array, None]:
    return dropout(g, key), None


dropout.defvjp(_forward, _backward)
