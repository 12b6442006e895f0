"""A plot of the speeds as horizontal bars, the fastest at the top."""

import io
import pathlib
import textwrap
from typing import Any

from gptjax.io import files

_COLOURS = {
    "ours": "#0b6e4f", "pytorch": "#c8553d", "transformers": "#e0a030", "flax": "#4a6fa5",
}  # fmt: skip
_OTHER = "#808080"
_BAR_INCHES = 0.32


def bars(title: str, unit: str, document: dict[str, Any], path: pathlib.Path) -> None:
    """Writes a PNG with a bar for each variant: its units per second, and the range p10 to p90.

    Args:
      title: the text above the plot.
      unit: the thing that is counted per second.
      document: from `summary.summarise`.
      path: the file to write.
    """
    from matplotlib.figure import Figure

    rows = [row for row in document["rows"] if "seconds_median" in row]
    rows.sort(key=lambda row: row["units_per_second"])
    if not rows:
        return
    figure = Figure(figsize=(9, 1.6 + _BAR_INCHES * len(rows)), layout="constrained")
    axis = figure.add_subplot()
    _draw(axis, rows, document["reference"])
    axis.set_xlabel(f"{unit}s per second; bars: medians, lines: p10 to p90")
    axis.set_title("\n".join(textwrap.wrap(title, 84)), fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, -0.02, document["machine"], fontsize=7, color="#606060")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130, bbox_inches="tight")
    files.write_atomically(path, data.getvalue())


def _draw(axis: Any, rows: list[dict[str, Any]], reference: str) -> None:
    """Draws the bars of rows, slowest first, and their numbers."""
    speeds = [row["units_per_second"] for row in rows]
    medians = [row["seconds_median"] for row in rows]
    # The speed is the inverse of the seconds, so that p10 of the seconds gives the highest speed.
    ends = [
        [s * (1 - m / row["seconds_p90"]) for s, m, row in zip(speeds, medians, rows, strict=True)],
        [s * (m / row["seconds_p10"] - 1) for s, m, row in zip(speeds, medians, rows, strict=True)],
    ]
    names = [row["name"] for row in rows]
    axis.barh(
        names, speeds, xerr=ends, height=0.72,
        color=[_COLOURS.get(name.partition("-")[0], _OTHER) for name in names],
        error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#303030"},
    )  # fmt: skip
    tips = [s + more for s, more in zip(speeds, ends[1], strict=True)]
    longest = max(tips)
    for place, (row, tip) in enumerate(zip(rows, tips, strict=True)):
        speed = row["units_per_second"]
        text = f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
        if "ratio" in row and row["name"] != reference:
            text += f"  ({row['ratio']['median']:.2f}x the time)"
        axis.text(tip + 0.012 * longest, place, text, va="center", fontsize=8)
    axis.set_xlim(0, 1.3 * longest)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.xaxis.set_major_formatter("{x:,.0f}" if longest > 10 else "{x:g}")
    axis.tick_params(axis="y", labelsize=8, length=0)
