"""What a run shows at its end: plots of the losses and scores, and the table of results."""

import contextlib
import io
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.config.schema import Stage, TaskKind
from gptjax.evaluate.metrics import FITTING, NAMES, PERCENT
from gptjax.io import remote
from gptjax.io.files import json_ready, write_atomically
from gptjax.train.log import PathLike, read

WIDTH = 100  # columns of the text for a terminal
_TASK_STAGES = (Stage.FINETUNE, Stage.FINETUNE_FROM_SCRATCH)

_PRETRAIN_FACTS = {
    "steps": "{:,} steps",
    "validation_loss": "validation loss {:.3f} nats per token",
    "validation_perplexity": "perplexity {:,.1f}",
    "tokens_per_second": "{:,.0f} tokens/s",
}


def loss_plot(workdir: PathLike) -> list[str]:
    """Draws ``plots/loss.png`` and, with scores or probes, ``score.png`` and ``probes.png``.

    Returns the paths written.
    """
    records = sorted(read(workdir), key=lambda r: r["step"])
    stages = [s for s in Stage if any(r["stage"] == s and "loss" in r for r in records)]
    scored = [r for r in records if r["stage"] != Stage.PRETRAIN and r["split"] == "validation"]
    scores = [name for name in NAMES if any(name in r for r in scored)]
    asked = {name for r in records for name in r if name.startswith("probe_")}
    probes = sorted(name for name in asked if not name.endswith("_floor"))
    paths = []
    kinds = (("loss", stages, _draw_loss), ("score", scores, _draw_score))
    for file, panels, draw in (*kinds, ("probes", probes, _draw_probe)):
        if panels:
            paths.append(os.path.join(workdir, "plots", f"{file}.png"))
            write_atomically(paths[-1], _png(panels, draw, records))
    return paths


def _png(panels: Sequence[str], draw: Callable[..., None], records: Sequence[dict]) -> bytes:
    # The object interface: pyplot keeps figures for ever and may look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 5 * len(panels), 4.5), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axis, panel, records)
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axis.grid(alpha=0.3)
        axis.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


def _series(records: Sequence[dict], stage: str, split: str, name: str) -> np.ndarray:
    """[2, N] steps and values; null is NaN, a gap in the line."""
    chosen = [r for r in records if r["stage"] == stage and r["split"] == split and name in r]
    return np.array([[r["step"] for r in chosen], [r[name] for r in chosen]], np.float64)


def _draw_loss(axis: Any, stage: str, records: Sequence[dict]) -> None:
    steps, train = _series(records, stage, "train", "loss")
    raw = {"color": "C0", "linewidth": 0.8, "alpha": 0.5, "marker": "." if steps.size < 20 else ""}
    axis.plot(steps, train, label="train", **raw)
    if steps.size >= 20:
        # A mean that does not lag: centred, narrow at the steep start, cut off at the end.
        place, known = np.arange(steps.size), np.isfinite(train)
        half = np.minimum(steps.size // 20, place)
        sums = np.cumsum([np.where(known, train, 0.0), known], axis=1)
        sums = np.insert(sums, 0, 0.0, axis=1)
        total, count = sums[:, np.minimum(place + half + 1, steps.size)] - sums[:, place - half]
        smooth = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        axis.plot(steps, smooth, color="C0", label="train, smoothed")
    validation = _series(records, stage, "validation", "loss")
    if validation.size:
        axis.plot(*validation, "o-", color="C1", label="validation")
    axis.set_title(stage.replace("_", " "))
    axis.set_ylabel(f"loss ({'nats per token' if stage == Stage.PRETRAIN else 'task + LM, nats'})")


def _draw_score(axis: Any, name: str, records: Sequence[dict]) -> None:
    scale, unit = (100.0, " (%)") if name in PERCENT else (1.0, "")
    for stage in _TASK_STAGES:
        steps, values = _series(records, stage, "validation", name)
        if steps.size:
            axis.plot(steps, values * scale, "o-", label=stage.replace("_", " "))
    axis.set_title(f"validation {name}")
    axis.set_ylabel(name + unit)


def _draw_probe(axis: Any, name: str, records: Sequence[dict]) -> None:
    probe, _, metric = name.rpartition("_")
    scale, unit = (100.0, " (%)") if metric in PERCENT else (1.0, "")
    steps, values = _series(records, Stage.PRETRAIN, "validation", name)
    axis.plot(steps, values * scale, "o-", label="zero-shot")
    steps, floors = _series(records, Stage.PRETRAIN, "validation", f"{probe}_floor")
    axis.plot(steps, floors * scale, ":", color="gray", label="constant answer")
    axis.set_title(probe.removeprefix("probe_"))
    axis.set_ylabel(metric + unit)


def results_table(
    summary: Mapping[str, Any],
    floors: Mapping[str, Mapping[str, float]],
    workdir: PathLike,
    next_commands: Sequence[str],
) -> str:
    """The text for the end of a run: scores beside the floor, losses, files, what to try next.

    `summary` is that of summary.json, any stage or split may be absent; `floors` has the scores of
    the constant answer (`metrics.floor`) of each split. Long commands are broken, to paste.
    """
    pretrain = {k: v for k, v in (summary.get(Stage.PRETRAIN) or {}).items() if v is not None}
    facts = [text.format(pretrain[k]) for k, text in _PRETRAIN_FACTS.items() if k in pretrain]
    files = []
    with contextlib.suppress(OSError):
        files = remote.listing(workdir)
    wrap = textwrap.TextWrapper(WIDTH, initial_indent="  ", subsequent_indent="  ").wrap
    blocks = [
        _score_table(summary, floors),
        ["Pretraining: " + ", ".join(facts)] if facts else [],
        [f"Saved in {os.fspath(workdir)}", *wrap("  ".join(files))],
        ["Try next:", *map(_command, next_commands)] if next_commands else [],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _score_table(summary: Mapping[str, Any], floors: Mapping[str, Any]) -> list[str]:
    stages = [s for s in _TASK_STAGES if summary.get(s)]
    rows = []
    for split in ("validation", "test") if stages else ():
        scored, *others = [summary[s].get(split) or {} for s in stages]
        for name in scored:
            columns = (scored, floors.get(split) or {}, *others)
            rows.append([stages[0], split, name, *(_score(name, c.get(name)) for c in columns)])
    if not rows:
        return []
    numbers = any(row[2] in FITTING[TaskKind.REGRESSION] for row in rows)
    constant = "mean" if numbers else "majority class"
    header = ["stage", "split", "metric", "score", constant, "no pretraining"][: len(rows[0])]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    form = "  ".join(f"{{:{'<' if i < 3 else '>'}{w}}}" for i, w in enumerate(widths))
    lines = [form.format(*row) for row in (header, *rows)]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _score(name: str, value: Any) -> str:
    value = json_ready(value)
    if value is None:
        return "-"
    return f"{100 * value:.1f}%" if name in PERCENT else f"{value:.3f}"


def _command(command: str) -> str:
    lines = [" "]
    for piece in re.split(r" (?=--)", command):
        if len(f"{lines[-1]} {piece} \\") > WIDTH and lines[-1].strip():
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += " " + piece
    return "\n".join(lines)
