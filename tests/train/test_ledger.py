"""The ledger differs between different batches, and does not depend on devices or padding."""

import jax
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import mesh as mesh_lib
from gptjax.checkpoint import checksum as checksum_lib
from gptjax.data import loader
from gptjax.data.packing import Packer
from gptjax.train import ledger

pytestmark = pytest.mark.devices(8)


def task_batch(divisor=1):
    _, examples = small.examples("similarity")
    packer = Packer(examples.lengths, len(examples), 64, divisor)
    return packer.pack(examples, np.arange(len(examples)))[0]


def text_batch():
    rng = np.random.default_rng(0)
    return loader.lm_batch([rng.integers(1, 90, 16).astype(np.int32) for _ in range(8)], 16, 8)


def murmur(word: int) -> int:
    """Returns fmix32 of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = (word ^ word >> shift) * factor % 2**32
    return word ^ word >> 16


def by_hand(batch) -> int:
    """Returns the checksum of a batch, computed with Python's integers."""
    total = 0
    for field in jax.tree.leaves(batch):
        words = np.ascontiguousarray(field).view(np.uint32).reshape(-1).tolist()
        total = total * 0x9E3779B1 + sum(murmur(word) * (2 * i + 1) for i, word in enumerate(words))
    return total % 2**32


def test_the_reference_is_murmur():
    """The expected values are those of the published finalizer."""
    assert [murmur(word) for word in (0, 1, 2**32 - 1)] == [0, 0x514E28B7, 0x81F16F39]


@pytest.mark.parametrize("make", [task_batch, text_batch])
def test_of_batch(make):
    assert int(jax.jit(ledger.of_batch)(make())) == by_hand(make())


def test_every_field_and_the_order_of_its_rows_count():
    batch = task_batch()
    known = [by_hand(batch)]
    for name, field in vars(batch).items():
        if name == "hidden":  # the states of frozen blocks do not count
            continue
        changed = field.copy()
        changed.reshape(-1)[-1] += 1
        others = [changed] if np.array_equal(field, field[::-1]) else [changed, field[::-1]]
        known += [int(ledger.of_batch(batch.replace(**{name: other}))) for other in others]
    assert len(set(known)) == len(known) > 10


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_devices_and_their_rows_of_padding_do_not_count(sizes):
    mesh = small.mesh(**sizes)
    batch = task_batch(mesh_lib.batch_divisor(mesh))
    assert batch.tokens.shape[0] > task_batch().tokens.shape[0]
    placed = mesh_lib.to_devices(batch, mesh)
    assert int(jax.jit(ledger.of_batch)(placed)) == by_hand(task_batch())


def test_a_cut_array_is_not_gathered():
    """Devices exchange sums only: a checkpoint's arrays may be as large as a device's memory."""
    mesh = small.mesh(data=1, fsdp=4, tensor=2)
    array = np.random.default_rng(0).normal(size=(3, 16, 2, 8)).astype(np.float32)
    expected = sum(
        word * (2 * i + 1) for i, word in enumerate(array.view(np.uint32).ravel().tolist())
    )
    checksum = jax.jit(checksum_lib.checksum)
    for spec in (P(None, "fsdp", None, "tensor"), P(None, "tensor", None, "fsdp"), P()):
        placed = jax.device_put(array, NamedSharding(mesh, spec))
        assert int(checksum(placed)) == expected % 2**32
        program = checksum.lower(placed).compile().as_text()
        assert ("all-reduce" in program) == (spec != P())
        assert "all-gather" not in program


def test_entries_tell_order_and_history():
    def after(*sums):
        entry = ""
        for each in sums:
            entry = ledger.entry(entry, each)
        return entry

    assert len({after(1), after(2), after(1, 2), after(2, 1), after(12), after(1, 2, 3)}) == 6
    assert after(1, 2) == ledger.entry(after(1), 2)
