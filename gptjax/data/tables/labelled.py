"""Labelled rows: a table with everything that an error message needs to name one of its cells.

Columns are read by expressions. `article+question` joins two columns by a space; `options[2]` is
the third element of a column of lists. A column that has the whole expression as its name comes
first.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Self

from gptjax.data.tables.files import Dataset
from gptjax.errors import nearest, require

_ELEMENT = re.compile(r"(.+)\[(\d+)\]")


def as_text(value: Any) -> str:
    """Returns a cell as text: None is empty, numbers are as Python writes them."""
    return "" if value is None else str(value)


def _parts(expression: str, existing: Collection[str]) -> list[tuple[str, int | None]]:
    """Returns (column, index in its lists; None: the whole cell) of each summand.

    >>> _parts("article + options[2]", ["article", "options"]), _parts("a+b", ["a+b"])
    ([('article', None), ('options', 2)], [('a+b', None)])
    """
    parts = [expression] if expression in existing else map(str.strip, expression.split("+"))
    elements = ((part, part not in existing and _ELEMENT.fullmatch(part)) for part in parts)
    return [(match[1], int(match[2])) if match else (part, None) for part, match in elements]


@dataclasses.dataclass(frozen=True)
class LabelledTable:
    """The rows of one split."""

    rows: Dataset | Mapping[str, Sequence[Any]]
    """Column name -> values."""
    source: str
    """The file or data set that the rows come from, as error messages call it."""
    part_of: str = ""
    """The source that was divided into this split and others; "" if none was."""
    numbers: Sequence[int] | None = None
    """The number of each row in its file, from 1, for error messages; None: 1, 2, ..."""
    ignored: int = 0
    """Rows that were left out because of their label."""

    @property
    def column_names(self) -> list[str]:
        """The names of the columns."""
        return list(self.rows) if isinstance(self.rows, Mapping) else self.rows.column_names

    def number(self, index: int) -> int:
        """Returns the number in the file, from 1, of the row at an index."""
        return index + 1 if self.numbers is None else self.numbers[index]

    def cell(self, index: int, column: str) -> str:
        """Returns the name of a cell, for error messages."""
        return f"{self.source}: row {self.number(index)}, column {column}"

    def select(self, indices: Sequence[int]) -> Self:
        """Returns the rows at the indices; they keep their numbers in the file."""
        if isinstance(self.rows, Mapping):
            rows = {name: [cells[i] for i in indices] for name, cells in self.rows.items()}
        else:
            rows = self.rows.select(indices, keep_in_memory=True)
        return dataclasses.replace(self, rows=rows, numbers=[self.number(i) for i in indices])

    def sources(self, expressions: Iterable[str]) -> list[str]:
        """Returns the columns that expressions read, each once, whether they exist or not."""
        existing = self.column_names
        parts = (part for expression in expressions for part in _parts(expression, existing))
        return list(dict.fromkeys(column for column, _ in parts))

    def require_columns(self, expressions: Iterable[str]) -> None:
        """Checks that the table has all columns that these expressions read.

        Raises:
          UserError: names the missing column, the nearest existing one and all existing ones.
        """
        existing = self.column_names
        for name in self.sources(expressions):
            require(
                name in existing,
                f"{self.source}: no column {name!r}{nearest(name, existing)}; "
                f"the columns are {', '.join(map(repr, existing))}",
            )

    def columns(self, expressions: Iterable[str]) -> dict[str, list[Any]]:
        """Returns a mapping from each expression to its values, one for each row.

        Raises:
          UserError: an expression takes an element that the list of a row does not have, or the
            columns differ in length.
        """
        values = {expression: self._column(expression) for expression in expressions}
        lengths = {len(column) for column in values.values()}
        require(len(lengths) < 2, f"{self.source}: columns of different lengths {sorted(lengths)}")
        return values

    def _column(self, expression: str) -> list[Any]:
        parts = [self._part(*part) for part in _parts(expression, self.column_names)]
        if len(parts) == 1:
            return parts[0]
        return [" ".join(map(as_text, row)) for row in zip(*parts, strict=True)]

    def _part(self, column: str, index: int | None) -> list[Any]:
        """Returns the values of one part of a sum: a column, or an element of each of its lists."""
        values = list(self.rows[column])
        if index is None:
            return values
        for i, cell in enumerate(values):
            count = len(cell) if isinstance(cell, list | tuple) else None
            problem = "is no list" if count is None else f"has {count} elements"
            require(
                count is not None and index < count,
                f"{self.cell(i, column)}: {problem}; {column}[{index}] needs at least {index + 1}",
            )
        return [cell[index] for cell in values]


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
      UserError: a part would be empty.
    """
    compared = table.columns(table.sources(columns)).values()
    groups: dict[bytes, list[int]] = {}
    for index, row in enumerate(zip(*compared, strict=True)):
        text = "\x1f".join(" ".join(as_text(cell).casefold().split()) for cell in row)
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
