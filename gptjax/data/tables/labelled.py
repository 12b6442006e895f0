"""Tables of labelled rows. They know the source and the row numbers for error messages.

A column is chosen with an expression. The name of a column is an expression. `article+question`
joins two columns with a space, and `options[2]` is the third element of each list in a column. If a
column has the whole expression as its name, the expression means this column.
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
    """Returns the value of a cell as text. None becomes the empty string."""
    return "" if value is None else str(value)


def _parts(expression: str, existing: Collection[str]) -> list[tuple[str, int | None]]:
    """Returns (column, index) for each column that an expression joins.

    The index is an index into the lists of the column. None means the whole cell.

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
    """The name of the file or data set that the rows come from, for error messages."""
    part_of: str = ""
    """The source of the table that `holdout` has divided to make this split. An empty string means
    that `holdout` has not made this split."""
    numbers: Sequence[int] | None = None
    """The number of each row in its file, from 1, for error messages. None means 1, 2, ..."""
    ignored: int = 0
    """The number of rows that were left out because of their label."""

    @property
    def column_names(self) -> list[str]:
        """The names of the columns."""
        return list(self.rows) if isinstance(self.rows, Mapping) else self.rows.column_names

    def number(self, index: int) -> int:
        """Returns the number (in the file, from 1) of the row at an index."""
        return index + 1 if self.numbers is None else self.numbers[index]

    def cell(self, index: int, column: str) -> str:
        """Returns the name of a cell, for error messages."""
        return f"{self.source}: row {self.number(index)}, column {column}"

    def select(self, indices: Sequence[int]) -> Self:
        """Returns a table with the rows at the indices. The rows keep their numbers in the file."""
        if isinstance(self.rows, Mapping):
            rows = {name: [cells[i] for i in indices] for name, cells in self.rows.items()}
        else:
            rows = self.rows.select(indices, keep_in_memory=True)
        return dataclasses.replace(self, rows=rows, numbers=[self.number(i) for i in indices])

    def sources(self, expressions: Iterable[str]) -> list[str]:
        """Returns the distinct columns that expressions read, even if they do not exist."""
        existing = self.column_names
        parts = (part for expression in expressions for part in _parts(expression, existing))
        return list(dict.fromkeys(column for column, _ in parts))

    def require_columns(self, expressions: Iterable[str]) -> None:
        """Checks that the table has all columns that these expressions read.

        Raises:
          UserError: a column is missing. The message names it, the most similar existing column and
            all existing columns.
        """
        existing = self.column_names
        for name in self.sources(expressions):
            require(
                name in existing,
                f"{self.source}: no column {name!r}{nearest(name, existing)}; "
                f"the columns are {', '.join(map(repr, existing))}",
            )

    def columns(self, expressions: Iterable[str]) -> dict[str, list[Any]]:
        """Returns a dictionary: expression -> values, one value for each row.

        Raises:
          UserError: an expression reads an element that the list of a row does not have, or the
            columns have different lengths.
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
        """Returns the values of a column, or the element at an index of each list in a column."""
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
    """Splits rows into (train, validation). No text is in both, and all machines split alike.

    Rows with the same text form a group, and all rows of a group are in the same split. The
    comparison ignores case and white space. The groups are sorted by a hash of seed and text. Whole
    groups are held out, in this order, until validation has at least ceil(fraction * rows) rows.
    Both splits keep the order of the rows.

    Args:
      table: the rows.
      columns: names of the columns, or expressions, whose text is compared.
      fraction: the fraction of the rows to hold out, between 0 and 1.
      seed: a number that changes the hash. Another seed holds out other rows.

    Raises:
      UserError: a split would be empty.
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
