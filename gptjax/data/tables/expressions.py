"""Columns by expression: `article+question` is two columns joined by a space, `options[2]` the
third element of a column of lists. A column whose name is the whole expression goes before both.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gptjax.errors import nearest, require

_ELEMENT = re.compile(r"(.+)\[(\d+)\]")


def sources(expression: str, existing: Iterable[str]) -> list[str]:
    """Returns the columns that an expression reads, whether they exist or not."""
    if expression in set(existing):
        return [expression]
    found = []
    for part in expression.split("+"):
        element = _ELEMENT.fullmatch(part.strip())
        name = part.strip()
        found.append(element[1] if element and name not in set(existing) else name)
    return found


def require_columns(existing: Sequence[str], expressions: Iterable[str], where: str) -> None:
    """Checks that all columns that `expressions` read are among `existing`.

    Raises:
      UserError: names the missing column, the nearest existing one and all existing ones.
    """
    for expression in expressions:
        for name in sources(expression, existing):
            require(
                name in existing,
                f"{where}: no column {name!r}{nearest(name, existing)}; "
                f"the columns are {', '.join(map(repr, existing))}",
            )


def read(
    column: Callable[[str], Sequence[Any]],
    existing: Sequence[str],
    expression: str,
    where: str,
    numbers: Sequence[int] | None = None,
) -> list[Any]:
    """Returns the values of an expression, in the order of the rows.

    Args:
      column: name -> values.
      existing: the names that there are.
      expression: as above; its columns exist.
      where: file or data set, for messages.
      numbers: row in the file (from 1) of each row, for messages; None: 1, 2, ...

    Raises:
      UserError: a row whose list has no such element, or that is no list.
    """
    if expression in existing:
        return list(column(expression))
    names = [part.strip() for part in expression.split("+")]
    parts = [_part(column, existing, name, where, numbers) for name in names]
    if len(parts) == 1:
        return parts[0]
    texts = [["" if value is None else str(value) for value in part] for part in parts]
    return [" ".join(row) for row in zip(*texts, strict=True)]


def _part(
    column: Callable[[str], Sequence[Any]],
    existing: Sequence[str],
    name: str,
    where: str,
    numbers: Sequence[int] | None,
) -> list[Any]:
    element = _ELEMENT.fullmatch(name)
    if name in existing or element is None:
        return list(column(name))
    place, values = int(element[2]), []
    for i, cell in enumerate(column(element[1])):
        many = len(cell) if isinstance(cell, list | tuple) else None
        row = numbers[i] if numbers else i + 1
        what = "is no list" if many is None else f"has {many} elements"
        require(
            many is not None and place < many,
            f"{where}: row {row}, column {element[1]}: {what}; {name} needs at least {place + 1}",
        )
        values.append(cell[place])
    return values
