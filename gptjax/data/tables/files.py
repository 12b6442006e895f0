"""Files of labelled rows -> `datasets.Dataset`: CSV, TSV, JSON lines, Parquet.

Data is held in memory as Arrow. Nothing is cached by path, so an edited file is never answered from
a stale cache; `fingerprint` names the content. What a user can get wrong is a `UserError` of one
line with file, line and column.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gptjax.data.tables import expressions
from gptjax.errors import UserError, brief, nearest, require

if TYPE_CHECKING:  # `datasets` takes 1.6 s to import, and `launch.py --help` needs none of it
    import pyarrow as pa
    from datasets import Dataset

TABLE_ENDINGS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet")
_ROWS_AT_ONCE = 10_000


def read_table(path: str, columns: Sequence[str] = ()) -> Dataset:
    """Reads a file of rows; its ending says how.

    * `.csv`: RFC 4180 quoting. Cells are strings as written ("NA", "007" and "1.0" stay); blank
      lines are no rows.
    * `.tsv`, `.txt`: one row a line, split on tabs, no quoting at all. Blank lines at the end are
      no rows.
    * `.jsonl`, `.json`: one object a line; types are kept, a missing key is None.
    * `.parquet`: types are kept.

    Text is UTF-8, with or without a byte order mark; lines end in LF or CRLF.

    Args:
      path: the file.
      columns: names for the columns of a CSV/TSV file without a header: its first line is data.

    Raises:
      UserError: no such file, not readable as its ending says, no rows, a row with too many or too
        few cells, a column name that occurs twice.
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


def require_columns(dataset: Dataset, names: Iterable[str], path: str) -> None:
    """Checks that `dataset`, read from `path`, has all columns in `names`.

    Raises:
      UserError: names the missing column, the nearest existing one and all existing ones.
    """
    expressions.require_columns(dataset.column_names, names, path)


def text_column(dataset: Dataset, name: str) -> list[str]:
    """The cells of one column as strings, in order: None is "", numbers as Python writes them."""
    cells = dataset.select_columns(name).with_format("arrow")[:].column(name).to_pylist()
    return ["" if cell is None else str(cell) for cell in cells]


def require_file(path: str) -> None:
    """Raises `UserError`, with the nearest name in the folder, unless `path` is a file."""
    folder, name = os.path.split(path)
    require(not os.path.isdir(path), f"{path}: is a folder; write the name of a file in it")
    if not os.path.isfile(path):
        near = nearest(name, os.listdir(folder or ".") if os.path.isdir(folder or ".") else [])
        raise UserError(f"{path}: no such file{near}")


def bad_byte(path: str) -> str:
    """Says where the first byte is that is not UTF-8. Read again in binary: errors are rare."""
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                utf16 = number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff")
                hint = " (it looks like UTF-16)" if utf16 else ""
                return (
                    f"{path}, line {number}: byte 0x{byte:02x} is not UTF-8{hint}; save it as UTF-8"
                )
    return f"{path}: not UTF-8; save the file as UTF-8"


def import_datasets() -> Any:
    """The module `datasets`, imported late and without progress bars."""
    import datasets

    datasets.disable_progress_bars()  # telemetry.py owns the terminal
    return datasets


def to_dataset(table: pa.Table) -> Dataset:
    """A dataset in memory over `table`."""
    # Given a fingerprint, `datasets` does not pickle the whole table to make one of its own.
    return import_datasets().Dataset(
        import_datasets().table.InMemoryTable(table), fingerprint=_digest([table])
    )


def _delimited(path: str, ending: str, names: list[str]) -> pa.Table:
    import pyarrow as pa

    is_csv = ending == ".csv"
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses a cell over 128 KB
    try:
        # CSV sees its own line ends inside quotes; in TSV only LF ends a row (not \x85, \u2028).
        with open(path, encoding="utf-8-sig", newline="" if is_csv else "\n") as handle:
            rows = _csv_rows(handle, path) if is_csv else _tsv_rows(handle)
            source = "columns" if names else "the header"
            names = names or next(rows, (1, []))[1]
            require(names, f"{path}: the file has blank lines only; write a header and rows")
            twice = sorted({name for name in names if names.count(name) > 1})
            require(
                not twice,
                f"{path}, line 1: column {', '.join(map(repr, twice))} occurs more than once in "
                f"{source}; give each column its own name",
            )
            checked = _checked(rows, len(names), path, source, is_csv)
            tables = [pa.schema([(name, pa.string()) for name in names]).empty_table()]
            while chunk := list(itertools.islice(checked, _ROWS_AT_ONCE)):
                cells = [pa.array(column, pa.string()) for column in zip(*chunk, strict=True)]
                tables.append(pa.table(cells, names=names))
    finally:
        csv.field_size_limit(limit)
    return pa.concat_tables(tables)


