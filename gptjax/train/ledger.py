"""The ledger: a hash of all batches that a training has used, in their order.

Each record of a training step in metrics.jsonl holds the ledger up to this step. It is computed
from the batches in the memory of the devices. Two runs with the same batches have the same ledger,
whatever their devices and hosts, and however often they were interrupted.
"""

import hashlib

import jax
import jax.numpy as jnp

from gptjax.batch import Batch
from gptjax.checkpoint.checksum import checksum


def _mixed(x: jax.Array) -> jax.Array:
    """Returns the 32-bit words of x, each mapped to a word that looks random; 0 is mapped to 0.

    Without it, small numbers and masks, which have few bits, would often add up to equal sums. The
    map is the finalizer of MurmurHash3 (Austin Appleby, public domain), a bijection.
    """
    words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return words ^ (words >> 16)


def of_batch(batch: Batch) -> jax.Array:
    """Returns the checksum of all fields of a batch, a uint32.

    Rows of padding at the end do not change it: their number depends on the number of devices.
    """
    total = jnp.uint32(0)
    for field in jax.tree.leaves(batch):
        total = total * jnp.uint32(0x9E3779B1) + checksum(_mixed(field))
    return total


def entry(before: str, batch_checksum: int) -> str:
    """Returns the ledger after one more batch, 16 hexadecimal digits.

    Args:
      before: the ledger before this batch; "" before the first one.
      batch_checksum: from `of_batch`.
    """
    return hashlib.blake2b(f"{before}:{batch_checksum}".encode(), digest_size=8).hexdigest()
