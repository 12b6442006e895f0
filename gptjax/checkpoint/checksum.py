"""Checksums of arrays: integer sums, so that they are equal on every mesh."""

from typing import Any

import jax
import jax.numpy as jnp


def checksum(x: jax.Array) -> jax.Array:
    """Returns a uint32 of the bits of `x` and their places: integer sums, in any order equal."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    # Each word's place in the whole array. Flattened, an array cut along an inner axis would have
    # to be gathered first.
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(words.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place, stride = place + along * jnp.uint32(stride % 2**32), stride * words.shape[axis]
    # Odd weights by position: no single flip goes unnoticed, and hardly an exchange of two words.
    return (words * (place * jnp.uint32(2) + jnp.uint32(1))).sum(dtype=jnp.uint32)


@jax.jit
def _checksums(tree: Any) -> Any:
    return jax.tree.map(checksum, tree)


def checksums(tree: Any) -> dict[str, int]:
    """Returns array path -> 32-bit checksum; integer sums, so the same on every mesh."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(_checksums(tree)))
    return {jax.tree_util.keystr(path): int(value) for path, value in leaves}


def verify(found: dict[str, int], saved: dict[str, int]) -> None:
    """Compares checksums by array path; a `ValueError` names the first that differs."""
    for name, value in found.items():
        if saved.get(name) != value:
            raise ValueError(f"array {name} does not have the checksum it was saved with")
