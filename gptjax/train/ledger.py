"""The ledger: a running hash of all batches that a training has used.

The ledger depends on the order of the batches. In metrics.jsonl, each record of a training step
holds the ledger up to this step. The ledger is computed from the batches in the memory of the
devices. Two runs with the same batches have the same ledger. The number of devices, hosts and
interruptions does not change it.
"""

import hashlib

import jax
import jax.numpy as jnp

from gptjax.batch import Batch
from gptjax.checkpoint.checksum import checksum


def _mixed(x: jax.Array) -> jax.Array:
    """Returns the 32-bit words of x, each mapped to a word that looks random. 0 is mapped to 0.

    Without this map, different arrays of small numbers or masks would often have equal checksums,
    because their words have few bits. The map is a bijection, the finalizer of MurmurHash3 (Austin
    Appleby, public domain).
    """
    words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return words ^ (words >> 16)


def of_batch(batch: Batch) -> jax.Array:
    """Returns the checksum of the fields of a batch, a uint32.

    Rows of padding at the end of the batch do not change the checksum, because the number of these
    rows depends on the number of devices. `Batch.hidden` is left out, because its rounding depends
    on the devices too.
    """
    total = jnp.uint32(0)
    for field in jax.tree.leaves(batch.replace(hidden=None)):  # type: ignore[attr-defined]
        total = total * jnp.uint32(0x9E3779B1) + checksum(_mixed(field))
    return total


def entry(before: str, batch_checksum: int) -> str:
    """Returns the ledger after one more batch, 16 hexadecimal digits.

    Args:
      before: the ledger before this batch. "" means that this is the first batch.
      batch_checksum: the checksum of this batch from `of_batch`.
    """
    return hashlib.blake2b(f"{before}:{batch_checksum}".encode(), digest_size=8).hexdigest()
