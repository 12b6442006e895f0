"""The train step, compiled by libtpu for TPU slices: its memory and its collectives.

Run it by `pytest -m tpu`, with requirements-tpu.txt installed. No TPU is needed.
"""

import functools
import json

import compiled_sizes
import pytest
import runs

from gptjax.cost import compile, hardware

pytestmark = pytest.mark.tpu


@functools.cache
def report(topology: str, *flags: str) -> dict:
    result = runs.main("--mode=compile", f"--topology={topology}", *flags)
    assert result.code == 0, result.err
    return json.loads(result.out)


def tiny(topology: str, *more: str) -> dict:
    return report(topology, *compiled_sizes.FLAGS, *more)


SLICES = {"v5e:2x2": 4, "v4:2x2x1": 4, "v5p:2x2x1": 4, "v6e:1x1": 1, "2xv5e:2x2": 8}


@pytest.mark.parametrize("topology", SLICES)
def test_a_tpu_is_compiled_for_without_one(topology):
    found, devices = tiny(topology), SLICES[topology]
    assert found["devices"] == devices
    assert found["fits"] is True
    assert found["loops_counted_once"] == []
    # The compiler may turn small products into elementwise operations, which do not count.
    expected = compiled_sizes.products(compiled_sizes.ROWS * compiled_sizes.LENGTH)
    assert 0.5 < found["flops_per_device"] * devices / expected < 1.05
    assert 0 < found["mfu"] < 1
    assert ("all-reduce" in found["collectives"]) == (devices > 1)
    sent = found["communication"]
    assert sum(e["count"] * e["bytes"] for e in sent) == sum(
        entry["bytes"] for entry in found["collectives"].values()
    )
    parts = found["estimate"]
    assert (parts["communication_seconds"] > 0) == (devices > 1)
    assert parts["exposed_communication_seconds"] <= parts["communication_seconds"]
    roof = max(parts["compute_seconds"], parts["memory_seconds"])
    assert found["step_seconds"] == roof + parts["exposed_communication_seconds"]
    # A matrix has three arguments of its shape: the parameter and Adam's two moments.
    held = [e for e in found["largest_buffers"] if e["argument"]]
    assert held[0]["count"] % 3 == 0
    assert held[0]["op_name"].startswith("state.")


def test_what_a_tpu_cannot_hold_is_said():
    found = tiny(
        "v5e:1x1", "--config.pretrain.batch_size=1024", "--config.model.context_length=4096",
        "--config.model.num_heads=16",
    )  # fmt: skip
    assert found["fits"] is False
    assert found["peak_memory_bytes_per_device"] > hardware.CHIPS["v5e"].memory_bytes
    assert found["step_seconds"] is None
    # The message of libtpu has the same sum, rounded to two decimals of GiB.
    total = found["memory"]["buffers_at_peak"]
    said = compile._bytes_required(found["refused"], 0)
    assert total == pytest.approx(said, rel=0.01)
    largest = found["largest_buffers"][0]
    assert largest["bytes"] * largest["count"] > total / 20
    assert not largest["argument"]


MORE = {
    "data=1 fsdp=4": ["--config.mesh.data=1", "--config.mesh.fsdp=4"],
    "data=2 tensor=2": ["--config.mesh.tensor=2"],
    "tensor=4": ["--config.mesh.tensor=4", "--config.model.num_heads=4"],
    "remat=dots": ["--config.mesh.fsdp=2", "--config.model.remat=dots"],
    "remat=full": ["--config.mesh.fsdp=2", "--config.model.remat=full"],
    "accumulation=2": ["--config.mesh.fsdp=2", "--config.pretrain.optimizer.accumulation=2"],
    "bfloat16": ["--config.mesh.fsdp=2", "--config.model.dtype=bfloat16"],
}


@pytest.mark.parametrize("case", MORE)
def test_meshes_and_recomputation_are_compiled_for(case):
    found = tiny("v5e:2x2", *MORE[case])
    assert found["fits"] is True
    assert found["loops_counted_once"] == []


MESHES = {"data": (4, 1, 1), "fsdp": (1, 4, 1), "tensor": (2, 1, 2)}


@pytest.mark.parametrize("mesh", MESHES)
def test_finetuning_is_compiled_for(mesh):
    sizes = zip(("data", "fsdp", "tensor"), MESHES[mesh], strict=True)
    flags = [f"--config.mesh.{name}={size}" for name, size in sizes]
    found = tiny("v5e:2x2", "--stage=finetune", "--config.finetune.batch_size=8", *flags)
    assert found["fits"] is True
    assert found["stage"] == "finetune"


def gpt1(topology: str, rows: int, *more: str) -> dict:
    batch = f"--config.pretrain.batch_size={rows}"
    return report(topology, "--config=experiments/gpt1_pretrain.py", batch, *more)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gpt1_fits_a_v5e_and_more_chips_need_no_more_memory():
    """With 32 x 512 tokens on a chip of 16 GB, in bfloat16, only gradients are communicated."""
    found = [gpt1("v5e:2x2", 128), gpt1("v5e:4x4", 512), gpt1("v5e:8x8", 2048)]
    for each in found:
        assert each["fits"] is True
        assert list(each["collectives"]) == ["all-reduce"]
        # The float32 gradients, once. Losses, counts and the batch's checksum are a few bytes.
        assert each["collectives"]["all-reduce"]["bytes"] == pytest.approx(
            4 * each["parameters"], rel=1e-3
        )
    peaks = [each["peak_memory_bytes_per_device"] for each in found]
    assert max(peaks) <= min(peaks) * 1.001


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_between_slices_only_parts_of_gradients_are_sent():
    """The axis data has the two slices, the axis fsdp the four chips of each."""
    found = gpt1("2xv5e:2x2", 256, "--config.mesh.data=2", "--config.mesh.fsdp=4")
    assert found["fits"] is True
    between = {name for name in found["collectives"] if name.startswith("dcn-")}
    assert between == {"dcn-all-reduce"}
    sent = found["collectives"]["dcn-all-reduce"]["bytes"]
    # Each chip sends a quarter of the gradients, and the padding of their tiles (192 of 256).
    assert 1 <= sent / (found["parameters"] * 4 / 4) < 1.2
    one = gpt1("v5e:2x2", 128, "--config.mesh.data=1", "--config.mesh.fsdp=4")
    assert found["peak_memory_bytes_per_device"] < 1.02 * one["peak_memory_bytes_per_device"]
    assert found["tokens_per_second"] > 1.5 * one["tokens_per_second"]
