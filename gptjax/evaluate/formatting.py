"""The formatting of scores: numbers as text, the scale of a plot's axis, tables, and PNG files."""

import io
from collections.abc import Sequence
from typing import Any

from gptjax.evaluate.metrics import PERCENT
from gptjax.io.files import json_ready


def format_score(metric: str, value: Any, percent_sign: str = "%") -> str:
    """Returns a score as text: a percentage, or a number with three decimals.

    The text is "-" if the score is None or not finite.

    >>> format_score("accuracy", 0.8125), format_score("pearson", 0.5), format_score("mse", None)
    ('81.2%', '0.500', '-')

    Args:
      metric: the name of the metric. The metrics in `metrics.PERCENT` are shown as percentages.
      value: a number or None.
      percent_sign: the text after a percentage.
    """
    value = json_ready(value)
    if value is None:
        return "-"
    return f"{100 * value:.1f}{percent_sign}" if metric in PERCENT else f"{value:.3f}"


def plot_scale(metric: str) -> tuple[float, str]:
    """Returns the factor from a metric's score to its plotted value, and the unit in the label."""
    return (100.0, " (%)") if metric in PERCENT else (1.0, "")


def aligned_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Returns the lines of a table in columns of equal width, for a terminal.

    Args:
      header: the names of the columns.
      rows: the cells of each row.
      left: the number of columns that are aligned to the left, counted from the first column. The
        other columns are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    form = "  ".join(f"{{:{'<' if i < left else '>'}{w}}}" for i, w in enumerate(widths))
    lines = [form.format(*row) for row in (header, *rows)]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def png(figure: Any) -> bytes:
    """Returns a Matplotlib figure as the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
