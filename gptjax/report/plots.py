"""Draws the plots of a run from the metrics.jsonl and the summary.json of its workdir.

A probe is a task on which the model is scored during pretraining, without fine-tuning (zero-shot).
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.config.schema import Stage
from gptjax.evaluate.formatting import plot_scale, png
from gptjax.evaluate.metrics import NAMES
from gptjax.io.files import read_json, write_atomically
from gptjax.io.remote import PathLike, exists
from gptjax.train.log import read

Records = Sequence[dict[str, Any]]
"""The records of metrics.jsonl."""


def draw_plots(workdir: PathLike) -> list[str]:
    """Draws ``loss.png``, ``score.png``, ``probes.png`` and ``reliability.png`` in ``plots``.

    A file is drawn only if the run has such values. ``reliability.png`` shows the calibration of
    the fine-tuning in summary.json.

    Args:
      workdir: folder of the run.

    Returns:
      The paths of the files that were drawn.
    """
    records = sorted(read(workdir), key=lambda r: r["step"])
    stages = [s for s in Stage if any(r["stage"] == s and "loss" in r for r in records)]
    scored = [r for r in records if r["stage"] != Stage.PRETRAIN and r["split"] == "validation"]
    scores = [name for name in NAMES if any(name in r for r in scored)]
    probe_scores = {name for r in records for name in r if name.startswith("probe_")}
    probes = sorted(name for name in probe_scores if not name.endswith("_floor"))
    paths = []
    kinds = (("loss", stages, _draw_loss), ("score", scores, _draw_score))
    for file, panels, draw in (*kinds, ("probes", probes, _draw_probe)):
        if panels:
            paths.append(os.path.join(workdir, "plots", f"{file}.png"))
            write_atomically(paths[-1], _draw(panels, _over_steps(draw, records)))
    entry = _calibration(workdir)
    if splits := [split for split in ("validation", "test") if split in entry]:
        paths.append(os.path.join(workdir, "plots", "reliability.png"))
        draw_split = functools.partial(_draw_reliability, entry=entry)
        write_atomically(paths[-1], _draw(splits, draw_split))
    return paths


def _calibration(workdir: PathLike) -> dict[str, Any]:
    """Returns the calibration of the fine-tuning in summary.json; {} if there is none."""
    path = os.path.join(workdir, "summary.json")
    if not exists(path):
        return {}
    return (read_json(path).get(Stage.FINETUNE) or {}).get("calibration") or {}


def _draw(panels: Sequence[str], draw: Callable[[Any, str], None]) -> bytes:
    """Returns a PNG with one panel for each name in `panels`.

    Args:
      panels: names of the panels.
      draw: a function that draws one panel, called as draw(axis, name).
    """
    # pyplot is not used, because it never frees its figures and might look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 5 * len(panels), 4.5), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axis, panel)
        axis.grid(alpha=0.3)
        axis.legend()
    return png(figure)


def _over_steps(draw: Callable[..., None], records: Records) -> Callable[[Any, str], None]:
    """Returns a function that draws a panel whose horizontal axis is the step.

    Args:
      draw: a function that draws the values, called as draw(axis, name, records).
      records: the records of metrics.jsonl.
    """

    def draw_panel(axis: Any, panel: str) -> None:
        draw(axis, panel, records)
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)

    return draw_panel


def _draw_reliability(axis: Any, split: str, entry: dict[str, Any]) -> None:
    """Draws the accuracy in each bin of the confidence, with the temperature and without it.

    The area of a point grows with the number of examples in its bin.

    Args:
      axis: the panel.
      split: the name of the split.
      entry: the calibration of the fine-tuning, from summary.json.
    """
    axis.plot([0, 100], [0, 100], ":", color="gray", label="calibrated")
    temperature = entry["temperature"]
    for end, colour, name in (
        ("_before", "C1", "without temperature"), ("", "C0", f"temperature {temperature:.2f}")
    ):  # fmt: skip
        bins = {key: np.array(values) for key, values in entry[split][f"bins{end}"].items()}
        used = bins["count"] > 0
        confidence, accuracy = (100 * bins[key][used] for key in ("confidence", "accuracy"))
        label = f"{name}, ECE {entry[split][f'ece{end}']:.1%}"
        axis.plot(confidence, accuracy, color=colour, linewidth=0.8)
        sizes = 10 + 200 * bins["count"][used] / bins["count"].sum()
        axis.scatter(confidence, accuracy, sizes, color=colour, alpha=0.6, label=label)
    optimistic = " (the temperature was fitted on it)" if split == "validation" else ""
    axis.set_title(f"{split}{optimistic}")
    axis.set_xlabel("confidence (%)")
    axis.set_ylabel("accuracy (%)")
    axis.set_xlim(0, 102)
    axis.set_ylim(-2, 102)


def _series(records: Records, stage: str, split: str, name: str) -> np.ndarray:
    """Returns an array [2, N] of the steps and the values of a metric.

    A null in the records becomes NaN, which is a gap in the plotted line.
    """
    chosen = [r for r in records if r["stage"] == stage and r["split"] == split and name in r]
    return np.array([[r["step"] for r in chosen], [r[name] for r in chosen]], np.float64)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns the moving average of the values. NaN values are left out of the means.

    The window is centred on each value, and its width is a tenth of the number of values. The
    window is narrower at the start, because a loss falls steeply there, and is cut off at the end.
    """
    place, known = np.arange(values.size), np.isfinite(values)
    half = np.minimum(values.size // 20, place)
    sums = np.cumsum([np.where(known, values, 0.0), known], axis=1)
    sums = np.insert(sums, 0, 0.0, axis=1)
    total, count = sums[:, np.minimum(place + half + 1, values.size)] - sums[:, place - half]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _draw_loss(axis: Any, stage: str, records: Records) -> None:
    """Draws the training loss and the validation loss of a stage."""
    steps, train = _series(records, stage, "train", "loss")
    raw = {"color": "C0", "linewidth": 0.8, "alpha": 0.5, "marker": "." if steps.size < 20 else ""}
    axis.plot(steps, train, label="train", **raw)
    if steps.size >= 20:
        axis.plot(steps, _smooth(train), color="C0", label="train, smoothed")
    validation = _series(records, stage, "validation", "loss")
    if validation.size:
        axis.plot(*validation, "o-", color="C1", label="validation")
    axis.set_title(stage.replace("_", " "))
    axis.set_ylabel(f"loss ({'nats per token' if stage == Stage.PRETRAIN else 'task + LM, nats'})")


def _draw_score(axis: Any, name: str, records: Records) -> None:
    """Draws a validation metric, with a line for each fine-tuning stage."""
    scale, unit = plot_scale(name)
    for stage in (Stage.FINETUNE, Stage.FINETUNE_FROM_SCRATCH):
        steps, values = _series(records, stage, "validation", name)
        if steps.size:
            axis.plot(steps, values * scale, "o-", label=stage.replace("_", " "))
    axis.set_title(f"validation {name}")
    axis.set_ylabel(name + unit)


def _draw_probe(axis: Any, name: str, records: Records) -> None:
    """Draws a score of a probe, and the score of its baseline, which is a constant answer.

    Args:
      axis: the panel.
      name: the name of the score in the records, probe_NAME_METRIC.
      records: the records of metrics.jsonl.
    """
    probe, _, metric = name.rpartition("_")
    scale, unit = plot_scale(metric)
    steps, values = _series(records, Stage.PRETRAIN, "validation", name)
    axis.plot(steps, values * scale, "o-", label="zero-shot")
    steps, baselines = _series(records, Stage.PRETRAIN, "validation", f"{probe}_floor")
    axis.plot(steps, baselines * scale, ":", color="gray", label="constant answer")
    axis.set_title(probe.removeprefix("probe_"))
    axis.set_ylabel(metric + unit)
