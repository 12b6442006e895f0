"""Checksums of arrays: integer sums, which are equal on every mesh."""

from typing import Any

import jax
import jax.numpy as jnp


def checksum(x: jax.Array) -> jax.Array:
    """Returns a uint32 checksum of the values of `x` and of their positions.

    It is a sum of integers modulo 2^32, so it does not depend on the order of the additions.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    # The index of each word in the whole array, row by row. To flatten the array instead would
    # gather one that is sharded along an inner axis.
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(words.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place, stride = place + along * jnp.uint32(stride % 2**32), stride * words.shape[axis]
    # An odd factor for each position: a single flipped bit always changes the sum, and so do almost
    # all exchanges of two words.
    return (words * (place * jnp.uint32(2) + jnp.uint32(1))).sum(dtype=jnp.uint32)


@jax.jit
def _checksums(tree: Any) -> Any:
    return jax.tree.map(checksum, tree)


def checksums(tree: Any) -> dict[str, int]:
    """Returns path of an array in the tree -> its checksum."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(_checksums(tree)))
    return {jax.tree_util.keystr(path): int(value) for path, value in leaves}


def verify(tree: Any, saved: dict[str, int]) -> None:
    """Raises `ValueError` with the path of the first array whose checksum is not the saved one."""
    for name, value in checksums(tree).items():
        if saved.get(name) != value:
            raise ValueError(f"array {name} does not have the checksum it was saved with")
