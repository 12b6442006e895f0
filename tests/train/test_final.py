"""What stands beside the final scores: intervals and baselines, in runs of the command line."""

import csv
import json
import pathlib

import numpy as np
import pytest
import runs

from gptjax.config.schema import TaskSpec
from gptjax.data import tasks
from gptjax.data.tables.labelled import LabelledTable
from gptjax.errors import StopRequested
from gptjax.evaluate import intervals, linear, metrics
from gptjax.train import final

LINEAR = "--config.finetune.baseline=linear"


def flags(workdir) -> tuple[str, ...]:
    """Returns the arguments of the shared fine-tuning, from random weights."""
    return (*runs.TINY, *runs.files().finetune, "--config.pretrain=none", f"--workdir={workdir}")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Runs a fine-tuning with the linear model; returns the workdir and stdout."""
    workdir = tmp_path_factory.mktemp("final")
    result = runs.main(*flags(workdir), LINEAR)
    assert result.code == 0, result.err
    return workdir, result.out


def test_every_score_has_an_interval_and_two_baselines(done):
    entry = runs.summary(done[0])["finetune"]
    linear_model = entry["baselines"]["linear"]
    assert entry["baselines"]["majority"] == entry["floor"]
    assert linear_model.keys() == {
        "validation", "test", "difference", "C", "seconds", "reduced"
    }  # fmt: skip
    assert linear_model["reduced"] == []
    for split in ("validation", "test"):
        ours, theirs = entry[split]["accuracy"], linear_model[split]["accuracy"]
        low, high = entry["intervals"][split]["accuracy"]
        assert 0 <= low <= ours <= high <= 1
        difference, low, high = linear_model["difference"][split]["accuracy"]
        assert difference == pytest.approx(ours - theirs)
        assert low <= difference <= high
    # The words decide the label, and a linear model finds them.
    assert linear_model["test"]["accuracy"] == 1.0


def test_the_intervals_are_those_of_the_best_checkpoint(done):
    """The answers of `predict` on the test have the score and the interval of the summary."""
    output = done[0] / "predictions.csv"
    predicted = runs.main(
        "--mode=predict", f"--checkpoint={done[0]}", f"--input={runs.files().test}",
        f"--output={output}",
    )  # fmt: skip
    assert predicted.code == 0, predicted.err
    columns = []
    for path, name in ((runs.files().test, "label"), (output, "prediction")):
        rows = csv.DictReader(pathlib.Path(path).read_text().splitlines())
        columns.append(np.array([row[name] == "yes" for row in rows], int))
    entry = runs.summary(done[0])["finetune"]
    assert np.mean(columns[0] == columns[1]) == pytest.approx(entry["test"]["accuracy"])
    assert intervals.intervals(["accuracy"], *columns, 2) == entry["intervals"]["test"]


def test_the_table_has_a_column_of_the_linear_model(done):
    assert "linear model" in done[1].split("stage ")[1].splitlines()[0]
    assert "finetune: linear model with C=" in done[1]


def test_the_linear_model_changes_no_number_and_can_be_added_later(done, tmp_path):
    without = runs.main(*flags(tmp_path))
    assert without.code == 0, without.err
    assert "linear model" not in without.out
    assert runs.records(str(tmp_path)) == runs.records(str(done[0]))
    first = runs.summary(tmp_path)["finetune"]
    assert first["baselines"].keys() == {"majority"}
    again = runs.main(*flags(tmp_path))
    assert again.code == 0, again.err
    assert runs.summary(tmp_path)["finetune"] == first
    added = runs.main(*flags(tmp_path), LINEAR)
    assert added.code == 0, added.err
    entry = runs.summary(tmp_path)["finetune"]
    expected = runs.summary(done[0])["finetune"]["baselines"]["linear"]
    for name in ("validation", "test", "difference", "C"):
        assert entry["baselines"]["linear"][name] == expected[name]
    del entry["baselines"], first["baselines"]
    assert entry == first
    assert runs.records(str(tmp_path)) == runs.records(str(done[0]))


@pytest.mark.slow
def test_it_can_be_added_to_a_run_with_frozen_layers(tmp_path):
    """The answers that are compared come from the whole model, although no step is left."""
    freeze = "--config.finetune.freeze=1"
    assert runs.main(*flags(tmp_path), freeze).code == 0
    added = runs.main(*flags(tmp_path), freeze, LINEAR)
    assert added.code == 0, added.err
    entry = runs.summary(tmp_path)["finetune"]
    found = entry["baselines"]["linear"]
    for split, (difference, *_) in ((s, d["accuracy"]) for s, d in found["difference"].items()):
        expected = entry[split]["accuracy"] - found[split]["accuracy"]
        assert difference == pytest.approx(expected)


def test_a_finished_run_does_not_fit_it_again(done, monkeypatch):
    before = (done[0] / "summary.json").read_bytes()
    monkeypatch.setattr(linear, "fit", None)
    again = runs.main(*flags(done[0]), LINEAR)
    assert again.code == 0, again.err
    assert (done[0] / "summary.json").read_bytes() == before


def entry_of(**more):
    rows = {"text": ["good day", "bad day"] * 20, "label": ["1", "0"] * 20}
    tables = {name: LabelledTable(rows, name) for name in ("train", "validation")}
    spec = tasks.find_labels(TaskSpec("classification", "text"), tables["train"])
    return final.linear_entry(spec, tables, ("accuracy",), 20.0, **more)


def test_an_error_in_the_linear_model_is_told_ends_nothing_and_is_tried_again(
    done, tmp_path, monkeypatch
):
    def broken(*_):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(linear, "fit", broken)
        result = runs.main(*flags(tmp_path), LINEAR)
    assert result.code == 0, result.err
    assert "finetune: the linear model is left out: MemoryError: no room" in result.out
    entry, expected = (runs.summary(each)["finetune"] for each in (tmp_path, done[0]))
    assert entry["baselines"]["linear"] == {"left_out": "MemoryError: no room"}
    assert entry["test"] == expected["test"]
    assert json.dumps(entry["intervals"]) == json.dumps(expected["intervals"])
    again = runs.main(*flags(tmp_path), LINEAR)
    assert again.code == 0, again.err
    entry = runs.summary(tmp_path)["finetune"]
    for each in (entry, expected):  # the times differ
        del each["baselines"]["linear"]["seconds"]
        del each["tokens_per_second"], each["input_wait"]
    assert entry == expected


def test_a_request_to_stop_is_noticed_between_two_fits():
    def stop():
        raise StopRequested

    assert entry_of()["validation"] == {"accuracy": 1.0}
    with pytest.raises(StopRequested):
        entry_of(check_stop=stop)


def test_the_import_of_its_libraries_is_not_its_time(monkeypatch):
    now = 0.0

    def slow_import():
        nonlocal now
        now += 100.0
        monkeypatch.setattr(linear, "load_libraries", lambda: None)

    monkeypatch.setattr(linear, "load_libraries", slow_import)
    monkeypatch.setattr(final, "Budget", lambda seconds: linear.Budget(seconds, lambda: now))
    entry = entry_of()
    assert now == 100.0
    assert entry["seconds"] == 0.0
    assert entry["reduced"] == []


def test_a_regression_names_alpha():
    rows = {"text": ["a b", "c"] * 20, "pair": ["a", "a b"] * 20, "label": [1.0, 0.0] * 20}
    tables = {name: LabelledTable(rows, name) for name in ("train", "test")}
    names = metrics.parse("", "regression")
    entry = final.linear_entry(TaskSpec("regression", "text", "pair"), tables, names, 20.0)
    assert entry.keys() == {"test", "alpha", "seconds", "reduced"}
    assert entry["test"]["pearson"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("seconds", "expected"), [(0, 20), (150, 20), (1000, 100)])
def test_the_linear_model_has_20_seconds_or_a_tenth(seconds, expected):
    assert final.linear_seconds(seconds) == expected
