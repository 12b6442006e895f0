"""Checksums that are the same on every mesh, and the ledger of the batches of a training.

Every record of a training step in metrics.jsonl holds a hash of all batches up to it, each as the
devices saw it: two runs that trained on the same batches, on whatever devices and hosts and however
often interrupted, have the same ledger.
"""

import hashlib

import jax
import jax.numpy as jnp

from gptjax.batch import Batch
from gptjax.checkpoint.checksum import checksum


def _mixed(x: jax.Array) -> jax.Array:
    """The words of x, each replaced by one of 32 random bits, zero by zero.

    Words of few bits, as of small numbers and of masks, would add up to equal sums too often. The
    finalizer of MurmurHash3 (Austin Appleby, public domain), a bijection.
    """
    words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return words ^ (words >> 16)


def of_batch(batch: Batch) -> jax.Array:
    """Returns a uint32 of all fields of a batch.

    Rows of padding at the end, which other numbers of devices ask for, leave it as it is.
    """
    total = jnp.uint32(0)
    for field in jax.tree.leaves(batch):
        total = total * jnp.uint32(0x9E3779B1) + checksum(_mixed(field))
    return total


def entry(before: str, batch_checksum: int) -> str:
    """Returns the ledger, 16 hexadecimal digits, after one more batch; "" is before the first."""
    return hashlib.blake2b(f"{before}:{batch_checksum}".encode(), digest_size=8).hexdigest()
