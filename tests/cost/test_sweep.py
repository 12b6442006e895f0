"""The sweep: the choices that are compiled or left out, and their ranking."""

import json

import jax
import pytest
import runs

from gptjax.config.schema import Experiment, MeshConfig, ModelConfig, PretrainConfig, Remat
from gptjax.cost import compile, hardware, step_spec, sweep
from gptjax.errors import UserError

pytestmark = pytest.mark.devices(8)

FLAGS = (*runs.TINY, "--config.pretrain.batch_size=8", "--config.model.attention=plain")


def experiment(batch_size: int = 6, **mesh: int) -> Experiment:
    model = ModelConfig(vocab_size=96, context_length=16, num_layers=1, width=16, num_heads=2)
    found = Experiment(
        model=model, pretrain=PretrainConfig(batch_size=batch_size), mesh=MeshConfig(**mesh)
    )
    return step_spec.validated(found, "pretrain")


@pytest.mark.parametrize("devices", [1, 2, 4, 16, 64])
def test_every_choice_is_a_batch_and_a_mesh_of_these_devices(devices):
    found = list(sweep.choices(experiment(), "pretrain", devices))
    assert len(set(found)) == len(found)
    assert {choice.remat for choice in found} == set(Remat)
    for choice in found:
        data, fsdp, tensor = choice.mesh
        assert data * fsdp * tensor == devices
        assert choice.batch_size % devices == 0
        assert choice.batch_size >= 6
    sizes = [choice.batch_size for choice in found]
    assert sizes == sorted(sizes)


def test_the_experiments_own_mesh_comes_first():
    found = list(sweep.choices(experiment(data=2, fsdp=-1, tensor=2), "pretrain", 16))
    assert found[0].mesh == (2, 4, 2)
    changed = sweep.with_choice(experiment(), "pretrain", found[0])
    assert (changed.mesh.fsdp, changed.model.remat) == (4, "none")
    assert changed.pretrain.batch_size == 16


def test_the_ranking_has_what_fits_first_by_tokens_a_second():
    speeds = [(False, None), (True, 1.0), (False, 9.0), (True, 2.0)]
    entries = [{"fits": fits, "tokens_per_second": speed} for fits, speed in speeds]
    speeds = [(e["fits"], e["tokens_per_second"]) for e in sweep.rank(entries)]
    assert speeds[:2] == [(True, 2.0), (True, 1.0)]


def on(chip: hardware.Chip, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every topology one device of this machine, with the figures of `chip`."""
    target = compile.Target("v5e:1x1", jax.devices()[:1], chip)
    monkeypatch.setattr(compile, "target_of", lambda topology: target)


@pytest.mark.slow
def test_choices_are_compiled_ranked_and_counted(monkeypatch, capsys):
    on(hardware.Chip(1e12, 2**40, 1e9, 1e9, 1.0, 4, ""), monkeypatch)
    found = sweep.run(experiment(), "v5e:1x1", "pretrain", 2)
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(json.dumps(found))
    assert (found["compiled"], found["left_out"]) == (2, 7)
    first, second = found["ranking"]
    assert first["fits"]
    assert first["tokens_per_second"] >= second["tokens_per_second"] > 0
    assert {first["remat"], second["remat"]} == {"none", "dots"}
    for entry in (first, second):
        assert entry["tokens_per_second"] == 6 * 16 / entry["step_seconds"]
        assert 0 < entry["peak_memory_bytes_per_device"] < 2**30
    assert "not a measurement" in printed.err
    assert "7 choices not compiled" in printed.err


@pytest.mark.slow
def test_what_does_not_fit_is_not_tried_with_more(monkeypatch, capsys):
    on(hardware.Chip(1e12, 1000, 1e9, 1e9, 1.0, 4, ""), monkeypatch)
    found = sweep.run(experiment(), "v5e:1x1", "pretrain", 1)
    assert (found["compiled"], found["left_out"]) == (1, 6)
    assert [entry["batch_size"] for entry in found["ranking"]] == [6, 12, 24]
    assert not any(entry["fits"] for entry in found["ranking"])
    assert "batch 6 does not fit already" in capsys.readouterr().err


def test_a_mesh_that_cannot_be_is_a_line_of_the_table(monkeypatch):
    def refuse(*_):
        raise UserError("no such mesh")

    on(hardware.Chip(1e12, 2**40, 1e9, 1e9, 1.0, 4, ""), monkeypatch)
    monkeypatch.setattr(compile, "report", refuse)
    found = sweep.run(experiment(), "v5e:1x1", "pretrain", 1)
    assert found["ranking"][0]["reason"] == "no such mesh"


WRONG = {
    ("--topology=cpu:2",): "no published figures",
    ("--topology=v9:2x2",): "must be like v5e:4x4",
    ("--topology=cpu:2", "--sweep_limit=0"): "--sweep_limit=0: must be at least 1",
}


@pytest.mark.parametrize("more", WRONG)
def test_wrong_use_is_one_line(more):
    error = runs.main("--mode=compile", "--sweep", *FLAGS, *more).error
    assert WRONG[more] in error


@pytest.mark.tpu
def test_a_slice_is_swept_without_one():
    result = runs.main("--mode=compile", "--sweep", "--topology=v5e:2x2", "--sweep_limit=4", *FLAGS)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["compiled"] == 4
    speeds = [entry["tokens_per_second"] for entry in found["ranking"] if entry["fits"]]
    assert speeds == sorted(speeds, reverse=True)
    assert len(speeds) == 4
