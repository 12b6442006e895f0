"""The end of a run: plots that are not empty, and a table with baselines beside scores."""

import os
import re
import subprocess

import numpy as np
import pytest
from matplotlib.image import imread

from gptjax.config import schema
from gptjax.evaluate import calibration
from gptjax.io.files import write_json
from gptjax.report import plots, tables
from gptjax.train import log as log_lib


def write_run(workdir, stages=schema.Stage, steps=(1, 2, 3)):
    with log_lib.MetricsLog(workdir) as log:
        for stage in stages:
            for step in steps:
                log.write(stage, "train", step, {"loss": 1.0 / step})


def made_up_run(workdir, stages, steps):
    rng = np.random.default_rng(0)
    with log_lib.MetricsLog(workdir) as log:
        for stage in stages:
            for step in steps:
                log.write(
                    stage, "train", step, {"loss": 2 + 6 / (1 + step / 20) + rng.normal(0, 0.2)}
                )
                if step % 50 == 0 or len(steps) == 1:
                    scores = {"loss": 2.2 + 6 / (1 + step / 20)}
                    if stage != "pretrain":
                        scores |= {"accuracy": 0.9 - 0.4 / (1 + step / 50), "matthews": 0.5}
                    log.write(stage, "validation", step, scores)


def colours_in(png):
    """Returns the number of coloured pixels: those of lines and points, not of text or axes."""
    rgb = imread(png)[..., :3]
    return int(np.sum(np.ptp(rgb, axis=-1) > 0.2))


@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("steps", [range(1, 301), [1]], ids=["300 points", "1 point"])
def test_plots_show_something_for_every_stage(tmp_path, num_stages, steps):
    made_up_run(tmp_path, tuple(schema.Stage)[:num_stages], steps)
    paths = plots.draw_plots(tmp_path)
    names = ["loss.png", "score.png"][: 1 if num_stages == 1 else 2]
    assert [os.path.relpath(p, tmp_path / "plots") for p in paths] == names
    for path in paths:
        image = imread(path)
        assert colours_in(path) > 100
        panels = num_stages if path.endswith("loss.png") else 2
        for part in np.array_split(image, panels, axis=1):
            assert np.any(np.ptp(part[..., :3], axis=-1) > 0.2)


def test_plots_of_a_diverged_or_an_empty_run_do_not_fail(tmp_path):
    assert plots.draw_plots(tmp_path / "nothing") == []
    assert not (tmp_path / "nothing").exists()
    with log_lib.MetricsLog(tmp_path) as log:
        for step in range(60):
            log.write("pretrain", "train", step, {"loss": 3.0 if step < 30 else float("nan")})
            log.write("finetune", "train", step, {"loss": float("inf")})
    assert len(plots.draw_plots(tmp_path)) == 1


def test_the_reliability_plot_shows_each_split(tmp_path):
    rng = np.random.default_rng(0)
    logits, entry = rng.normal(size=(2, 300, 2)), {"temperature": 2.0}
    labels = (logits[0, :, 0] + rng.logistic(size=300) < logits[0, :, 1]).astype(int)
    for split, values in zip(("validation", "test"), logits, strict=True):
        entry[split] = calibration.report(2 * values, labels, 2.0)
    write_json(tmp_path / "summary.json", {"finetune": {"calibration": entry}})
    (path,) = plots.draw_plots(tmp_path)
    assert os.path.relpath(path, tmp_path) == os.path.join("plots", "reliability.png")
    for part in np.array_split(imread(path), 2, axis=1):
        assert np.sum(np.ptp(part[..., :3], axis=-1) > 0.2) > 100
    write_json(tmp_path / "summary.json", {"finetune": {"steps": 3}, "pretrain": {}})
    assert plots.draw_plots(tmp_path) == []


def split_scores(accuracy):
    return {"loss": 1 - accuracy, "accuracy": accuracy, "matthews": 2 * accuracy - 1}


SUMMARY = {
    "pretrain": {
        "steps": 12000,
        "validation_loss": 3.25,
        "validation_perplexity": float(np.exp(3.25)),
        "tokens_per_second": 45678.9,
        "mfu": None,
    },
    "finetune": {"steps": 300, "validation": split_scores(0.8125), "test": split_scores(0.75)},
    "finetune_from_scratch": {"steps": 300, "validation": split_scores(0.625)},
}
BASELINES = {"validation": {"accuracy": 0.5, "matthews": 0.0}}


def test_table_puts_baseline_and_no_pretraining_beside_each_score():
    text = tables.results_table(SUMMARY, BASELINES, "runs/x", ["python launch.py --mode=explain"])
    lines = text.splitlines()

    def cells(*start):
        (line,) = [x for x in lines if x.split()[: len(start)] == list(start)]
        return line.split()[len(start) :]

    assert cells("finetune", "validation", "accuracy") == ["81.2%", "50.0%", "62.5%"]
    assert cells("finetune", "validation", "matthews") == ["0.625", "0.000", "0.250"]
    assert cells("finetune", "test", "accuracy") == ["75.0%", "-", "-"]
    assert re.search(r"score +majority class +no pretraining$", lines[0])
    assert len({len(line) for line in lines[:8]}) == 1  # aligned
    for fact in ("12,000 steps", "3.250 nats", f"perplexity {np.exp(3.25):.1f}", "45,679 tokens/s"):
        assert fact in text
    assert "runs/x" in text
    assert lines[-1].strip() == "python launch.py --mode=explain"


