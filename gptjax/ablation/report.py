"""Writes the table and the plot of an ablation from its ablation.json.

A run is here one fine-tuning run of a task, with one variant and one seed. "The paper" is Radford
et al. 2018.
"""

import datetime
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.config.paper_tasks import PUBLISHED, TASKS
from gptjax.evaluate.formatting import format_score, markdown_table, plot_scale, png
from gptjax.io.files import read_json, write_atomically
from gptjax.io.remote import PathLike

Run = dict[str, Any]
"""The entry of one fine-tuning run in ablation.json."""
Linear = dict[str, Any]
"""Name of a task -> the entry of its linear model in ablation.json."""


def _shown(metric: str, value: float | None) -> str:
    """Returns a score as text. Percentages have no percent sign, like the paper's tables."""
    return format_score(metric, value, percent_sign="")


def _unique(runs: Sequence[Run], key: str) -> list[Any]:
    """Returns the different values of a key in the runs, in the order of first appearance."""
    return list(dict.fromkeys(run[key] for run in runs))


def _example(runs: Sequence[Run], task: str) -> Run:
    """Returns the first run of the task that did not diverge, or the first if all diverged."""
    of_task = [run for run in runs if run["task"] == task]
    return next((run for run in of_task if run["score"] is not None), of_task[0])


def _scores(runs: Sequence[Run], task: str, variant: str) -> list[float]:
    """Returns the scores of all seeds except those whose training diverged."""
    scores = (r["score"] for r in runs if (r["task"], r["variant"]) == (task, variant))
    return [score for score in scores if score is not None]


def _cell(metric: str, scores: list[float], seeds: int) -> str:
    """Returns the text of a cell, "MEDIAN (LOWEST to HIGHEST)".

    If some seeds have no score, because they diverged or have not run, the number of seeds with a
    score is added. "-" means that no seed has a score.

    Args:
      metric: name of the metric.
      scores: the scores of the seeds.
      seeds: the number of seeds in the whole ablation.
    """
    if not scores:
        return "-"
    text = _shown(metric, float(np.median(scores)))
    if len(scores) > 1:
        text += f" ({_shown(metric, min(scores))} to {_shown(metric, max(scores))})"
    return text if len(scores) == seeds else f"{text}, {len(scores)} of {seeds} seeds"


def _majority_baseline(runs: Sequence[Run], task: str) -> float:
    """Returns the score of the task's baseline, which gives the same answer for every example.

    The answer is the majority class, or the mean for regression. The score is the median over the
    runs, because the seed can decide which rows become the validation split. The score is 0 if no
    run has a baseline.
    """
    scores = [run["floor"] for run in runs if run["task"] == task and run["floor"] is not None]
    return float(np.median(scores)) if scores else 0.0


def _linear(linear: Linear, example: Run) -> float | None:
    """Returns the score of a task's linear model; None if the task has no linear model.

    Args:
      linear: the linear models of the ablation.
      example: a run of the task, which names the split and the metric.
    """
    score: float | None = (
        linear.get(example["task"], {}).get(example["split"], {}).get(example["metric"])
    )
    return score


def _published(variant: str, task: str, metric: str) -> float | None:
    """Returns the paper's score; None if the paper has no score, or uses another metric."""
    theirs = TASKS.get(task, {}).get("metrics", "").split(",")[0]
    return PUBLISHED.get(variant, {}).get(task) if metric == theirs else None


def _average(runs: Sequence[Run], tasks: Sequence[str], variant: str) -> str:
    """Returns the average score as text: 100 times the mean of the tasks' median scores.

    GLUE averages its tasks in the same way. "-" means that a task has no score.
    """
    scores = [_scores(runs, task, variant) for task in tasks]
    return f"{100 * np.mean([np.median(s) for s in scores]):.1f}" if all(scores) else "-"


