"""Training called from Python: rows in memory, messages to a reporter, a profiler trace."""

import json
import pathlib

import datasets
import pytest
import runs
from memory_runs import Recorder, experiment, finetuning, tables

import gptjax
from gptjax.config.schema import OptimizerConfig, PretrainConfig
from gptjax.errors import UserError
from gptjax.train import run


def without_speed(summary):
    speeds = ("tokens_per_second", "input_wait", "mfu")
    return {name: value for name, value in summary.items() if name not in speeds}


@pytest.mark.slow
def test_rows_in_memory_train_as_files_do_and_nothing_is_printed(tmp_path, capsys):
    pretrained = f"{runs.trained()}/checkpoints/pretrain"
    # The tokenizer is that of the checkpoint.
    tiny = [flag for flag in runs.TINY if "tokenizer" not in flag]
    files = runs.main(
        *tiny, *runs.files().finetune, "--config.pretrain=none",
        "--config.finetune.head=extract", "--config.finetune.optimizer.schedule=linear",
        "--config.finetune.optimizer.warmup_fraction=0.002", f"--config.init_from={pretrained}",
        f"--workdir={tmp_path}/files",
    )  # fmt: skip
    assert files.code == 0, files.err
    capsys.readouterr()
    recorder, workdir = Recorder(), str(tmp_path / "tables")
    summary = run.run(
        experiment(finetune=finetuning(baseline="none"), init_from=pretrained),
        workdir,
        run.Options(tables=tables(), profile=3, reporter=recorder),
    )
    assert capsys.readouterr() == ("", "")
    assert runs.records(workdir) == runs.records(f"{tmp_path}/files")
    expected = runs.summary(f"{tmp_path}/files")["finetune"]
    assert without_speed(summary["finetune"]) == without_speed(expected)
    assert recorder.calls == [("begin", "finetune", 40, 0), "end"]
    assert [status.step for status in recorder.statuses] == list(range(1, 41))
    assert recorder.statuses[0].seconds_left is None
    assert recorder.statuses[-1].seconds_left == 0
    assert any("64 train examples" in line for line in recorder.lines)
    # The trace leaves out the first steps, which compile.
    folder = pathlib.Path(workdir, "profile", "finetune")
    assert f"finetune: trace of 3 steps from 4 on -> {folder}" in recorder.lines
    (trace,) = folder.glob("plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 1000
    # Like that of an imported model, the saved configuration names no data.
    config = json.loads(pathlib.Path(workdir, "config.json").read_text())
    assert config["finetune"]["dataset"] == config["finetune"]["train_file"] == ""
    assert gptjax.load(workdir).predict([{"text": "good the cat a wall"}]).labels == ["yes"]
    again = Recorder()
    run.run(
        experiment(finetune=finetuning(baseline="none"), init_from=pretrained),
        workdir,
        run.Options(tables=tables(), reporter=again),
    )
    assert again.lines[-1] == "finetune: continuing at step 40 of 40"


@pytest.mark.slow
def test_texts_in_memory(tmp_path):
    optimizer = OptimizerConfig(learning_rate=0.01)
    config = PretrainConfig(batch_size=8, steps=2, validation_fraction=0.2, optimizer=optimizer)
    rows = datasets.Dataset.from_dict({"text": runs.sentences(200)})
    recorder = Recorder()
    options = run.Options(tables={"pretrain": {"train": rows}}, reporter=recorder, profile=9)
    summary = run.run(experiment(pretrain=config), str(tmp_path), options)
    assert summary["pretrain"]["steps"] == 2
    # The stage is shorter than the trace that was asked for.
    folder = tmp_path / "profile" / "pretrain"
    assert f"pretrain: trace of 2 steps from 1 on -> {folder}" in recorder.lines


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ({"pretrain": {}}, {}, "`tables`: the experiment has no stage 'pretrain'"),
        ({"finetun": {}}, {}, "`tables`: the experiment has no stage 'finetun'"),
        ({"finetune": {}}, {"train_file": "x.csv"}, "and not both"),
        ({"finetune": {}}, {}, "it must have train"),
        ({}, {}, "`finetune.train_file`: give a labelled file"),
    ],
)
def test_wrong_tables_are_one_line(tmp_path, rows, changes, words):
    options = run.Options(tables=rows)
    with pytest.raises(UserError) as error:
        run.run(experiment(finetune=finetuning(**changes)), str(tmp_path / "w"), options)
    assert words in str(error.value)
    assert not (tmp_path / "w").exists()


def test_a_trace_is_not_written_to_a_bucket():
    given = experiment(finetune=finetuning())
    with pytest.raises(UserError, match="`profile`=2: a trace is written to a folder"):
        run.run(given, "gs://b/w", run.Options(profile=2, tables=tables()))
    with pytest.raises(UserError, match="`profile`=-1: must not be negative"):
        run.run(given, "w", run.Options(profile=-1, tables=tables()))
