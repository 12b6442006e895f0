"""Tables in memory, in the forms that Python programs use.

A table is a mapping of column names to values, a list or an iterator of mappings (one mapping for
each row, such as a `csv.DictReader`), a pandas DataFrame, a pyarrow Table, a `datasets.Dataset`, or
another object that exports Arrow data, such as a polars DataFrame. The form of a table is
recognised by its methods, so pandas need not be installed.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import pyarrow as pa

from gptjax.data.tables.files import Dataset, to_dataset
from gptjax.data.tables.labelled import LabelledTable, is_missing
from gptjax.errors import UserError, require

Table = Any
"""A table in any form that this module's docstring lists."""
Columns = Mapping[str, Sequence[Any]]
"""Column name -> values, one for each row."""


class _Columns(collections.UserDict[str, Any]):
    """Column name -> values, from columns of any library (for example pandas or pyarrow).

    A column is converted to a list when it is read. Columns that are not read can contain anything.
    """

    def __getitem__(self, name: str) -> list[Any]:
        return _values(self.data[name])


def columns(table: Table, source: str, default: Sequence[str] = ()) -> Columns:
    """Returns the columns of a table as lists of Python values. Missing values become None.

    >>> dict(columns([{"text": "a", "label": 1}, {"text": "b"}], "`rows`"))
    {'text': ['a', 'b'], 'label': [1, None]}

    Args:
      table: the table, in any form that this module's docstring lists.
      source: the name of the table in error messages.
      default: the names of the columns of an empty list, which itself has no column names.

    Raises:
      UserError: the object is not a table.
    """
    if hasattr(table, "iloc") and hasattr(table, "columns"):  # pandas
        names = list(map(str, table.columns))
        _require_different(names, source)
        return _Columns({name: table.iloc[:, place] for place, name in enumerate(names)})
    if hasattr(table, "features") and hasattr(table, "column_names"):  # datasets
        require(hasattr(table, "__len__"), f"{source}: is a stream; give a datasets.Dataset")
        rows = table.with_format(None)  # another format, such as "torch", would give tensors
        return _Columns({name: rows[name] for name in rows.column_names})
    if isinstance(table, Mapping):
        # An iterator is read here, because later code reads columns several times.
        by_name = {
            str(name): list(cells) if isinstance(cells, Iterator) else cells
            for name, cells in table.items()
        }
        for name, cells in by_name.items():
            _check_column(name, cells, source)
        return _Columns(by_name)
    if hasattr(table, "__arrow_c_stream__"):
        arrow = table if isinstance(table, pa.Table) else pa.table(table)
        _require_different(arrow.column_names, source)
        return _Columns(zip(arrow.column_names, arrow.columns, strict=True))
    if isinstance(table, Sequence | Iterator) and not isinstance(table, str | bytes):
        return _of_rows(list(table), source, default)
    raise UserError(
        f"{source}: is a {type(table).__name__}; give a mapping of column names to lists, a list "
        "of mappings, a pandas DataFrame, a pyarrow Table or a datasets.Dataset"
    )


def dataset(table: Table, source: str, needed: Sequence[str]) -> Dataset:
    """Returns a `datasets.Dataset` with the columns of a table that are needed.

    Args:
      table: the table, in any form that this module's docstring lists.
      source: the name of the table in error messages.
      needed: names of columns, or expressions (see `labelled.py`).

    Raises:
      UserError: the object is not a table, a column is missing, or columns differ in length.
    """
    labelled = LabelledTable(columns(table, source), source)
    labelled.require_columns(needed)
    labelled.columns(needed)  # it raises for wrong cells and lengths
    return to_dataset(pa.table({name: _array(labelled, name) for name in labelled.sources(needed)}))


def _require_different(names: Sequence[str], source: str) -> None:
    """Raises `UserError` if two columns have the same name."""
    for name, count in collections.Counter(names).items():
        require(count == 1, f"{source}: {count} columns have the name {name!r}; rename them")


def _check_column(name: Any, cells: Any, source: str) -> None:
    """Raises `UserError` if `cells` is no column, for example one text or a whole table."""
    split = hasattr(cells, "column_names")
    require(not split, f"{source}: has several splits; give one of them, such as [{name!r}]")
    require(
        hasattr(cells, "__len__") and not isinstance(cells, str | bytes | Mapping | Set),
        f"{source}: column {name!r} is a {type(cells).__name__}; give a list with one value a row",
    )


def _of_rows(rows: Sequence[Any], source: str, default: Sequence[str]) -> Columns:
    """Returns the columns of a list of rows. A row is a mapping of column names to values."""
    for number, row in enumerate(rows, 1):
        require(
            isinstance(row, Mapping),
            f"{source}: row {number} is a {type(row).__name__}; give a mapping of column names to "
            "values",
        )
    names = dict.fromkeys([name for row in rows for name in row] or default)
    return {str(name): _values([row.get(name) for row in rows]) for name in names}


def _values(column: Any) -> list[Any]:
    """Returns a column of any library as a list. Missing values (see `is_missing`) become None."""
    for method in ("to_pylist", "tolist"):  # methods of Arrow and of NumPy
        if hasattr(column, method):
            column = getattr(column, method)()
            break
    return [None if is_missing(cell) else cell for cell in column]


def _array(table: LabelledTable, name: str) -> pa.Array:
    """Returns an Arrow array of the cells of a column.

    If the cells have several types, or no type of Arrow, they become texts. Later code
    converts cells to text or numbers in any case.
    """
    cells = list(table.rows[name])
    if len({type(cell) for cell in cells if cell is not None}) < 2:
        try:
            return pa.array(cells)
        except (ValueError, TypeError, NotImplementedError, OverflowError):  # no Arrow type
            pass
    plain = table.columns([name])[name]
    return pa.array([None if cell is None else str(cell) for cell in plain], pa.string())
