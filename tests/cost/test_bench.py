"""Mode `bench`: relations among its figures, synthetic batches, errors."""

import json
import os
import pathlib

import jax
import numpy as np
import pytest
import runs
import small

from gptjax.config.schema import Experiment, FinetuneConfig, MeshConfig, ModelConfig
from gptjax.cost import bench, step_spec
from gptjax.errors import UserError
from gptjax.model import flops

pytestmark = pytest.mark.devices(8)

LENGTH, VOCABULARY, ROWS = 16, 96, 8
FLAGS = ("--mode=bench", "--steps=3", *runs.TINY, f"--config.pretrain.batch_size={ROWS}")
MODEL = ModelConfig(
    vocab_size=VOCABULARY, context_length=LENGTH, num_layers=1, width=16, num_heads=2,
    embedding_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0, head_dropout=0.0,
)  # fmt: skip


def report(*more: str) -> dict:
    result = runs.main(*FLAGS, *more)
    assert result.code == 0, result.err
    return json.loads(result.out)


def check_speed(found: dict, tokens: int) -> None:
    """The figures of train steps follow from the median step, the batch and `model.flops`."""
    seconds = found["step_ms_median"] / 1e3
    assert 0 < found["step_ms_median"] <= found["step_ms_p90"]
    assert found["batch"]["tokens"] == tokens
    assert found["tokens_per_second"] == pytest.approx(tokens / seconds)
    expected = flops.train_flops_per_token(MODEL, LENGTH) * tokens
    assert found["flops_per_step"] == pytest.approx(expected)
    assert found["flops_per_second"] == pytest.approx(expected / seconds)
    ceiling = found["mfu_against"]["flops_per_second"]
    assert found["mfu"] == pytest.approx(found["flops_per_second"] / ceiling)
    assert 0 < found["mfu"] < 1
    assert found["compile_seconds"] > 0
    assert found["peak_memory_bytes"] > 2**20
    assert found["steps"] == 3


