"""Labelled rows: a table with everything that an error message needs to name one of its cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gptjax.data.tables import expressions
from gptjax.errors import require

if TYPE_CHECKING:
    from datasets import Dataset


def as_text(value: Any) -> str:
    """Returns a cell as text: None is empty, numbers are as Python writes them."""
    return "" if value is None else str(value)


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

    def select(self, indices: Sequence[int]) -> LabelledTable:
        """Returns the rows at the indices; they keep their numbers in the file."""
        rows: Any
        if isinstance(self.rows, Mapping):
            rows = {name: [cells[i] for i in indices] for name, cells in self.rows.items()}
        else:
            rows = self.rows.select(indices, keep_in_memory=True)
        return dataclasses.replace(self, rows=rows, numbers=[self.number(i) for i in indices])

    def require_columns(self, names: Iterable[str]) -> None:
        """Checks that the table has all columns that these names or expressions read.

        Raises:
          UserError: names the missing column, the nearest existing one and all existing ones.
        """
        expressions.require_columns(self.column_names, names, self.source)

    def columns(self, names: Iterable[str]) -> dict[str, list[Any]]:
        """Returns column name or expression (see `expressions.py`) -> values, one for each row.

        Raises:
          UserError: a list without the wanted element, or columns of different lengths.
        """
        values = {name: self._column(name) for name in names}
        lengths = {len(column) for column in values.values()}
        require(len(lengths) < 2, f"{self.source}: columns of different lengths {sorted(lengths)}")
        return values

    def _column(self, name: str) -> list[Any]:
        if name in self.column_names:
            return list(self.rows[name])
        parts = [self._part(part) for part in expressions.parts(name)]
        if len(parts) == 1:
            return parts[0]
        return [" ".join(map(as_text, row)) for row in zip(*parts, strict=True)]

    def _part(self, part: str) -> list[Any]:
        """Returns the values of one part of a sum: a column, or an element of each of its lists."""
        column, index = expressions.element(part, self.column_names)
        values = list(self.rows[column])
        if index is None:
            return values
        for i, cell in enumerate(values):
            count = len(cell) if isinstance(cell, list | tuple) else None
            problem = "is no list" if count is None else f"has {count} elements"
            require(
                count is not None and index < count,
                f"{self.cell(i, column)}: {problem}; {part} needs at least {index + 1}",
            )
        return [cell[index] for cell in values]
