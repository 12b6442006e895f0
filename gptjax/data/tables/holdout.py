"""Holding a part of the data out for validation, without a leak."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gptjax.data.tables.files import (
    text_column,
    to_dataset,
)
from gptjax.errors import require

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


def holdout(
    dataset: Dataset, columns: Sequence[str], fraction: float, seed: int
) -> tuple[Dataset, Dataset]:
    """Splits rows into (train, validation) without a leak, the same way on every machine.

    Rows whose text in `columns` is equal up to case and white space stay together. Whole groups, in
    the order of a hash of seed and text, go to validation until it has ceil(fraction * rows) rows.
    The order of rows is kept on both sides.

    Raises:
      UserError: `fraction` is not between 0 and 1, or a side would be empty.
    """
    require(0 < fraction < 1, f"validation fraction {fraction}: write a number between 0 and 1")
    cells = [text_column(dataset, name) for name in columns]
    groups: dict[bytes, list[int]] = {}
    for index in range(len(dataset)):
        text = "\x1f".join(" ".join(column[index].casefold().split()) for column in cells)
        data = f"{seed}\x1e{text}".encode(errors="surrogatepass")
        groups.setdefault(hashlib.blake2b(data, digest_size=16).digest(), []).append(index)
    wanted = math.ceil(fraction * len(dataset))
    taken: set[int] = set()
    for key in sorted(groups):
        if len(taken) >= wanted:
            break
        taken.update(groups[key])
    require(
        0 < len(taken) < len(dataset),
        f"cannot hold out {fraction:g} of {len(dataset)} rows with {len(groups)} different texts; "
        "give a validation file",
    )
    train = [index for index in range(len(dataset)) if index not in taken]
    return (
        dataset.select(train, keep_in_memory=True),
        dataset.select(sorted(taken), keep_in_memory=True),
    )


def holdout_text(dataset: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Splits a corpus (column `text`) into (train, validation): the last `fraction` of characters.

    The cut is at int((1 - fraction) * characters), moved back to the last line break before it if
    there is one within 1% of the corpus.

    Raises:
      UserError: `fraction` is not between 0 and 1, or a side would be empty.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    require(0 < fraction < 1, f"validation fraction {fraction}: write a number between 0 and 1")
    column = dataset.select_columns("text").with_format("arrow")[:].column("text")
    starts = [0, *itertools.accumulate(pc.utf8_length(column).to_pylist())]
    cut = _line_start(column, starts, int((1 - fraction) * starts[-1]), starts[-1] // 100)
    require(
        0 < cut < starts[-1],
        f"cannot hold out {fraction:g} of {starts[-1]} characters; give validation files",
    )
    row = bisect.bisect_right(starts, cut) - 1
    text = column[row].as_py()
    parts = [text[: cut - starts[row]]] if cut > starts[row] else []
    head = [*column.slice(0, row).chunks, pa.array(parts, column.type)]
    tail = [pa.array([text[cut - starts[row] :]], column.type), *column.slice(row + 1).chunks]
    train, validation = (pa.table({"text": pa.chunked_array(each)}) for each in (head, tail))
    return to_dataset(train), to_dataset(validation)


def _line_start(column: pa.ChunkedArray, starts: Sequence[int], cut: int, reach: int) -> int:
    """The last start of a line in [cut - reach, cut], else `cut`. Row r begins at starts[r]."""
    for row in range(bisect.bisect_left(starts, cut) - 1, -1, -1):
        found = starts[row] + column[row].as_py().rfind("\n", 0, cut - starts[row]) + 1
        if starts[row] < found:
            return found if found >= cut - reach else cut
        if starts[row] < cut - reach:
            break
    return cut
