"""Whole trainings: they learn, write their files, continue, and end in one line on errors."""

import json
import math
import os
import pathlib
import time

import numpy as np
import pytest
import runs

import gptjax
from gptjax.checkpoint import load
from gptjax.cluster.stop import StopRequest
from gptjax.data import loader
from gptjax.data.tokens import tokenizer
from gptjax.train import run


def test_what_a_run_leaves_behind():
    workdir = runs.trained()
    assert set(os.listdir(workdir)) == {
        "checkpoints", "config.json", "metrics.jsonl", "plots", "summary.json", "tensorboard",
        "tokenizer.json",
    }  # fmt: skip
    for name in ("loss.png", "score.png"):
        assert pathlib.Path(workdir, "plots", name).read_bytes().startswith(b"\x89PNG")
    config = json.loads(pathlib.Path(workdir, "config.json").read_text())
    assert config["model"]["width"] == 16
    assert config["pretrain"]["train_files"] == runs.files().text
    summary = runs.summary(workdir)
    assert list(summary) == ["pretrain", "finetune"]
    pretrain, finetune = summary["pretrain"], summary["finetune"]
    assert set(pretrain) == {
        "steps", "validation_loss", "validation_perplexity", "tokens_per_second", "input_wait",
        "mfu",
    }  # fmt: skip
    assert (pretrain["steps"], finetune["steps"]) == (20, 40)
    assert pretrain["validation_perplexity"] == pytest.approx(math.exp(pretrain["validation_loss"]))
    assert pretrain["tokens_per_second"] > 0
    assert 0 < pretrain["mfu"] < 1
    for part in (pretrain, finetune):
        assert 0 <= part["input_wait"] < 1
    for split in ("validation", "test"):
        names = {"loss", "task_loss", "lm_loss", "accuracy", "calibrated_task_loss"}
        assert names == set(finetune[split])
    entry = finetune["calibration"]
    loaded = gptjax.load(workdir)
    assert loaded.temperature == entry["temperature"] > 0
    for split, rows in (("validation", 21), ("test", 19)):
        assert sum(entry[split]["bins"]["count"]) == rows
        losses = finetune[split]["calibrated_task_loss"], finetune[split]["task_loss"]
        assert split == "test" or losses[0] <= losses[1] + 1e-6


def test_the_wait_for_a_slow_loader_is_reported(tmp_path, monkeypatch):
    quick = runs.summary(runs.trained())["pretrain"]["input_wait"]
    drawn = loader.TextBatches.__getitem__

    def draw(self, step):
        time.sleep(0.25)
        return drawn(self, step)

    monkeypatch.setattr(loader.TextBatches, "__getitem__", draw)
    result = runs.main(
        *runs.TINY, *runs.files().pretrain, "--config.finetune=none", f"--workdir={tmp_path}/w",
    )  # fmt: skip
    assert result.code == 0, result.err
    slow = runs.summary(str(tmp_path / "w"))["pretrain"]["input_wait"]
    assert quick < 0.5 < slow < 1
    assert f"pretrain: {slow:.0%} of the time waiting for batches\n" in result.out


def test_tokens_from_the_cache_train_the_same_model(tmp_path, monkeypatch):
    """A damaged cache, or one that cannot be written, does not change the result either."""
    expected = runs.arrays(runs.trained(), "pretrain", 20)
    kept = tmp_path / "cache" / "data"

    def train(name, cache):
        monkeypatch.setenv("GPTJAX_CACHE", str(cache))
        workdir = str(tmp_path / name)
        flags = (*runs.TINY, *runs.files().pretrain, "--config.finetune=none")
        result = runs.main(*flags, f"--workdir={workdir}")
        assert result.code == 0, result.err
        assert runs.arrays(workdir, "pretrain", 20) == expected

    train("cold", tmp_path / "cache")
    assert sorted(path.suffix for path in kept.iterdir()) == [".bin", ".bin", ".json", ".json"]
    with monkeypatch.context() as patch:  # tokenising again would fail
        patch.setattr(tokenizer.Tokenizer, "encode_batch", None)
        patch.setattr(tokenizer, "train_bpe", None)
        train("warm", tmp_path / "cache")
    for path in kept.iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    train("damaged", tmp_path / "cache")
    train("none", runs.write(tmp_path / "file", b"a file where the folder should be"))


