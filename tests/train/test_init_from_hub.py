"""Runs that start from a model of the hub, with the command line and from Python."""

import json
import pathlib
import shutil
import signal
import time

import hub as hub_lib
import pytest
import runs
from huggingface_hub import constants
from refusals import fails

import gptjax
from gptjax.interop import convert

ADDRESS = f"hf://{hub_lib.GPT1}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return hub_lib.save_gpt1(tmp_path_factory.mktemp("gpt1"))


@pytest.fixture
def server(folder, monkeypatch, tmp_path):
    with hub_lib.Hub() as server:
        server.add(hub_lib.GPT1, folder)
        hub_lib.use(monkeypatch, server, tmp_path / "home")
        yield server


def flags(workdir: pathlib.Path, init_from: str = "gpt1") -> tuple[str, ...]:
    """The flags of a fine-tuning of 40 steps with a validation every 8."""
    return (
        "--config=finetune_file", f"--config.init_from={init_from}", f"--workdir={workdir}",
        *(flag for flag in runs.TINY if "dropout" in flag or "unroll" in flag),
        *runs.files().finetune,
    )  # fmt: skip


def config_of(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "config.json").read_text())


@pytest.mark.slow
def test_one_command_fine_tunes_from_gpt1_as_from_the_imported_folder(server, folder, tmp_path):
    result = runs.main(*flags(tmp_path / "w"))
    assert result.code == 0, result.err
    assert f"{ADDRESS}: downloading model.safetensors" in result.out
    config = config_of(tmp_path / "w")
    commit = server.repositories[hub_lib.GPT1].revisions["main"]
    assert (config["init_from"], config["init_from_commit"]) == (ADDRESS, commit)
    assert config["tokenizer"]["words"] == "exact"
    convert.import_weights(str(folder), str(tmp_path / "imported"), "huggingface")
    assert runs.main(*flags(tmp_path / "v", str(tmp_path / "imported"))).code == 0
    assert runs.records(str(tmp_path / "w")) == runs.records(str(tmp_path / "v"))

    # A continued run has the weights of its commit, also without hub, cache and network.
    steps = runs.steps(str(tmp_path / "w"), "finetune")
    newest = runs.arrays(str(tmp_path / "w"), "finetune", steps[-1])
    shutil.rmtree(tmp_path / "w" / "checkpoints" / "finetune" / str(steps[-1]))
    (tmp_path / "w" / "summary.json").unlink()
    other = server.add(hub_lib.GPT1, hub_lib.save_gpt1(tmp_path / "other", seed=1))
    shutil.rmtree(tmp_path / "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        result = runs.main(*flags(tmp_path / "w"))
    assert result.code == 0, result.err
    assert f"continuing at step {steps[-2]}" in result.out
    assert runs.arrays(str(tmp_path / "w"), "finetune", steps[-1]) == newest
    assert config_of(tmp_path / "w") == config

    # Another revision is another experiment. A new run gets the new commit.
    error = runs.main(*flags(tmp_path / "w", f"{ADDRESS}@{other}")).error
    assert "holds another experiment (init_from:" in error
    error = runs.main(*flags(tmp_path / "u"), "--config.tokenizer.vocab_size=9").error
    assert "--config.tokenizer.vocab_size: the tokenizer is that of" in error
    assert not (tmp_path / "u").exists()
    dropouts = ("embedding", "attention", "residual", "head")
    overrides = {
        **{f"model.{name}_dropout": 0.0 for name in dropouts}, "model.unroll": 1,
        "finetune.batch_size": 8, "finetune.steps": 2, "tokenizer.words": "fast",
    }  # fmt: skip
    gpt = gptjax.finetune(runs.rows(64), init_from="gpt1", progress=False, overrides=overrides)
    assert gpt.experiment.init_from_commit == other
    assert gpt.experiment.tokenizer.words == "fast"
    assert not gpt.tokenizer.exact
    assert gpt.config.width == 24


def test_a_wrong_address_ends_with_code_2_and_no_workdir(server, tmp_path):
    for init_from, message in (
        ("hf://gpt1", "--config.init_from=hf://gpt1: must be hf://OWNER/NAME"),
        ("hf://me/none", "--config.init_from=hf://me/none: there is no such model, or it is"),
    ):
        assert message in runs.main(*flags(tmp_path / "w", init_from)).error
        assert not (tmp_path / "w").exists()
    assert "`init_from`=hf://me/none: " in fails(
        gptjax.finetune, runs.rows(9), init_from="hf://me/none", progress=False
    )


def test_the_modes_read_a_model_of_the_hub(server, folder, tmp_path):
    convert.import_weights(str(folder), str(tmp_path / "imported"), "huggingface")
    prompt = ("--prompt=the cat", "--max_new_tokens=5")
    ours = runs.main("generate", "--checkpoint=gpt1", *prompt)
    theirs = runs.main("generate", f"--checkpoint={tmp_path}/imported", *prompt)
    assert ours.code == theirs.code == 0, ours.err
    assert ours.out == theirs.out
    result = runs.main("evaluate", "--checkpoint=hf://me/none", f"--input={runs.files().text}")
    assert result.error.startswith("error: --checkpoint=hf://me/none: there is no such model")


@pytest.mark.slow
def test_an_ablation_starts_from_the_hub(server, tmp_path):
    variants = ("--config.ablation=build", "--config.ablation.variants=full", "--seeds=1")
    result = runs.main("ablate", *flags(tmp_path / "w"), *variants)
    assert result.code == 0, result.err
    assert len(server.bodies()) == 4
    assert config_of(tmp_path / "w")["init_from_commit"]


@pytest.mark.slow
def test_two_processes_read_one_commit(server, tmp_path, monkeypatch):
    for name, value in server.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    processes = runs.start_several(2, *flags(tmp_path / "w"))
    results = [runs.finish(process) for process in processes]
    assert [result.code for result in results] == [0, 0], results
    assert server.bodies() == sorted(
        ["config.json", "merges.txt", "model.safetensors", "vocab.json"]
    )
    assert config_of(tmp_path / "w")["init_from_commit"]


@pytest.mark.slow
def test_a_killed_download_goes_on(server, tmp_path, monkeypatch):
    """The process is killed with the client's own pieces of 10 MiB, in a file of 28 MB."""
    server.add("me/larger", hub_lib.save_gpt1(tmp_path / "l", n_embd=384, n_layer=4, n_head=6))
    for name, value in server.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    command = ("generate", "--checkpoint=hf://me/larger", "--prompt=the", "--max_new_tokens=1")
    server.fault("/cdn/", cut=25_000_000, stall=True)
    process = runs.start(*command)
    end = time.monotonic() + 200
    while not any(p.stat().st_size for p in (tmp_path / "home").rglob("*.incomplete")):
        assert time.monotonic() < end
        time.sleep(0.1)
    process.kill()
    assert runs.finish(process).code == -signal.SIGKILL
    (partial,) = (tmp_path / "home").rglob("*.incomplete")
    arrived = partial.stat().st_size
    # Usually whole pieces. A kill in the middle of a write leaves a part of one.
    assert 0 < arrived <= 25_000_000
    server.requests.clear()
    result = runs.finish(runs.start(*command))
    assert result.code == 0, result.err
    (request,) = (each for each in server.requests if each.path.startswith("/cdn/"))
    assert {name.lower(): value for name, value in request.headers.items()}["range"] == (
        f"bytes={arrived}-"
    )
