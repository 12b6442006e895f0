"""Summarises the results of `harness.run`: medians, ratios, a Markdown table, JSON and a plot."""

import dataclasses
import datetime
import os
import pathlib
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np

from benchmarks import harness, plot
from benchmarks.harness import FLAGS, Result, Variant
from gptjax.io import files

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class About:
    """The description of a benchmark, for its headings."""

    name: str
    """Name of the files that are written."""
    title: str
    unit: str
    """The thing that is processed: token, row or example."""
    what: str
    """The thing that one timing measures: step, call or epoch."""
    flops_per_unit: float = 0.0
    """Operations for one unit. 0 means that they are not counted."""
    extra: dict[str, str] = dataclasses.field(default_factory=dict)
    """Key of a record -> heading of a further column. The column shows the first round's value, and
    the median of later rounds if it differs."""
    notes: tuple[str, ...] = ()
    single: bool = False
    """Whether each worker makes one timing. The first round includes the compilation. Therefore the
    median is that of later rounds, if there are any."""


def run(about: About, every: Sequence[Variant]) -> None:
    """Runs the variants, then writes OUTPUT/NAME.json, .md and .png, and prints the table."""
    tops = harness.ceilings() if about.flops_per_unit else []

    def save(results: list[Result]) -> None:
        document = summarise(about, results)
        files.write_json(output / f"{about.name}.json", document)
        text = markdown(about, document)
        files.write_atomically(output / f"{about.name}.md", text.encode())

    output = pathlib.Path(FLAGS.output)
    with files.disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    results = harness.run([*tops, *every], FLAGS.rounds, save, FLAGS.timeout)
    document = summarise(about, results)
    with files.disk_errors(output):
        plot.bars(about.title, about.unit, document, output / f"{about.name}.png")
    print(markdown(about, document))
    print(f"{output / about.name}.md, .json and .png")


def summarise(about: About, results: Sequence[Result]) -> dict[str, Any]:
    """Returns the numbers that the table and the plot show, and every record."""
    tops = {r.variant.name: r for r in results if r.variant.spec["task"] == "ceiling"}
    best = {
        name: max(record["flops"] for record in r.records) for name, r in tops.items() if r.records
    }
    measured = [r for r in results if r.variant.spec["task"] != "ceiling"]
    reference = _reference(measured)
    rows = [_row(about, result, reference, best) for result in measured]
    return {
        "title": about.title, "unit": about.unit, "machine": machine(), "versions": _versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rounds": FLAGS.rounds, "steps": 1 if about.single else FLAGS.steps,
        "reference": reference.variant.name if reference else None,
        "flops_per_unit": about.flops_per_unit or None, "ceilings": best,
        "load_before": _loads(results), "rows": rows, "notes": list(about.notes),
        "records": {r.variant.name: r.records for r in results},
        "specs": {r.variant.name: r.variant.spec for r in results},
        "allocators": harness.ALLOCATORS,
    }  # fmt: skip


def machine() -> str:
    """Returns the machine of the measurement: "2 x Intel(R) Xeon(R) ..., 24 GiB"."""
    kind = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            kind = next(line for line in lines if "model name" in line).partition(":")[2].strip()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
        return f"{os.cpu_count()} x {kind}, {memory:.0f} GiB"
    except (OSError, StopIteration, ValueError):
        return f"{os.cpu_count()} x {kind}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _loads(results: Sequence[Result]) -> dict[str, float]:
    """Returns the median and the highest load average at the starts of workers."""
    loads = [record["load_before"] for result in results for record in result.records]
    return {"median": float(np.median(loads)), "highest": max(loads)} if loads else {}


def _reference(results: Sequence[Result]) -> Result | None:
    """Returns the variant of gptjax that the ratios refer to.

    It is bfloat16 with gptjax's own allocator setting, or else the first variant that ran.
    """
    ran = [r for r in results if r.records and r.variant.spec["implementation"] == "ours"]
    usual = f"ours-bfloat16/{harness.OURS_LAUNCHES_WITH}"
    return next((r for r in ran if r.variant.name == usual), ran[0] if ran else None)


