"""Readers of labelled rows, which return a `datasets.Dataset`.

They read CSV, TSV, JSON lines and Parquet files, and data sets of the Hugging Face hub.

This module has its own readers of CSV and JSON lines, because the readers of pyarrow change data
silently. They turn strings that look like dates into times, and large integers into floats. They
accept stray quotes and repeated column names, and their messages do not name the line of the file.

Files are not cached, so an edited file is read again. If a file is wrong, a `UserError` of one line
names the file and, if possible, the line and the column.
"""

import csv
import itertools
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from gptjax.errors import UserError, brief, nearest, require

Dataset = Any
"""A `datasets.Dataset`. The library is imported only when it is used, because its import takes
1.6 s."""
TABLE_ENDINGS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet")
_ROWS_AT_ONCE = 10_000


def read_table(path: str, columns: Sequence[str] = ()) -> Dataset:
    """Reads a file of rows. The ending of its name says its format.

    * `.csv`: quoting follows RFC 4180. Cells are strings as written ("NA", "007" and "1.0" are not
      changed).
    * `.tsv`, `.txt`: each line is a row, which is split at tabs. Quotes have no meaning.
    * `.jsonl`, `.json`: each line is an object. Types are kept. A missing key becomes None.
    * `.parquet`: types are kept.

    Text is UTF-8, with or without a byte order mark. Lines end in LF or CRLF.

    A blank line of a CSV or TSV file with one column is a row with an empty cell. If the file has
    more columns, a blank line is no row. A CSV file may have blank lines anywhere, and a TSV file
    at its end.

    Args:
      path: the file.
      columns: the column names of a CSV or TSV file without a header. The first line of such a file
        is data. An empty sequence means that the file has a header.

    Raises:
      UserError: there is no such file, its contents do not match its ending, it has no rows, a row
        has too many or too few cells, a column name occurs twice, or `columns` are given and the
        file has them in a header.
    """
    require_file(path)
    ending = os.path.splitext(path)[1].lower()
    require(
        ending in TABLE_ENDINGS,
        f"{path}: cannot read rows from {ending or 'a name without ending'!r}; "
        f"write a file ending in one of {', '.join(TABLE_ENDINGS)}",
    )
    require(os.path.getsize(path) > 0, f"{path}: the file is empty; write a header and rows")
    delimited = ending in (".csv", ".tsv", ".txt")
    require(
        delimited or not columns,
        f"{path}: columns {', '.join(columns)} are given, but a {ending} file names its own; "
        "leave columns empty",
    )
    if ending == ".parquet":
        table = _parquet(path)
    else:
        try:
            table = _delimited(path, ending, list(columns)) if delimited else _json_lines(path)
        except UnicodeDecodeError as error:
            raise UserError(bad_byte(path)) from error
    require(table.num_rows > 0, f"{path}: no rows after the header; add at least one")
    return to_dataset(table)


def require_file(path: str) -> None:
    """Raises `UserError` if `path` is no file. The message offers the nearest existing name."""
    folder, name = os.path.split(path)
    require(not os.path.isdir(path), f"{path}: is a folder; write the name of a file in it")
    if not os.path.isfile(path):
        near = nearest(name, os.listdir(folder or ".") if os.path.isdir(folder or ".") else [])
        raise UserError(f"{path}: no such file{near}")


def bad_byte(path: str) -> str:
    """Returns an error message about the first byte of a file that is not UTF-8.

    Python's error does not name the line. Therefore the file is read a second time here, as bytes.
    """
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                utf16 = number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff")
                hint = " (it looks like UTF-16)" if utf16 else ""
                where = f"{path}, line {number}"
                return f"{where}: byte 0x{byte:02x} is not UTF-8{hint}; save it as UTF-8"
    return f"{path}: not UTF-8; save the file as UTF-8"


def import_datasets() -> Any:
    """Imports the library `datasets`, switches off its progress bars, and returns it."""
    import datasets

    # The progress bars would mix with the progress line of the training run.
    datasets.disable_progress_bars()
    return datasets