def with_linear(score, difference, **more):
    """Returns a summary with intervals and a linear model, for the metric accuracy of the test."""
    linear = {"test": {"accuracy": score}, "difference": {"test": {"accuracy": difference}}}
    finetune = {
        "steps": 300, "validation": split_scores(0.8125), "test": split_scores(0.75),
        "intervals": {"test": {"accuracy": [0.72, 0.79], "matthews": [0.4, float("nan")]}},
        "baselines": {"linear": linear},
    }  # fmt: skip
    return {"finetune": finetune, **more}


def test_table_puts_the_linear_model_and_half_an_interval_beside_the_score():
    text = tables.results_table(with_linear(0.7, [0.05, 0.01, 0.09]), BASELINES, "x", [])
    lines = text.splitlines()
    assert re.search(r"score +majority class +linear model$", lines[0])
    row = next(line for line in lines if line.split()[1:3] == ["test", "accuracy"])
    assert row.split()[3:] == ["75.0%", "+-", "3.5", "-", "70.0%"]
    (row,) = [line for line in lines if line.split()[1:3] == ["test", "matthews"]]
    assert row.split()[3:] == ["0.500", "-", "-"]  # half an interval is none
    assert "+- is half the width of the 95 % interval" in text
    assert "linear model is better" not in text


@pytest.mark.parametrize(
    ("difference", "chance"), [([-0.05, -0.09, -0.01], False), ([-0.05, -0.11, 0.01], True)]
)
def test_a_better_linear_model_is_told_with_what_to_try(difference, chance):
    text = tables.results_table(with_linear(0.8, difference), BASELINES, "x", [])
    told = " ".join(text.split("The linear model is better: ")[1].split("\n\n")[0].split())
    assert told.startswith("test accuracy 80.0% against 75.0%")
    assert ("this may be chance" in told) == chance
    assert "--config.init_from" in told
    pretrained = with_linear(0.8, difference, pretrain=SUMMARY["pretrain"])
    text = tables.results_table(pretrained, BASELINES, "x", [])
    assert "linear model is better" in text
    assert "--config.init_from" not in text
    text = tables.results_table(with_linear(0.8, difference), BASELINES, "x", [], "gpt1")
    assert "linear model is better" in text
    assert "--config.init_from" not in text
    # The lines fit the terminal.
    assert max(map(len, text.splitlines())) <= tables.WIDTH


def test_of_an_error_less_is_better():
    summary = {"finetune": {"validation": {"mse": 0.5}, "baselines": {"linear": {}}}}
    linear = summary["finetune"]["baselines"]["linear"]
    linear |= {"validation": {"mse": 0.7}, "difference": {"validation": {"mse": [-0.2, -0.3, 0]}}}
    assert "is better" not in tables.results_table(summary, {}, "x", [])
    linear |= {"validation": {"mse": 0.3}, "difference": {"validation": {"mse": [0.2, 0.1, 0.3]}}}
    assert "validation mse 0.300 against 0.500. Try" in tables.results_table(summary, {}, "x", [])


def test_a_linear_model_that_was_left_out_has_no_column():
    summary = with_linear(0.7, [0.05, 0.01, 0.09])
    summary["finetune"]["baselines"]["linear"] = {"left_out": "no words"}
    assert "linear" not in tables.results_table(summary, BASELINES, "x", [])


@pytest.mark.parametrize("stages", [[], ["pretrain"], ["finetune"], ["finetune_from_scratch"]])
def test_table_works_without_any_stage_or_split(stages, tmp_path):
    write_run(tmp_path)
    summary = {s: SUMMARY[s] for s in stages}
    text = tables.results_table(summary, {}, tmp_path, [])
    assert "metrics.jsonl" in text
    assert ("Pretraining" in text) == ("pretrain" in stages)
    assert ("accuracy" in text) == any("finetune" in s for s in stages)
    assert "no pretraining" not in text
    tables.results_table({s: {"steps": 3} for s in stages}, {}, tmp_path, [])


def test_without_a_test_the_validation_scores_are_called_optimistic():
    assert "optimistic" not in tables.results_table(SUMMARY, BASELINES, "x", [])
    finetune = {name: SUMMARY["finetune"][name] for name in ("steps", "validation")}
    table, *_ = tables.results_table({"finetune": finetune}, BASELINES, "x", []).split("\n\n")
    last = table.splitlines()[-1]
    assert "validation scores, so they are optimistic" in last
    assert len(last) <= tables.WIDTH


def test_table_of_a_regression_calls_the_baseline_the_mean():
    summary = {"finetune": {"test": {"mse": 0.5, "pearson": float("nan")}}}
    lines = tables.results_table(summary, {"test": {"mse": 2.0}}, "x", []).splitlines()
    assert lines[0].split() == ["stage", "split", "metric", "score", "mean"]
    assert lines[2].split()[2:] == ["mse", "0.500", "2.000"]
    assert lines[3].split()[2:] == ["pearson", "-", "-"]


def test_table_fits_the_terminal_and_its_commands_still_run(tmp_path):
    for i in range(40):
        (tmp_path / f"file{i}").write_text("")
    command = "python launch.py " + " ".join(f"--config.field{i}=value{i}" for i in range(20))
    text = tables.results_table(SUMMARY, BASELINES, tmp_path, [command])
    assert max(map(len, text.splitlines())) <= tables.WIDTH
    text.encode("ascii")
    pasted = text.split("Try next:\n")[1].replace("python launch.py", "printf '%s\\n'")
    arguments = subprocess.run(["sh", "-c", pasted], check=True, capture_output=True, text=True)
    assert arguments.stdout.split() == command.split()[2:]
