"""The text that a run prints at its end: the results as a table, and commands to try next."""

import contextlib
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.config.schema import Stage, TaskKind
from gptjax.evaluate.formatting import aligned_table, format_score
from gptjax.evaluate.metrics import FITTING
from gptjax.io import remote
from gptjax.io.remote import PathLike

WIDTH = 100
"""The largest number of characters in a line of the text."""

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
) -> str:
    """Returns the text: scores beside their baselines, losses, files, and commands to try next.

    Args:
      summary: the contents of summary.json. Stages and splits may be missing.
      baselines: split -> scores of the baseline, from `metrics.majority_baseline`.
      workdir: the folder of the run.
      next_commands: the commands to try next. A long command is broken into lines, which can still
        be pasted into a shell.
    """
    pretrain = {k: v for k, v in (summary.get(Stage.PRETRAIN) or {}).items() if v is not None}
    facts = [text.format(pretrain[k]) for k, text in _PRETRAIN_FACTS.items() if k in pretrain]
    files = []
    with contextlib.suppress(OSError):
        files = remote.listing(workdir)
    wrap = textwrap.TextWrapper(WIDTH, initial_indent="  ", subsequent_indent="  ").wrap
    blocks = [
        _score_table(summary, baselines),
        ["Pretraining: " + ", ".join(facts)] if facts else [],
        [f"Saved in {os.fspath(workdir)}", *wrap("  ".join(files))],
        ["Try next:", *map(_break_command, next_commands)] if next_commands else [],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _score_table(summary: Mapping[str, Any], baselines: Mapping[str, Any]) -> list[str]:
    """Returns the lines of the table of fine-tuning scores; [] if there are no scores."""
    stages = [s for s in Stage if s != Stage.PRETRAIN and summary.get(s)]
    rows = []
    for split in ("validation", "test") if stages else ():
        first, *others = [summary[s].get(split) or {} for s in stages]
        for name in first:
            scores = (first, baselines.get(split) or {}, *others)
            cells = [format_score(name, each.get(name)) for each in scores]
            rows.append([stages[0], split, name, *cells])
    if not rows:
        return []
    is_regression = any(row[2] in FITTING[TaskKind.REGRESSION] for row in rows)
    constant = "mean" if is_regression else "majority class"
    header = ["stage", "split", "metric", "score", constant, "no pretraining"][: len(rows[0])]
    return aligned_table(header, rows, left=3)


def _break_command(command: str) -> str:
    """Returns an indented command. A long command is broken before flags, with backslashes."""
    lines = [" "]
    for piece in re.split(r" (?=--)", command):
        if len(f"{lines[-1]} {piece} \\") > WIDTH and lines[-1].strip():
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += " " + piece
    return "\n".join(lines)