def to_dataset(table: pa.Table) -> Dataset:
    """Returns a `datasets.Dataset` that uses the memory of `table`."""
    datasets = import_datasets()
    # Without a given fingerprint, `datasets` would pickle and hash the whole table. A random
    # fingerprint is enough, because these tables are never looked up in a cache of `datasets`.
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=uuid.uuid4().hex)


def _require_distinct(names: Sequence[str], where: str, names_from: str) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    require(
        not repeated,
        f"{where}: column {', '.join(map(repr, repeated))} occurs more than once in {names_from}; "
        "give each column its own name",
    )


def _delimited(path: str, ending: str, names: list[str]) -> pa.Table:
    is_csv = ending == ".csv"
    limit = csv.field_size_limit(2**31 - 1)  # the default limit of a cell is 128 KB
    try:
        # The CSV reader finds the line ends itself, because quoted cells can contain line breaks.
        # In TSV, rows are split at LF only. Python's universal newlines would also split at a
        # single CR.
        with open(path, encoding="utf-8-sig", newline="" if is_csv else "\n") as handle:
            lines = _csv_rows(handle, path) if is_csv else _tsv_rows(handle)
            names_from = "columns" if names else "the header"
            names = names or next((cells for _, cells in lines if cells), [])
            require(names, f"{path}: the file has blank lines only; write a header and rows")
            _require_distinct(names, f"{path}, line 1", names_from)
            rows = _with_blank_cells(lines) if len(names) == 1 else _without_blank(lines, is_csv)
            checked = _checked(rows, names, path, names_from, is_csv)
            tables = [pa.schema([(name, pa.string()) for name in names]).empty_table()]
            while chunk := list(itertools.islice(checked, _ROWS_AT_ONCE)):
                cells = [pa.array(column, pa.string()) for column in zip(*chunk, strict=True)]
                tables.append(pa.table(cells, names=names))
    finally:
        csv.field_size_limit(limit)
    return pa.concat_tables(tables)


def _csv_rows(handle: Iterable[str], path: str) -> Iterator[tuple[int, list[str]]]:
    """Yields (number of the line where the row starts, cells). A blank line has no cells.

    The reader is strict, because otherwise a stray quote would silently join rows.
    """
    reader = csv.reader(handle, strict=True)
    line = 1
    try:
        for cells in reader:
            yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, line {line}: {error} in the row that starts here; put quotes around the "
            'whole cell and write a quote inside it as "", or save as .tsv (no quoting)'
        ) from error


def _tsv_rows(handle: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, cells). A blank line has no cells."""
    for number, line in enumerate(handle, start=1):
        line = line.removesuffix("\n").removesuffix("\r")
        yield number, line.split("\t") if line else []


def _with_blank_cells(lines: Iterable[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    """Yields the lines. A blank line becomes a row with one empty cell."""
    for number, cells in lines:
        yield number, cells or [""]


def _without_blank(
    lines: Iterable[tuple[int, list[str]]], anywhere: bool
) -> Iterator[tuple[int, list[str]]]:
    """Yields the lines without blank lines: those at the end only, or those anywhere."""
    blank: list[tuple[int, list[str]]] = []
    for number, cells in lines:
        if cells:
            yield from blank
            blank.clear()
            yield number, cells
        elif not anywhere:
            blank.append((number, [""]))


def _checked(
    rows: Iterable[tuple[int, list[str]]],
    names: Sequence[str],
    path: str,
    names_from: str,
    is_csv: bool,
) -> Iterator[list[str]]:
    """Yields the cells of each row.

    Raises:
      UserError: a row does not have a cell for each name, or the first row has the names as cells.
    """
    advice = "put quotes around a cell with a comma" if is_csv else "a cell cannot hold a tab"
    is_header = names_from == "columns"
    for line, cells in rows:
        if is_header and [cell.strip() for cell in cells] == list(names):
            raise UserError(
                f"{path}, line {line}: is a header with the names {', '.join(names)}; remove "
                "this line, or leave columns empty in the training"
            )
        is_header = False
        if len(cells) != len(names):
            few = "few" if len(cells) < len(names) else "many"
            raise UserError(
                f"{path}, line {line}: too {few} cells, {len(cells)} where {names_from} has "
                f"{len(names)}; {advice}"
            )
        yield cells


def _json_lines(path: str) -> pa.Table:
    """Returns all rows. A column with both integers and floats becomes a column of floats."""
    tables = []
    rows = _json_rows(path)
    while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        names = dict.fromkeys(name for _, row in chunk for name in row)
        tables.append(pa.table({name: _json_column(chunk, name, path) for name in names}))
    require(tables, f"{path}: the file has blank lines only; write one JSON object a line")
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: a column changes its type: {brief(error)}") from error


def _json_rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, row). Raises `UserError` if a line is not a JSON object."""
    with open(path, encoding="utf-8-sig", newline="\n") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}, line {number}: not JSON ({brief(error)}); "
                    "write one JSON object a line"
                ) from error
            if not isinstance(row, dict):
                value = {list: "array", str: "string", type(None): "null"}.get(type(row), "number")
                raise UserError(
                    f"{path}, line {number}: a JSON {value}, not an object; "
                    'write one object a line, such as {"text": "...", "label": "..."}'
                )
            yield number, row