def _csv_rows(handle: Iterable[str], path: str) -> Iterator[tuple[int, list[str]]]:
    """Yields (line where the row starts, cells). Strict: a stray quote must not swallow rows."""
    reader = csv.reader(handle, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path}, line {line}: {error} in the row that starts here; put quotes around the "
                'whole cell and write a quote inside it as "", or save as .tsv (no quoting)'
            ) from error
        if cells:
            yield line, cells


def _tsv_rows(handle: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yields (line, cells). A blank line counts as a row only if another row comes after it."""
    blank: list[int] = []
    for number, line in enumerate(handle, start=1):
        line = line.removesuffix("\n").removesuffix("\r")
        if not line:
            blank.append(number)
            continue
        yield from ((before, [""]) for before in blank)
        blank.clear()
        yield number, line.split("\t")


def _checked(
    rows: Iterable[tuple[int, list[str]]], width: int, path: str, source: str, is_csv: bool
) -> Iterator[list[str]]:
    advice = "put quotes around a cell with a comma" if is_csv else "a cell cannot hold a tab"
    for line, cells in rows:
        if len(cells) != width:
            few = "few" if len(cells) < width else "many"
            raise UserError(
                f"{path}, line {line}: too {few} cells, {len(cells)} where {source} has {width}; "
                f"{advice}"
            )
        yield cells


def _json_lines(path: str) -> pa.Table:
    """Chunks of rows become Arrow tables; types are unified at the end: int and float is float."""
    import pyarrow as pa

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
                kind = {list: "array", str: "string", type(None): "null"}.get(type(row), "number")
                raise UserError(
                    f"{path}, line {number}: a JSON {kind}, not an object; "
                    'write one object a line, such as {"text": "...", "label": "..."}'
                )
            yield number, row


def _json_column(chunk: list[tuple[int, dict[str, Any]]], name: str, path: str) -> pa.Array:
    import pyarrow as pa

    try:
        return pa.array([row.get(name) for _, row in chunk])
    except (ValueError, TypeError, OverflowError) as error:
        kinds: dict[type, int] = {}
        for line, row in chunk:
            if row.get(name) is not None:
                kinds.setdefault(type(row[name]), line)
        found = ", ".join(f"{kind.__name__} (line {line})" for kind, line in kinds.items())
        raise UserError(
            f"{path}, column {name!r}: cannot keep {found} in one column ({brief(error)}); "
            "write all its values in one type"
        ) from error


def _parquet(path: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({brief(error)})") from error
    for index, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):  # pandas' category: `datasets` has no such type
            plain = table.column(index).cast(field.type.value_type)
            table = table.set_column(index, field.name, plain)
    return table


def fingerprint(dataset: Dataset) -> str:
    """Names the content: 32 hexadecimal digits of a hash over column names, types and all values.

    The same on every machine and in every process; paths, times and the way Arrow cuts columns into
    chunks do not matter, the order of rows does.
    """
    return _digest(dataset.with_format("arrow").iter(_ROWS_AT_ONCE))


def _digest(tables: Iterable[pa.Table]) -> str:
    # One stream a column for null marks, lengths and values each: chunks leave no trace in them.
    streams: dict[tuple[str, str], Any] = {}
    for table in tables:
        for name, column in zip(table.column_names, table.columns, strict=True):
            for chunk in column.chunks:
                for part, data in _buffers(chunk).items():
                    streams.setdefault((name, part), hashlib.blake2b()).update(data)
    whole = hashlib.blake2b(digest_size=16)
    for key, stream in streams.items():
        whole.update(json.dumps(key).encode() + stream.digest())
    return whole.hexdigest()


def _buffers(array: pa.Array) -> dict[str, Any]:
    """The bytes that make up `array`, the same for equal values however they are stored."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = pa.types
    valid = {"valid": array.is_valid().to_numpy(zero_copy_only=False).tobytes()}
    if kind.is_string(array.type) or kind.is_large_string(array.type):
        array = array.fill_null("").cast(pa.large_string())
        lengths = pc.binary_length(array).to_numpy().tobytes()
        offsets = np.frombuffer(array.buffers()[1], np.int64)[array.offset :][: len(array) + 1]
        data = memoryview(array.buffers()[2] or b"")[offsets[0] : offsets[-1]]
        return valid | {"text lengths": lengths, "text": data}
    if kind.is_integer(array.type) or kind.is_floating(array.type):
        values = array.fill_null(0).to_numpy(zero_copy_only=False)
        return valid | {str(array.type): values.tobytes()}
    # Lists, structs, times: rare and small here, so by way of Python values.
    rows = (json.dumps(each, sort_keys=True, default=repr) + "\n" for each in array.to_pylist())
    return valid | {"objects": "".join(rows).encode()}
