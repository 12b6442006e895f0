"""Tables of labelled rows. They know the source and the row numbers for error messages.

A column is chosen with an expression. The name of a column is an expression. `article+question`
joins two columns with a space, and `options[2]` is the third element of each list in a column. If a
column has the whole expression as its name, the expression means this column.
"""

import collections
import dataclasses
import decimal
import hashlib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import Any, Self

from gptjax.data.tables.files import Dataset
from gptjax.errors import UserError, nearest, require

_ELEMENT = re.compile(r"(.+)\[(\d+)\]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def is_missing(value: Any) -> bool:
    """Returns whether a cell has no value: None, NaN, NaT or pandas' NA.

    >>> [is_missing(value) for value in (None, math.nan, "nan", "", 0)]
    [True, True, False, False, False]
    """
    if value is None or isinstance(value, str):
        return value is None
    try:
        return bool(value != value)  # only NaN and NaT differ from themselves
    except TypeError:  # pandas' NA compares to NA, which has no truth value
        return True
    except ValueError:  # an array
        return False


def as_text(value: Any) -> str:
    """Returns the value of a cell as text. A missing value becomes the empty string."""
    return "" if is_missing(value) else str(value)


def same_label(label: str, other: str) -> bool:
    """Returns whether two labels are equal as texts or as numbers, without spaces around them.

    >>> same_label("-1.0", "-1"), same_label("1", "one")
    (True, False)
    """
    number = as_number(label)
    return label.strip() == other.strip() or (number is not None and number == as_number(other))


def as_number(text: str) -> decimal.Decimal | None:
    """Returns the number that a text denotes, without rounding; None if it denotes no number.

    A number beyond the range of float64 counts as none.

    >>> as_number("1.0"), as_number("one"), as_number("nan"), as_number("1_0")
    (Decimal('1.0'), None, None, None)
    """
    if not _NUMBER.fullmatch(text.strip()) or math.isinf(float(text)):
        return None
    return decimal.Decimal(text.strip())


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

        A value is a text, a number, a truth value or a time. A missing value (see `is_missing`) is
        None. Bytes become text.

        Raises:
          UserError: a cell is a list, a structure or bytes that are not UTF-8, an expression reads
            an element that the list of a row does not have, or the columns have different lengths.
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
        if index is not None:
            for i, cell in enumerate(values):
                count = len(cell) if _is_list(cell) else None
                problem = "is no list" if count is None else f"has {count} elements"
                require(
                    count is not None and index < count,
                    f"{self.cell(i, column)}: {problem}; {column}[{index}] needs at least "
                    f"{index + 1}",
                )
            values = [cell[index] for cell in values]
        element = "" if index is None else f"[{index}]"
        return [
            value if type(value) is str else self._plain(value, i, column + element)
            for i, value in enumerate(values)
        ]

    def _plain(self, value: Any, index: int, column: str) -> Any:
        """Returns a cell as `columns` describes it.

        Args:
          value: the cell.
          index: the index of its row.
          column: the name of its column, for error messages.
        """
        if isinstance(value, bytes | bytearray | memoryview):
            try:
                return bytes(value).decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{self.cell(index, column)}: bytes that are not UTF-8 ({error.reason} at byte "
                    f"{error.start}); write the column as text"
                ) from error
        if _is_list(value):
            raise UserError(
                f"{self.cell(index, column)}: is a list, not a text or a number; write {column}[0] "
                "for its first element, or join the elements in the data"
            )
        require(
            not isinstance(value, Mapping | Set),
            f"{self.cell(index, column)}: is a {type(value).__name__}, not a text or a number; "
            "write the part that is needed into a column of its own",
        )
        return None if is_missing(value) else value


def _is_list(cell: Any) -> bool:
    """Returns whether a cell is a list. An array of NumPy is one, but a number of NumPy is none."""
    return isinstance(cell, list | tuple) or getattr(cell, "ndim", 0) > 0


def holdout(
    table: LabelledTable,
    columns: Sequence[str],
    fraction: float,
    seed: int,
    class_column: str = "",
    symmetric: bool = False,
) -> tuple[LabelledTable, LabelledTable]:
    """Splits rows into (train, validation). No text is in both, and all machines split alike.

    Rows with the same text form a group, and all rows of a group are in the same split. The
    comparison ignores case and white space. The groups are sorted by a hash of seed and text, and
    are held out in this order until validation has ceil(fraction * rows) rows. A group is passed
    over if it would exceed this number. If even the smallest group exceeds it, this group is held
    out alone, but only if it has at most twice the number of rows.

    Each class has the same fraction of its rows in validation, to within one row, and keeps at
    least one row for training. If the groups do not allow this, these two rules give way, in this
    order. Both splits keep the order of the rows.

    Args:
      table: the rows.
      columns: names of the columns, or expressions, whose text is compared.
      fraction: the fraction of the rows to hold out, between 0 and 1.
      seed: a number that changes the hash. Another seed holds out other rows.
      class_column: the column, or expression, of the class of a row. Validation then has about the
        same fraction of each class. An empty string means that the rows have no classes.
      symmetric: whether the order of `columns` does not matter, so that a row (a, b) has the same
        text as a row (b, a).

    Raises:
      UserError: a split would be empty, or validation would be far from the fraction.
    """
    # The source columns of each part, whose texts are compared in one order.
    parts = [table.sources([each]) for each in columns] if symmetric else [table.sources(columns)]
    compared = [[list(table.rows[name]) for name in part] for part in parts]
    groups: dict[bytes, list[int]] = {}
    for index in range(len(compared[0][0])):
        texts = (
            "\x1f".join(" ".join(as_text(cells[index]).casefold().split()) for cells in part)
            for part in compared
        )
        text = "\x1f".join(sorted(texts))
        data = f"{seed}\x1e{text}".encode(errors="surrogatepass")
        groups.setdefault(hashlib.blake2b(data, digest_size=16).digest(), []).append(index)
    count = sum(map(len, groups.values()))
    wanted = math.ceil(fraction * count)
    ordered = [groups[name] for name in sorted(groups)]
    classes = [""] * count
    if class_column:
        classes = [as_text(value).strip() for value in table.columns([class_column])[class_column]]
    held_out = _chosen(ordered, classes, wanted)
    require(
        0 < len(held_out) < count,
        f"{table.source}: cannot hold out {fraction:g} of {count} rows with {len(groups)} "
        "different texts; give a validation file",
    )
    kept = [index for index in range(count) if index not in held_out]
    parent = dataclasses.replace(table, part_of=table.source)
    return parent.select(kept), parent.select(sorted(held_out))


def _chosen(groups: Sequence[list[int]], classes: Sequence[str], wanted: int) -> set[int]:
    """Returns the rows that `holdout` holds out.

    Args:
      groups: the rows of each group, in the order in which groups are held out.
      classes: the class of each row.
      wanted: the number of rows to hold out.
    """
    sizes = collections.Counter(classes)
    shares, held = _shares(sizes, wanted), collections.Counter[str]()
    held_out: set[int] = set()

    def hold_out(limits: Mapping[str, int]) -> None:
        """Holds out all groups that fit. `limits` has the largest number of rows of each class."""
        for group in groups:
            if group[0] in held_out or len(held_out) + len(group) > wanted:
                continue
            own = collections.Counter(classes[row] for row in group)
            if all(held[name] + number <= limits[name] for name, number in own.items()):
                held.update(own)
                held_out.update(group)

    hold_out(shares)
    hold_out({name: max(size - 1, shares[name]) for name, size in sizes.items()})
    if 2 * len(held_out) < wanted:  # nearly every row has a class of its own
        hold_out(sizes)
    smallest = min(groups, key=len, default=[])
    if not held_out and len(smallest) <= 2 * wanted:
        held_out.update(smallest)
    return held_out


def _shares(sizes: collections.Counter[str], wanted: int) -> collections.Counter[str]:
    """Returns the number of rows of each class to hold out, by the method of largest remainders.

    >>> sorted(_shares(collections.Counter(a=70, b=29, c=1), 10).items())
    [('a', 7), ('b', 3), ('c', 0)]

    Args:
      sizes: the number of rows of each class.
      wanted: the number of rows to hold out, of all classes together.
    """
    total = sizes.total()
    shares = collections.Counter({name: wanted * sizes[name] // total for name in sizes})
    order = sorted(sizes, key=lambda name: (-(wanted * sizes[name] % total), name))
    for name in order[: wanted - shares.total()]:
        shares[name] += 1
    if len(sizes) > 1:
        for name, size in sizes.items():
            shares[name] = min(shares[name], size - 1)
    return shares