def test_a_workdir_of_an_older_version_goes_on(tmp_path):
    """Its config.json lacks newer fields, which then have their defaults."""
    workdir = runs.copy(tmp_path)
    path = pathlib.Path(workdir, "config.json")
    config = json.loads(path.read_text())
    del config["probes"], config["ablation"], config["model"]["tied"]
    del config["finetune"]["transfer"]
    path.write_text(json.dumps(config))
    again = runs.main(*runs.TINY, *runs.files().pretrain, *runs.files().finetune,
                      f"--workdir={workdir}")  # fmt: skip
    assert again.code == 0, again.err


def test_the_log_has_every_step_and_every_validation():
    records = runs.records(runs.trained())

    def steps(stage, split):
        return [r["step"] for r in records if (r["stage"], r["split"]) == (stage, split)]

    assert steps("pretrain", "train") == list(range(1, 21))
    assert steps("pretrain", "validation") == [10, 20]
    assert steps("finetune", "train") == list(range(1, 41))
    assert steps("finetune", "validation") == [8, 16, 24, 32, 40]
    assert steps("finetune", "test") == [40]
    by_step = {r["step"]: r for r in records if r["stage"] == "pretrain" and r["split"] == "train"}
    assert {"loss", "gradient_norm", "learning_rate"} <= set(by_step[1])
    assert by_step[1]["learning_rate"] == pytest.approx(0.005)
    assert by_step[2]["learning_rate"] == pytest.approx(0.01)
    best = min(r["loss"] for r in records if r["stage"] == "pretrain" and r["split"] != "train")
    assert runs.summary(runs.trained())["pretrain"]["validation_loss"] == pytest.approx(best)


def test_a_predictable_text_is_learned(tmp_path):
    text = runs.write(tmp_path / "t.txt", "abcdefgh" * 400)
    result = runs.main(
        *runs.TINY, *runs.files().pretrain, "--config.finetune=none", f"--workdir={tmp_path}/w",
        f"--config.pretrain.train_files={text}", "--config.tokenizer.kind=character",
        "--config.pretrain.steps=250", "--config.pretrain.eval_every=250",
    )  # fmt: skip
    assert result.code == 0, result.err
    losses = [r["loss"] for r in runs.records(str(tmp_path / "w")) if r["split"] == "train"]
    assert losses[0] > 0.8 * math.log(96)
    loss = runs.summary(str(tmp_path / "w"))["pretrain"]["validation_loss"]
    assert loss < 0.05 * math.log(8)
    said = runs.main(
        "--mode=generate", f"--checkpoint={tmp_path}/w", "--prompt=cde", "--max_new_tokens=12",
        "--temperature=0",
    )  # fmt: skip
    assert said.out.strip() == "cdefghabcdefgha"


class StopAtOnce(StopRequest):
    """A request to stop that is there from the start."""

    def __call__(self) -> bool:
        return True


