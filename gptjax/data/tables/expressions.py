"""Expressions for columns: `article+question` joins two columns by a space; `options[2]` is the
third element of a column of lists. A column that has the whole expression as its name comes first.
"""

import re
from collections.abc import Iterable, Sequence

from gptjax.errors import nearest, require

_ELEMENT = re.compile(r"(.+)\[(\d+)\]")


def parts(expression: str) -> list[str]:
    """Returns the summands of an expression.

    >>> parts("article + options[2]")
    ['article', 'options[2]']
    """
    return [part.strip() for part in expression.split("+")]


def element(part: str, existing: Iterable[str]) -> tuple[str, int | None]:
    """Returns the column that a summand reads, and the index in its lists; None: the whole cell.

    >>> element("options[2]", ["options"]), element("options[2]", ["options[2]"])
    (('options', 2), ('options[2]', None))
    """
    match = _ELEMENT.fullmatch(part)
    return (match[1], int(match[2])) if match and part not in set(existing) else (part, None)


def sources(expression: str, existing: Iterable[str]) -> list[str]:
    """Returns the columns that an expression reads, whether they exist or not."""
    names = set(existing)
    if expression in names:
        return [expression]
    return [element(part, names)[0] for part in parts(expression)]


def require_columns(existing: Sequence[str], expressions: Iterable[str], source: str) -> None:
    """Checks that all columns that `expressions` read are among `existing`.

    Raises:
      UserError: names the missing column, the nearest existing one and all existing ones.
    """
    for expression in expressions:
        for name in sources(expression, existing):
            require(
                name in existing,
                f"{source}: no column {name!r}{nearest(name, existing)}; "
                f"the columns are {', '.join(map(repr, existing))}",
            )
