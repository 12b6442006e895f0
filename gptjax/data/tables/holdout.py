"""Holding out a part of the training data for validation, without leaking it into training."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gptjax.data import fingerprints
from gptjax.data.tables import expressions
from gptjax.data.tables.labelled import LabelledTable, as_text
from gptjax.data.tables.texts import Texts
from gptjax.errors import require

if TYPE_CHECKING:
    import pyarrow as pa


def holdout(
    table: LabelledTable, columns: Sequence[str], fraction: float, seed: int
) -> tuple[LabelledTable, LabelledTable]:
    """Splits rows into (train, validation) without a leak, the same way on every machine.

    Rows with the same text form a group, and a group is never divided. Case and white space are
    ignored in the comparison. Groups are ordered by a hash of seed and text; the first ones are
    held out until validation has ceil(fraction * rows) rows. Both parts keep the order of the rows.

    Args:
      table: the rows.
      columns: the columns, or expressions, whose text is compared.
      fraction: the part of the rows to hold out, between 0 and 1.
      seed: another seed holds out other rows.

    Raises:
      UserError: `fraction` is not between 0 and 1, or a part would be empty.
    """
    _require_fraction(fraction)
    existing = table.column_names
    names = dict.fromkeys(
        name for expression in columns for name in expressions.sources(expression, existing)
    )
    cells = [list(map(as_text, values)) for values in table.columns(names).values()]
    groups: dict[bytes, list[int]] = {}
    for index, row in enumerate(zip(*cells, strict=True)):
        text = "\x1f".join(" ".join(cell.casefold().split()) for cell in row)
        data = f"{seed}\x1e{text}".encode(errors="surrogatepass")
        groups.setdefault(hashlib.blake2b(data, digest_size=16).digest(), []).append(index)
    count = sum(map(len, groups.values()))
    wanted = math.ceil(fraction * count)
    held_out: set[int] = set()
    for name in sorted(groups):
        if len(held_out) >= wanted:
            break
        held_out.update(groups[name])
    require(
        0 < len(held_out) < count,
        f"{table.source}: cannot hold out {fraction:g} of {count} rows with {len(groups)} "
        "different texts; give a validation file",
    )
    kept = [index for index in range(count) if index not in held_out]
    parent = dataclasses.replace(table, part_of=table.source)
    return parent.select(kept), parent.select(sorted(held_out))


def _require_fraction(fraction: float) -> None:
    require(0 < fraction < 1, f"validation fraction {fraction}: write a number between 0 and 1")


def holdout_text(texts: Texts, fraction: float) -> tuple[Texts, Texts]:
    """Splits a corpus into (train, validation), which is the last `fraction` of its characters.

    The corpus is cut at int((1 - fraction) * characters). If a line ends within 1% of the corpus
    before this place, the cut is moved back to the end of that line.

    The fingerprints of the parts are derived from that of the corpus and the place of the cut,
    which determine their contents, so that the text is not read for them again.

    Raises:
      UserError: `fraction` is not between 0 and 1, or a part would be empty.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    _require_fraction(fraction)
    rows = texts.rows
    starts = [0, *itertools.accumulate(pc.utf8_length(rows).to_pylist())]
    cut = _line_start(rows, starts, int((1 - fraction) * starts[-1]), starts[-1] // 100)
    require(
        0 < cut < starts[-1],
        f"cannot hold out {fraction:g} of {starts[-1]} characters; give validation files",
    )
    divided = bisect.bisect_right(starts, cut) - 1
    text = rows[divided].as_py()
    before, after = text[: cut - starts[divided]], text[cut - starts[divided] :]
    head = [*rows.slice(0, divided).chunks, pa.array([before] if before else [], rows.type)]
    tail = [pa.array([after], rows.type), *rows.slice(divided + 1).chunks]

    def part(name: str, chunks: list[pa.Array]) -> Texts:
        fingerprint = fingerprints.of_values(name, texts.fingerprint, cut)
        return Texts(pa.chunked_array(chunks, rows.type), fingerprint)

    return part("before", head), part("after", tail)


def _line_start(rows: pa.ChunkedArray, starts: Sequence[int], cut: int, reach: int) -> int:
    """Returns the last start of a line in [cut - reach, cut], or `cut` if there is none.

    All places are characters of the corpus; row r begins at starts[r].
    """
    for row in range(bisect.bisect_left(starts, cut) - 1, -1, -1):
        start = starts[row] + rows[row].as_py().rfind("\n", 0, cut - starts[row]) + 1
        if starts[row] < start:
            return start if start >= cut - reach else cut
        if starts[row] < cut - reach:
            break
    return cut