def test_a_separable_task_is_learned_from_a_pretrained_checkpoint(tmp_path, monkeypatch):
    """`init_from` decides the tokenizer, the sizes and the first weights of the run."""
    workdir, files = str(tmp_path / "w"), runs.files()
    command = (
        *(flag for flag in runs.TINY if "dropout" in flag), *files.finetune,
        "--config.pretrain=none", f"--workdir={workdir}",
        f"--config.init_from={runs.trained()}/checkpoints/pretrain",
        # These are the sizes of the checkpoint.
        "--config.model.width=16", "--config.model.vocab_size=0", "--config.model.ffn_width=64",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(run, "StopRequest", StopAtOnce)
        assert runs.main(*command).code == 75
    best = load.open_checkpoint(f"{runs.trained()}/checkpoints/pretrain").step
    pretrained = runs.arrays(runs.trained(), "pretrain", best)
    begun = runs.arrays(workdir, "finetune", 0)
    for name, array in pretrained.items():
        assert not name.startswith("params") or begun[name] == array, name
    new = {name for name in begun.keys() - pretrained.keys() if name.startswith("params")}
    assert new == {"params['task_head']['bias']", "params['task_head']['kernel']"}

    result = runs.main(*command)
    assert result.code == 0, result.err
    summary = runs.summary(workdir)["finetune"]
    assert summary["validation"]["accuracy"] == summary["test"]["accuracy"] == 1.0
    ours, theirs = (
        load.open_checkpoint(f"{each}/checkpoints/{stage}").meta
        for each, stage in ((workdir, "finetune"), (runs.trained(), "pretrain"))
    )
    assert ours.tokenizer_hash == theirs.tokenizer_hash
    assert (ours.model.width, ours.model.vocab_size) == (16, 96)


@pytest.mark.parametrize("flag", ["model.width=48", "tokenizer.vocab_size=80"])
def test_what_init_from_would_overrule_is_refused(tmp_path, flag):
    source = f"--config.init_from={runs.trained()}"
    result = runs.main(
        *runs.files().finetune, "--config.pretrain=none", source, f"--config.{flag}",
        f"--workdir={tmp_path}/w",
    )  # fmt: skip
    assert f"--config.{flag.partition('=')[0]}" in result.error
    assert f"that of {source}" in result.error
    assert not (tmp_path / "w").exists()


def test_a_diverging_run_ends_with_code_3_and_keeps_its_checkpoints(tmp_path, monkeypatch):
    drawn = loader.TextBatches.__getitem__

    def draw(self, step):
        batch = drawn(self, step)
        if step >= 12:
            batch.lm_weights[:] = np.inf
        return batch

    monkeypatch.setattr(loader.TextBatches, "__getitem__", draw)
    workdir = str(tmp_path / "w")
    result = runs.main(
        *runs.TINY, *runs.files().pretrain, "--config.finetune=none", f"--workdir={workdir}"
    )
    assert result.code == 3, result.err
    line = result.err.splitlines()[-1]
    assert line.startswith("error: pretrain: 5 updates in a row were not finite, the last at step")
    assert "step 17" in line
    assert "smaller learning rate" in line
    assert runs.steps(workdir, "pretrain") == [10]
    ours, theirs = (runs.arrays(each, "pretrain", 10) for each in (workdir, runs.trained()))
    assert ours == theirs
    # Without the cause of the divergence, the same command ends as an undisturbed run.
    monkeypatch.undo()
    result = runs.main(
        *runs.TINY, *runs.files().pretrain, "--config.finetune=none", f"--workdir={workdir}"
    )
    assert result.code == 0, result.err
    ours, theirs = (runs.arrays(each, "pretrain", 20) for each in (workdir, runs.trained()))
    assert ours == theirs


def test_a_finished_run_has_nothing_to_do(tmp_path):
    files, workdir = runs.files(), runs.copy(tmp_path)
    before = runs.snapshot(workdir)
    result = runs.main(*runs.TINY, *files.pretrain, *files.finetune, f"--workdir={workdir}")
    assert result.code == 0, result.err
    assert runs.snapshot(workdir) == before


@pytest.mark.parametrize(("stage", "last"), [("pretrain", 20), ("finetune", 40)])
def test_a_damaged_checkpoint_costs_nothing_but_time(tmp_path, stage, last):
    files, workdir = runs.files(), runs.copy(tmp_path)
    newest = pathlib.Path(workdir, "checkpoints", stage, str(last))
    for path in newest.glob("optimizer/**/d/*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-7])
    result = runs.main(*runs.TINY, *files.pretrain, *files.finetune, f"--workdir={workdir}")
    assert result.code == 0, result.err
    assert pathlib.Path(workdir, "checkpoints", "damaged", f"{stage}-{last}").is_dir()
    for name in ("pretrain", "finetune"):
        steps = runs.steps(runs.trained(), name)
        assert runs.steps(workdir, name) == steps
        for step in steps:
            assert runs.arrays(workdir, name, step) == runs.arrays(runs.trained(), name, step)
    ours, theirs = runs.summary(workdir), runs.summary(runs.trained())
    assert ours["finetune"]["test"] == theirs["finetune"]["test"]
    assert ours["pretrain"]["validation_loss"] == theirs["pretrain"]["validation_loss"]


def test_every_checkpoint_damaged_is_one_line(tmp_path):
    workdir = runs.copy(tmp_path)
    for step in runs.steps(workdir, "pretrain"):
        for path in pathlib.Path(workdir, "checkpoints", "pretrain", str(step)).rglob("manifest*"):
            path.unlink()
    files = runs.files()
    result = runs.main(*runs.TINY, *files.pretrain, *files.finetune, f"--workdir={workdir}")
    assert result.code == 2
    assert "no checkpoint can be read" in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
