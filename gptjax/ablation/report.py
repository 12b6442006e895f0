"""The table and the plot of an ablation, from its ablation.json."""

import datetime
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.config.paper_tasks import PUBLISHED, TASKS
from gptjax.evaluate.metrics import PERCENT
from gptjax.io.files import read_json, write_atomically
from gptjax.train.log import PathLike

Run = dict[str, Any]


def shown(metric: str, value: float | None) -> str:
    """Returns a score as a person reads it: a percentage, or three decimals."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if metric in PERCENT else f"{value:.3f}"


def _unique(runs: Sequence[Run], key: str) -> list[Any]:
    return list(dict.fromkeys(run[key] for run in runs))


def _example(runs: Sequence[Run], task: str) -> Run:
    """A run of the task, one that did not diverge if there is one."""
    found = [run for run in runs if run["task"] == task]
    return next((run for run in found if run["score"] is not None), found[0])


def _scores(runs: Sequence[Run], task: str, variant: str) -> list[float]:
    """Scores of the seeds; a run that gave no number is left out."""
    found = (r["score"] for r in runs if (r["task"], r["variant"]) == (task, variant))
    return [score for score in found if score is not None]


def _cell(metric: str, scores: list[float], seeds: int) -> str:
    if not scores:
        return "-"
    text = shown(metric, float(np.median(scores)))
    if len(scores) > 1:
        text += f" ({shown(metric, min(scores))} to {shown(metric, max(scores))})"
    return text if len(scores) == seeds else f"{text}, {len(scores)} of {seeds} seeds"


def _floor(runs: Sequence[Run], task: str) -> float:
    """The constant answer's score: where a validation part is drawn by seed, the median of them."""
    floors = [run["floor"] for run in runs if run["task"] == task and run["floor"] is not None]
    return float(np.median(floors)) if floors else 0.0


def _published(variant: str, task: str, metric: str) -> float | None:
    """The paper's score, where ours is by the same metric."""
    theirs = TASKS.get(task, {}).get("metrics", "").split(",")[0]
    return PUBLISHED.get(variant, {}).get(task) if metric == theirs else None


def _average(runs: Sequence[Run], tasks: Sequence[str], variant: str) -> str:
    """The mean over the tasks of their medians, in hundredths as GLUE averages its scores."""
    scores = [_scores(runs, task, variant) for task in tasks]
    return f"{100 * np.mean([np.median(s) for s in scores]):.1f}" if all(scores) else "-"


def table(runs: Sequence[Run]) -> str:
    """Returns the Markdown table: a row a variant, a column a task; medians (lowest to highest)."""
    tasks, variants = _unique(runs, "task"), _unique(runs, "variant")
    seeds = len(_unique(runs, "seed"))
    first = {task: _example(runs, task) for task in tasks}
    metric = {task: first[task]["metric"] for task in tasks}
    heads = [f"{task}, {first[task]['split']} {metric[task]}" for task in tasks]
    rows = [["variant", *heads]]
    for variant in variants:
        cells = [_cell(metric[task], _scores(runs, task, variant), seeds) for task in tasks]
        rows.append([variant, *cells])
    floors = [shown(metric[task], _floor(runs, task)) for task in tasks]
    rows.append(["*constant answer*", *floors])
    for variant in variants:
        numbers = [_published(variant, task, metric[task]) for task in tasks]
        if any(number is not None for number in numbers):
            cells = [
                shown(metric[task], number) for task, number in zip(tasks, numbers, strict=True)
            ]
            rows.append([f"*the paper's {variant}*", *cells])
    if len(tasks) > 1:
        rows[0].append("average")
        for row in rows[1:]:
            row.append(_average(runs, tasks, row[0]) if row[0] in variants else "")
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _text(results: dict[str, Any]) -> str:
    runs = results["runs"]
    seeds = sorted(_unique(runs, "seed"))
    minutes = results["seconds"] / 60
    lines = [
        f"# {results['name']}: {len(runs)} fine-tunings of `{results['pretrained']}`",
        f"Medians over the seeds {', '.join(map(str, seeds))} (lowest to highest). "
        f"{minutes:.0f} minutes on {results['machine']}; written {datetime.date.today()}.",
        table(runs),
    ]
    if "the paper's" in lines[-1]:
        lines.append(
            "The paper's numbers are of GPT-1 with 117M parameters, pretrained on BooksCorpus, on "
            "GLUE's splits (Radford et al. 2018, table 5); its F1 of MRPC and the Pearson "
            "correlation of STS-B are GLUE's."
        )
    return "\n\n".join(lines) + "\n"


def _plot(runs: Sequence[Run]) -> bytes:
    from matplotlib.figure import Figure

    tasks, variants = _unique(runs, "task"), _unique(runs, "variant")
    size = (1 + 2.6 * len(tasks), 1.7 + 0.4 * len(variants))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=True):
        first = _example(runs, task)
        scale, unit = (100, " (%)") if first["metric"] in PERCENT else (1, "")
        for row, name in enumerate(variants):
            scores = scale * np.array(_scores(runs, task, name))
            if scores.size:
                each = {"color": "C0", "alpha": 0.5, "label": "each seed"}
                axis.plot(scores, np.full(scores.size, row), "o", **each)
                median = {"color": "C1", "markersize": 18, "markeredgewidth": 3, "label": "median"}
                axis.plot(np.median(scores), row, "|", **median)
        axis.axvline(
            scale * _floor(runs, task), color="gray", linestyle=":", label="constant answer"
        )
        axis.set_title(task)
        axis.set_xlabel(f"{first['split']} {first['metric']}{unit}")
        axis.set_yticks(range(len(variants)), variants)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(len(variants) - 0.5, -0.5)
    handles, labels = axes[0].get_legend_handles_labels()
    marks = dict(zip(labels, handles, strict=True))
    figure.legend(marks.values(), marks, loc="outside lower center", ncols=3, markerscale=0.5)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


def write(workdir: PathLike) -> str:
    """Writes ablation.md and ablation.png from ablation.json; returns the text of the former."""
    results = read_json(os.path.join(workdir, "ablation.json"))
    text = _text(results)
    write_atomically(os.path.join(workdir, "ablation.md"), text.encode())
    write_atomically(os.path.join(workdir, "ablation.png"), _plot(results["runs"]))
    return text