def table(runs: Sequence[Run], linear: Linear | None = None) -> str:
    """Returns the Markdown table with a row for each variant and a column for each task.

    A cell has the median over the seeds, the lowest score and the highest score. Further rows have
    the baselines and the paper's scores. With several tasks, the last column has the average.

    Args:
      runs: the runs.
      linear: the linear models. Without any, the table has no row of them.
    """
    tasks, variants = _unique(runs, "task"), _unique(runs, "variant")
    seeds = len(_unique(runs, "seed"))
    examples = {task: _example(runs, task) for task in tasks}
    metric = {task: examples[task]["metric"] for task in tasks}
    header = ["variant", *(f"{t}, {examples[t]['split']} {metric[t]}" for t in tasks)]
    rows = []
    for variant in variants:
        cells = [_cell(metric[task], _scores(runs, task, variant), seeds) for task in tasks]
        rows.append([variant, *cells])
    baselines = [_shown(metric[task], _majority_baseline(runs, task)) for task in tasks]
    rows.append(["*constant answer*", *baselines])
    scores = {task: _linear(linear or {}, examples[task]) for task in tasks}
    if any(score is not None for score in scores.values()):
        rows.append(["*linear model*", *(_shown(metric[task], scores[task]) for task in tasks)])
    for variant in variants:
        numbers = {task: _published(variant, task, metric[task]) for task in tasks}
        if any(number is not None for number in numbers.values()):
            cells = [_shown(metric[task], number) for task, number in numbers.items()]
            rows.append([f"*the paper's {variant}*", *cells])
    if len(tasks) > 1:
        header.append("average")
        for row in rows:
            row.append(_average(runs, tasks, row[0]) if row[0] in variants else "")
    return markdown_table(header, rows)


def _text(results: dict[str, Any]) -> str:
    """Returns the text of ablation.md from the contents of ablation.json."""
    runs = results["runs"]
    seeds = sorted(_unique(runs, "seed"))
    minutes = results["seconds"] / 60
    lines = [
        f"# {results['name']}: {len(runs)} fine-tunings of `{results['pretrained']}`",
        f"Medians over the seeds {', '.join(map(str, seeds))} (lowest to highest). "
        f"{minutes:.0f} minutes on {results['machine']}; written {datetime.date.today()}.",
        table(runs, results.get("linear", {})),
    ]
    if "the paper's" in lines[-1]:
        lines.append(
            "The paper's numbers are of GPT-1 with 117M parameters, pretrained on BooksCorpus, on "
            "GLUE's splits (Radford et al. 2018, table 5); its F1 of MRPC and the Pearson "
            "correlation of STS-B are GLUE's."
        )
    return "\n\n".join(lines) + "\n"


def _plot(runs: Sequence[Run], linear: Linear) -> bytes:
    """Returns a PNG with one panel for each task, in which each variant has one row of points."""
    from matplotlib.figure import Figure

    tasks, variants = _unique(runs, "task"), _unique(runs, "variant")
    size = (1 + 2.6 * len(tasks), 1.7 + 0.4 * len(variants))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=True):
        first = _example(runs, task)
        scale, unit = plot_scale(first["metric"])
        for row, name in enumerate(variants):
            scores = scale * np.array(_scores(runs, task, name))
            if scores.size:
                points = {"color": "C0", "alpha": 0.5, "label": "each seed"}
                axis.plot(scores, np.full(scores.size, row), "o", **points)
                median = {"color": "C1", "markersize": 18, "markeredgewidth": 3, "label": "median"}
                axis.plot(np.median(scores), row, "|", **median)
        baseline = scale * _majority_baseline(runs, task)
        axis.axvline(baseline, color="gray", linestyle=":", label="constant answer")
        if (score := _linear(linear, first)) is not None:
            axis.axvline(scale * score, color="gray", linestyle="--", label="linear model")
        axis.set_title(task)
        axis.set_xlabel(f"{first['split']} {first['metric']}{unit}")
        axis.set_yticks(range(len(variants)), variants)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(len(variants) - 0.5, -0.5)
    handles, labels = axes[0].get_legend_handles_labels()
    marks = dict(zip(labels, handles, strict=True))
    figure.legend(marks.values(), marks, loc="outside lower center", ncols=4, markerscale=0.5)
    return png(figure)


def write(workdir: PathLike) -> str:
    """Writes ablation.md and ablation.png from ablation.json. Returns the text of ablation.md."""
    results = read_json(os.path.join(workdir, "ablation.json"))
    text, plot = _text(results), _plot(results["runs"], results.get("linear", {}))
    write_atomically(os.path.join(workdir, "ablation.md"), text.encode())
    write_atomically(os.path.join(workdir, "ablation.png"), plot)
    return text