@pytest.mark.slow
def test_launch_prints_one_json_object_and_writes_it(tmp_path):
    path = tmp_path / "report.json"
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    process = runs.start(*FLAGS, f"--output={path}", cwd=tmp_path, env=environment)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    found = json.loads(out)
    assert found == json.loads(path.read_text())
    assert list(tmp_path.iterdir()) == [path], "nothing else is written"
    assert "compiled in" in err
    check_speed(found, ROWS * LENGTH)
    assert (found["bench"], found["stage"], found["devices"]) == ("train", "pretrain", 1)
    assert found["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert found["model"]["num_layers"] == 1
    assert found["allocator"] == "glibc.malloc.hugetlb=1"
    assert f"jax {jax.__version__}" in found["machine"]


def test_the_mesh_is_that_of_the_experiment():
    found = report(
        "--stage=finetune", "--config.finetune.batch_size=8", "--config.mesh.data=4",
        "--config.mesh.fsdp=2",
    )  # fmt: skip
    assert found["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    assert found["devices"] == 8
    check_speed(found, 8 * LENGTH)


def test_generation_is_timed_by_the_token():
    found = report("--bench=generate", "--max_new_tokens=9", "--num_samples=2")
    assert (found["prompt_tokens"], found["max_new_tokens"], found["num_samples"]) == (16, 9, 2)
    seconds = found["call_ms_median"] / 1e3
    assert found["tokens_per_second"] == pytest.approx(2 * 9 / seconds)
    assert found["first_token_ms"] > 0
    total = found["first_token_ms"] + 8 * found["ms_per_token"]
    assert total == pytest.approx(found["call_ms_median"])


def test_generation_needs_only_one_of_the_stages():
    experiment = Experiment(model=MODEL, finetune=FinetuneConfig())
    request = bench.Request("generate", steps=1, max_new_tokens=2)
    assert bench.run(experiment, request)["tokens_per_second"] > 0


@pytest.mark.parametrize("stage", step_spec.STAGES)
def test_input_is_the_data_of_the_experiment(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = (*runs.files().pretrain, *runs.files().finetune)
    found = report("--bench=input", f"--stage={stage}", *files)
    assert found["batch"]["rows"] % 8 == 0
    per_batch = found["batch"]["tokens"]
    assert 0 < per_batch <= found["batch"]["rows"] * found["batch"]["row_length"]
    assert found["tokens_per_second"] == pytest.approx(per_batch * found["batches_per_second"])
    assert found["load_seconds"] > 0
    assert found["first_batch_seconds"] > 0
    assert not list(tmp_path.iterdir())


def planned(**values) -> step_spec.StepSpec:
    experiment = Experiment(model=MODEL, mesh=MeshConfig(), finetune=FinetuneConfig(**values))
    return step_spec.build(step_spec.validated(experiment, "finetune"), "finetune", small.mesh(4))


@pytest.mark.parametrize("row_length", [0, 2 * 3 * LENGTH + 5])
def test_a_synthetic_batch_is_what_the_packer_would_make(row_length):
    made = planned(task="multiple_choice", choices="a,b,c", batch_size=6, row_length=row_length)
    batch = bench.synthetic_batch(made)
    for ours, like in zip(jax.tree.leaves(batch), jax.tree.leaves(made.batch), strict=True):
        assert (ours.shape, ours.dtype) == (like.shape, like.dtype)
    examples = 2 if row_length else 1
    filled = examples * 3 * LENGTH
    segments = np.repeat(np.arange(1, examples * 3 + 1), LENGTH)
    assert (batch.segment_ids[:, :filled] == segments).all()
    assert (batch.positions[:, :filled] == np.tile(np.arange(LENGTH), examples * 3)).all()
    for array in (batch.tokens, batch.segment_ids, batch.positions, batch.lm_weights):
        assert not array[:, filled:].any()
    # The last token of a sequence predicts no token, and the task head reads its state.
    ends = np.arange(examples * 3) * LENGTH + LENGTH - 1
    assert batch.lm_weights.sum(axis=1).tolist() == [filled - len(ends)] * 8
    assert not batch.lm_weights[:, ends].any()
    assert (batch.extract[:, :examples].reshape(8, -1) == ends).all()
    assert batch.example_mask.sum(axis=1).tolist() == [examples] * 8
    assert batch.candidate_mask.sum() == 8 * examples * 3
    assert 0 <= batch.labels.min() <= batch.labels.max() < 3


def test_without_the_lm_loss_its_head_is_not_counted():
    both, task = (bench.model_flops_per_token(planned(lm_weight=weight)) for weight in (0.5, 0.0))
    assert both - task == 3 * 2 * MODEL.width * VOCABULARY
    assert both == flops.train_flops_per_token(MODEL, LENGTH)


def test_the_compilation_is_a_real_one():
    """The program neither comes from the session's compilation cache nor goes into it."""
    cache = pathlib.Path(jax.config.jax_compilation_cache_dir)
    experiment = Experiment(model=MODEL, finetune=FinetuneConfig(batch_size=4))
    made = step_spec.build(experiment, "finetune", small.mesh(1))

    def kept() -> set[str]:
        names = os.listdir(cache) if cache.is_dir() else []
        return {name for name in names if name.startswith("jit_step")}

    before = kept()
    _, seconds = bench._compile(made, small.mesh(1))
    assert seconds > 0.1, "as long as what would be kept"
    assert kept() == before
    assert jax.config.jax_enable_compilation_cache


def test_the_peak_is_what_the_devices_say(monkeypatch):
    class Device:
        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return {"peak_bytes_in_use": self.peak, "bytes_in_use": 1}

    assert bench._peak_memory()["peak_memory_of"] == "the process, compiler included"
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(5), Device(7)])
    assert bench._peak_memory() == {"peak_memory_bytes": 7, "peak_memory_of": "the fullest device"}


BAD_FLAGS = {
    "--bench=serve": "train|generate|input",
    "--steps=-1": "--steps=-1: must not be negative",
    "--bench=generate --max_new_tokens=1": "--max_new_tokens=1: must be greater than 1",
    "--bench=generate --num_samples=0": "--num_samples=0: must be greater than 0",
    "--config.pretrain.batch_size=3": "must be a multiple of 8",
    "--config.mesh.fsdp=3": "3 does not divide",
    "--config.pretrain=none": "--stage=pretrain: the experiment has no pretrain part",
    "--bench=input --config.finetune=none --stage=finetune": "no finetune part",
}


@pytest.mark.parametrize("more", BAD_FLAGS)
def test_what_does_not_fit_is_one_line(more):
    flags = FLAGS
    if "pretrain=none" in more:
        flags = [flag for flag in FLAGS if "config.pretrain" not in flag]
    assert BAD_FLAGS[more] in runs.main(*flags, *more.split()).error


@pytest.mark.parametrize("wrong", [{"what": "serve"}, {"stage": "test"}])
def test_a_wrong_request_says_what_there_is(wrong):
    with pytest.raises(UserError, match="must be one of"):
        bench.Request(**wrong)