def _row(
    about: About, result: Result, reference: Result | None, ceilings: dict[str, float]
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": result.variant.name, "error": result.error}
    records = result.records
    if not records:
        return row
    units = records[0]["units"]
    later = records[1:] if about.single and len(records) > 1 else records
    seconds = np.concatenate([record["seconds"] for record in later])
    median = float(np.median(seconds))
    row |= {
        "seconds_median": median,
        "seconds_p10": float(np.percentile(seconds, 10)),
        "seconds_p90": float(np.percentile(seconds, 90)),
        "units_per_second": units / median,
        "first_seconds": records[0]["first_seconds"],
        # Only the first round compiles. Later ones find the program in the cache.
        "compile_seconds": max(0.0, records[0]["first_seconds"] - median),
        "peak_bytes": max(record["peak_bytes"] for record in records),
    }
    if "losses" in records[0]:
        row["losses"] = [records[0]["losses"][0], records[0]["losses"][-1]]
    for key in about.extra:
        row[key] = [record.get(key) for record in records]
    if about.flops_per_unit:
        flops = units * about.flops_per_unit / median
        row["flops"] = flops
        row["share"] = {library: flops / top for library, top in _tops(ceilings).items()}
    if reference is not None:
        row["ratio"] = _ratio(records, reference.records)
    return row


def _tops(ceilings: dict[str, float]) -> dict[str, float]:
    """Returns the speed of the fastest product of each library, in any dtype."""
    found: dict[str, float] = {}
    for name, flops in ceilings.items():
        library = name.partition("-")[0]
        found[library] = max(flops, found.get(library, 0.0))
    return found


def _ratio(records: Sequence[dict], reference: Sequence[dict]) -> dict[str, float]:
    """Returns the median, lowest and highest ratio of the seconds to those of the reference.

    Both are of the same round, so that a machine that is slow for a while slows both.
    """
    pairs = [
        float(np.median(a["seconds"]) / np.median(b["seconds"]))
        for a, b in zip(records, reference, strict=False)
    ]
    return {"median": float(np.median(pairs)), "lowest": min(pairs), "highest": max(pairs)}


def markdown(about: About, document: dict[str, Any]) -> str:
    """Returns the table with its headings, the fastest first, and the conditions of measurement."""
    rows = sorted(document["rows"], key=lambda row: row.get("seconds_median", float("inf")))
    heads = _heads(about, document)
    lines = [f"# {document['title']}", "", _conditions(document), ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = _cells(about, document, row)
        lines.append("| " + " | ".join([*cells, *[""] * (len(heads) - len(cells))]) + " |")
    return "\n".join([*lines, "", *_notes(document)])


def _conditions(document: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    load = document["load_before"]
    busy = ""
    if load:
        busy = f" Load average before a worker: median {load['median']:.1f}"
        busy += f", highest {load['highest']:.1f}."
    return (
        f"{document['machine']}; {versions}; {document['date']}. {document['rounds']} interleaved "
        f"rounds of {document['steps']} timings, a new process each.{busy}"
    )


def _heads(about: About, document: dict[str, Any]) -> list[str]:
    heads = [
        "variant", f"{about.unit}s/s", f"{about.what} s, median", "p10 - p90",
        "time / ours (rounds)",
    ]  # fmt: skip
    if about.flops_per_unit:
        heads += ["GFLOP/s", *(f"of {each}'s matmul" for each in _tops(document["ceilings"]))]
    heads += [*about.extra.values()] if about.extra else ["compile s"]
    heads.append("peak GiB")
    if any("losses" in row for row in document["rows"]):
        heads.append("loss, first -> last")
    return heads


def _cells(about: About, document: dict[str, Any], row: dict[str, Any]) -> list[str]:
    if "seconds_median" not in row:
        return [row["name"], f"did not run: {row['error']}".replace("|", "/")]
    cells = [
        row["name"], _number(row["units_per_second"]), _number(row["seconds_median"]),
        f"{_number(row['seconds_p10'])} - {_number(row['seconds_p90'])}", _ratio_cell(row),
    ]  # fmt: skip
    if about.flops_per_unit:
        cells.append(f"{row['flops'] / 1e9:.0f}")
        cells += [f"{row['share'][each]:.0%}" for each in _tops(document["ceilings"])]
    if about.extra:
        cells += [_extra_cell(row[key]) for key in about.extra]
    else:
        cells.append(_number(row["compile_seconds"]))
    cells.append(f"{row['peak_bytes'] / _GIB:.1f}")
    if "losses" in row:
        cells.append(" -> ".join(f"{loss:.2f}" for loss in row["losses"]))
    if row["error"]:
        cells[0] += f" (later: {row['error']})".replace("|", "/")
    return cells


def _extra_cell(values: Sequence[Any]) -> str:
    """Returns the first round's value, and the median of later ones if it differs by a tenth."""
    if not isinstance(values[0], int | float):
        return "" if values[0] is None else str(values[0])
    later = float(np.median(values[1:])) if len(values) > 1 else values[0]
    if abs(later - values[0]) <= 0.1 * max(abs(values[0]), 0.1):
        return _number(values[0])
    return f"{_number(values[0])}, then {_number(later)}"


def _ratio_cell(row: dict[str, Any]) -> str:
    if "ratio" not in row:
        return ""
    ratio = row["ratio"]
    return f"{ratio['median']:.2f} ({ratio['lowest']:.2f} - {ratio['highest']:.2f})"


def _number(value: float) -> str:
    """Returns a number with three digits and without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def _notes(document: dict[str, Any]) -> list[str]:
    notes = []
    if document["load_before"] and document["load_before"]["highest"] > (os.cpu_count() or 1) + 1:
        notes.append("- The machine had other work to do: these timings are not to be quoted.")
    notes += [f"- time / ours: over {document['reference']}, of the same round; above 1 is slower."]
    notes += [
        f"- {name}: best matrix product {flops / 1e9:,.0f} GFLOP/s."
        for name, flops in document["ceilings"].items()
    ]
    if document["flops_per_unit"]:
        notes.append(
            f"- {document['flops_per_unit'] / 1e9:.3g} GFLOP a {document['unit']}, by "
            "gptjax.model.flops.train_flops_per_token (matrix products alone)."
        )
    used = {name.rpartition("/")[2] for name in (row["name"] for row in document["rows"])}
    notes += [
        f"- /{name}: GLIBC_TUNABLES={value}" if value else f"- /{name}: GLIBC_TUNABLES not set"
        for name, value in document["allocators"].items()
        if name in used
    ]
    return [*notes, *(f"- {note}" for note in document["notes"]), ""]
