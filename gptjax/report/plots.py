"""The plots of a run, drawn from its metrics.jsonl."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.config.schema import Stage
from gptjax.evaluate.formatting import plot_scale, png
from gptjax.evaluate.metrics import NAMES
from gptjax.io.files import write_atomically
from gptjax.io.remote import PathLike
from gptjax.train.log import read

Records = Sequence[dict[str, Any]]
"""Records of metrics.jsonl. A record is one line of this file."""


def draw_plots(workdir: PathLike) -> list[str]:
    """Draws ``loss.png``, ``score.png`` and ``probes.png`` in the folder WORKDIR/plots.

    A plot without data is not drawn.

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
            write_atomically(paths[-1], _draw(panels, draw, records))
    return paths


def _draw(panels: Sequence[str], draw: Callable[..., None], records: Records) -> bytes:
    """Returns a PNG with a panel for each name; `draw(axis, name, records)` draws one panel."""
    # `Figure` is used instead of pyplot, which keeps all figures and may look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 5 * len(panels), 4.5), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axis, panel, records)
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axis.grid(alpha=0.3)
        axis.legend()
    return png(figure)


def _series(records: Records, stage: str, split: str, name: str) -> np.ndarray:
    """Returns float64 [2, N]: steps and values. A null in the records is NaN, a gap in the line."""
    chosen = [r for r in records if r["stage"] == stage and r["split"] == split and name in r]
    return np.array([[r["step"] for r in chosen], [r[name] for r in chosen]], np.float64)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns the moving average of the values.

    The window around a value is a tenth of all values wide. Near the start it is narrower, because
    a loss falls steeply there. At the end its right half is cut off. A mean leaves out values that
    are not finite; it is NaN if a window has no other values.
    """
    place, known = np.arange(values.size), np.isfinite(values)
    half = np.minimum(values.size // 20, place)
    sums = np.cumsum([np.where(known, values, 0.0), known], axis=1)
    sums = np.insert(sums, 0, 0.0, axis=1)
    total, count = sums[:, np.minimum(place + half + 1, values.size)] - sums[:, place - half]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _draw_loss(axis: Any, stage: str, records: Records) -> None:
    """Draws the training and validation loss of a stage."""
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
    """Draws a validation metric of the fine-tuning stages."""
    scale, unit = plot_scale(name)
    for stage in (Stage.FINETUNE, Stage.FINETUNE_FROM_SCRATCH):
        steps, values = _series(records, stage, "validation", name)
        if steps.size:
            axis.plot(steps, values * scale, "o-", label=stage.replace("_", " "))
    axis.set_title(f"validation {name}")
    axis.set_ylabel(name + unit)


def _draw_probe(axis: Any, name: str, records: Records) -> None:
    """Draws the score "probe_NAME_METRIC" and the majority-class baseline of this probe."""
    probe, _, metric = name.rpartition("_")
    scale, unit = plot_scale(metric)
    steps, values = _series(records, Stage.PRETRAIN, "validation", name)
    axis.plot(steps, values * scale, "o-", label="zero-shot")
    steps, baselines = _series(records, Stage.PRETRAIN, "validation", f"{probe}_floor")
    axis.plot(steps, baselines * scale, ":", color="gray", label="constant answer")
    axis.set_title(probe.removeprefix("probe_"))
    axis.set_ylabel(metric + unit)
