"""Checksums of arrays. They are sums of integers, so they are equal on every mesh of devices."""

from typing import Any

import jax
import jax.numpy as jnp


def checksum(x: jax.Array) -> jax.Array:
    """Returns a uint32 checksum of the values of `x` and of their positions.

    The checksum is a sum of integers modulo 2^32, so the order of the additions does not change it.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    # `place` becomes the row-major index of each word in the whole array. A word is one value as an
    # unsigned integer. The index is computed without `reshape(-1)`, because flattening an array
    # that is sharded along an inner axis would need an all-gather.
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(words.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place, stride = place + along * jnp.uint32(stride % 2**32), stride * words.shape[axis]
    # Each word is multiplied by an odd number that depends on its position. Odd numbers are
    # invertible modulo 2^32, so a single flipped bit always changes the sum. Swapping two words
    # almost always changes it.
    return (words * (place * jnp.uint32(2) + jnp.uint32(1))).sum(dtype=jnp.uint32)


@jax.jit
def _checksums(tree: Any) -> Any:
    return jax.tree.map(checksum, tree)


def checksums(tree: Any) -> dict[str, int]:
    """Returns a dictionary: path of an array in the tree -> checksum of the array."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(_checksums(tree)))
    return {jax.tree_util.keystr(path): int(value) for path, value in leaves}


def verify(tree: Any, saved: dict[str, int]) -> None:
    """Requires that the arrays have their saved checksums.

    Args:
      tree: the arrays that were read.
      saved: path of an array -> the checksum of the array that was saved.

    Raises:
      ValueError: a checksum differs. The message has the path of the first such array.
    """
    for name, value in checksums(tree).items():
        if saved.get(name) != value:
            raise ValueError(f"array {name} does not have the checksum it was saved with")