def _json_column(chunk: list[tuple[int, dict[str, Any]]], name: str, path: str) -> pa.Array:
    try:
        return pa.array([row.get(name) for _, row in chunk])
    except (ValueError, TypeError, OverflowError) as error:
        first_lines: dict[type, int] = {}
        for line, row in chunk:
            if row.get(name) is not None:
                first_lines.setdefault(type(row[name]), line)
        types = ", ".join(f"{each.__name__} (line {line})" for each, line in first_lines.items())
        raise UserError(
            f"{path}, column {name!r}: cannot keep {types} in one column ({brief(error)}); "
            "write all its values in one type"
        ) from error


def _parquet(path: str) -> pa.Table:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({brief(error)})") from error
    _require_distinct(table.column_names, path, "the file")
    # `datasets` writes the types of its columns there, and refuses types that it does not know.
    table = table.replace_schema_metadata(None)
    for index, field in enumerate(table.schema):
        if _has_no_type_in_datasets(field.type):
            # If such a column is needed, its cells are refused later, because they are lists.
            cells = [
                None if cell is None else [str(cell)] for cell in table.column(index).to_pylist()
            ]
            table = table.set_column(index, field.name, pa.array(cells, pa.list_(pa.string())))
        # Columns of categories, which pandas writes, become plain values, because `datasets` does
        # not support them.
        if pa.types.is_dictionary(field.type):
            plain = table.column(index).cast(field.type.value_type)
            table = table.set_column(index, field.name, plain)
    return table


def _has_no_type_in_datasets(kind: pa.DataType) -> bool:
    return pa.types.is_map(kind) or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)


def load_hub(name: str, split: str) -> Dataset:
    """Loads one split of a data set from the Hugging Face hub or a local folder of data files.

    Args:
      name: "owner/name", "owner/name:config" or the path of a folder.
      split: the name of a split such as "train", or a part of a split such as "train[:1000]".

    Raises:
      UserError: there is no such data set, no network or no such split (the message lists the
        existing splits), or the data set can be loaded only with its own code, which is never run.
    """
    datasets = import_datasets()
    repository, _, config = name.partition(":")
    try:
        return datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:  # data sets and the network raise exceptions of many types
        try:
            offline = isinstance(error, ConnectionError)
            splits = [] if offline else datasets.get_dataset_split_names(repository, config or None)
        except Exception:
            splits = []
        if splits and split.partition("[")[0] not in splits:
            message = f"no split {split!r}{nearest(split, splits)}; it has {', '.join(splits)}"
        else:
            message = f"cannot load split {split!r} ({brief(error)})"
            message += "; check the name and the network, or give files instead"
        raise UserError(f"data set {name}: {message}") from error
