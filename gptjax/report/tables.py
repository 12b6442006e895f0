"""The text that a run prints at its end: a table of its results, and commands to try next."""

import contextlib
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.config.schema import Stage, TaskKind, higher_is_better
from gptjax.evaluate.formatting import aligned_table, format_score
from gptjax.evaluate.metrics import FITTING
from gptjax.io import remote
from gptjax.io.files import json_ready
from gptjax.io.remote import PathLike

WIDTH = 100
"""The largest number of characters in a line of the text."""

_MARGIN_LINE = (
    "+- is half the width of the 95 % interval: Wilson's of an accuracy, of others by a bootstrap."
)

_OPTIMISTIC_LINE = (
    "Without a test split: the checkpoint was chosen by these validation scores, so they are "
    "optimistic."
)

_PRETRAIN_FACTS = {
    "steps": "{:,} steps",
    "validation_loss": "validation loss {:.3f} nats per token",
    "validation_perplexity": "perplexity {:,.1f}",
    "tokens_per_second": "{:,.0f} tokens/s",
}


def results_table(
    summary: Mapping[str, Any],
    baselines: Mapping[str, Mapping[str, float]],
    workdir: PathLike,
    next_commands: Sequence[str],
    init_from: str = "",
) -> str:
    """Returns the text that a run prints at its end.

    It has a table of scores beside their baselines, the losses, the files of the run, and commands.
    If the linear model has the better score, one line says so. So does one line if there is no
    test, because the validation scores are optimistic then.

    Args:
      summary: the contents of summary.json. Stages and splits can be missing.
      baselines: split -> scores of the majority-class baseline (for regression, of the mean), from
        `metrics.majority_baseline`.
      workdir: folder of the run.
      next_commands: commands to try next. A long command is broken into lines that can still be
        pasted into a shell.
      init_from: the checkpoint that the run started from. "" means random weights.
    """
    pretrain = {k: v for k, v in (summary.get(Stage.PRETRAIN) or {}).items() if v is not None}
    facts = [text.format(pretrain[k]) for k, text in _PRETRAIN_FACTS.items() if k in pretrain]
    files = []
    with contextlib.suppress(OSError):
        files = remote.listing(workdir)
    wrap = textwrap.TextWrapper(WIDTH, initial_indent="  ", subsequent_indent="  ").wrap
    blocks = [
        _score_table(summary, baselines) + _linear_lines(summary, init_from),
        ["Pretraining: " + ", ".join(facts)] if facts else [],
        [f"Saved in {os.fspath(workdir)}", *wrap("  ".join(files))],
        ["Try next:", *map(_break_command, next_commands)] if next_commands else [],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _score_table(summary: Mapping[str, Any], baselines: Mapping[str, Any]) -> list[str]:
    """Returns the lines of the table of fine-tuning scores; [] if there are no scores."""
    stages = [s for s in Stage if s != Stage.PRETRAIN and summary.get(s)]
    linear = _linear(summary)
    rows = []
    for split in ("validation", "test") if stages else ():
        first, *others = [summary[s].get(split) or {} for s in stages]
        intervals = (summary[stages[0]].get("intervals") or {}).get(split) or {}
        compared = [baselines, linear] if linear else [baselines]
        for name in first:
            scores = [*(each.get(split) or {} for each in compared), *others]
            cells = [format_score(name, each.get(name)) for each in scores]
            score = format_score(name, first[name]) + _margin(name, intervals.get(name))
            rows.append([stages[0], split, name, score, *cells])
    if not rows:
        return []
    is_regression = any(row[2] in FITTING[TaskKind.REGRESSION] for row in rows)
    header = ["stage", "split", "metric", "score", "mean" if is_regression else "majority class"]
    header += ["linear model"] if linear else []
    header += ["no pretraining"] if len(stages) > 1 else []
    lines = aligned_table(header, rows, left=3)
    lines += [_MARGIN_LINE] * any("+-" in row[3] for row in rows)
    return lines + [_OPTIMISTIC_LINE] * all(row[1] == "validation" for row in rows)


def _linear(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the entry of the linear model in the summary; {} if it has no scores."""
    entry = ((summary.get(Stage.FINETUNE) or {}).get("baselines") or {}).get("linear") or {}
    return {} if "left_out" in entry else entry


def _margin(metric: str, interval: Sequence[float] | None) -> str:
    """Returns half the width of an interval as text, with "+-" before it; "" if there is none."""
    if interval is None or None in json_ready(list(interval)):
        return ""
    low, high = interval
    return f" +- {format_score(metric, (high - low) / 2, percent_sign='')}"


def _linear_lines(summary: Mapping[str, Any], init_from: str) -> list[str]:
    """Returns lines that say that the linear model has the better score, or nothing.

    The score is the first metric of the test split. Without a test, it is that of the validation
    split. Pretrained weights are a thing to try only if the run has none.
    """
    differences = _linear(summary).get("difference") or {}
    split = "test" if "test" in differences else "validation"
    name, values = next(iter((differences.get(split) or {}).items()), ("", ()))
    if not values or None in (values := json_ready(list(values))):
        return []
    sign = 1 if higher_is_better(name) else -1
    difference, *bounds = [sign * value for value in values]
    if difference >= 0:
        return []
    may_be_chance = "; this may be chance" if max(bounds) >= 0 else ""
    ours = format_score(name, summary[Stage.FINETUNE][split][name])
    theirs = format_score(name, _linear(summary)[split][name])
    has_weights = init_from or summary.get(Stage.PRETRAIN)
    weights = "" if has_weights else "pretrained weights (--config.init_from), "
    text = (
        f"The linear model is better: {split} {name} {theirs} against {ours}{may_be_chance}. "
        f"Try {weights}more pretraining text, more labelled rows or more epochs."
    )
    return ["", *textwrap.wrap(text, WIDTH)]


def _break_command(command: str) -> str:
    """Returns a command, indented. A long command is broken before flags, with a backslash."""
    lines = [" "]
    for piece in re.split(r" (?=--)", command):
        if len(f"{lines[-1]} {piece} \\") > WIDTH and lines[-1].strip():
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += " " + piece
    return "\n".join(lines)
