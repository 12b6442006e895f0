"""Everything text and labelled rows come from: files, globs of text, the Hugging Face hub.

All functions return a `datasets.Dataset`. Files of rows are read in `tables.py`; here are running
text, the hub, and what holds a part out for validation.
"""

from __future__ import annotations

import bisect
import glob
import hashlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

from gptjax.config.schema import LINE_BREAKS
from gptjax.data import cache
from gptjax.data.tables.files import (
    bad_byte,
    fingerprint,
    import_datasets,
    one_line,
    read_table,
    require_columns,
    require_file,
    text_column,
    to_dataset,
)
from gptjax.errors import UserError, nearest, require

if TYPE_CHECKING:  # `datasets` takes 1.6 s to import, and `launch.py --help` needs none of it
    import pyarrow as pa
    from datasets import Dataset

__all__ = [
    "fingerprint",
    "holdout",
    "holdout_text",
    "is_wrapped",
    "load_hub",
    "pieces",
    "read_table",
    "read_text",
    "require_columns",
    "text_column",
]

PIECE_CHARACTERS = 1 << 16
_VERSION = 1  # raise it when `read_text` makes other rows of equal files
_WORTH_KEEPING = 1 << 25  # bytes: smaller files are read in a second and fit in any memory
_DOCUMENTS = (".jsonl", ".parquet")
_WRAP_SAMPLE_LINES = 20_000
_WRAP_WINDOW = 64


def read_text(patterns: str, line_breaks: str = "auto") -> Dataset:
    """Reads text files into a dataset with the column `text`; all rows concatenated are the corpus.

    A row is a piece of at most 64 Ki characters that ends at a line break where there is one, else
    after a space: tokenising row by row is tokenising the whole. Files come sorted by path, each
    once; a file that does not end in a line break gets one if another follows. The rows of `.jsonl`
    and `.parquet` files are documents (column `text`), with a blank line after each.

    Large files are read once: their rows are kept in the cache, and read from there as needed.

    Args:
      patterns: comma-separated names or globs; `**` matches folders of any depth.
      line_breaks: "keep": as in the file (CRLF becomes LF). "join": lines of a paragraph are joined
        by one space, paragraphs (separated by blank lines) become one line each. "auto": join the
        files that are hard-wrapped, see `is_wrapped`.

    Raises:
      UserError: a pattern without a file, no text at all, or a byte that is not UTF-8.
    """
    import pyarrow as pa

    require(
        line_breaks in LINE_BREAKS,
        f"line_breaks={line_breaks!r}: write one of {', '.join(LINE_BREAKS)}",
    )
    paths = _expand(patterns)
    table = None
    if sum(map(os.path.getsize, paths)) >= _WORTH_KEEPING:
        table = _kept_rows(patterns, paths, line_breaks)
    if table is None:
        table = pa.Table.from_batches(_row_batches(patterns, paths, line_breaks), _schema())
    return to_dataset(table)


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([("text", pa.string())])


def _row_batches(patterns: str, paths: Sequence[str], line_breaks: str) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    blank = True
    rows = pieces(_corpus_lines(paths, line_breaks))
    while chunk := list(itertools.islice(rows, 256)):  # at most 16 Mi characters as Python strings
        yield pa.record_batch([pa.array(chunk, pa.string())], _schema())
        blank = blank and all(row.isspace() for row in chunk)
    require(not blank, f"{patterns}: no text in {len(paths)} file(s); give a file with text")


def _kept_rows(patterns: str, paths: Sequence[str], line_breaks: str) -> pa.Table | None:
    """The rows as a file of the cache, mapped into memory; None where it cannot be written."""
    import pyarrow as pa

    def contents() -> list[tuple[bool, str]]:
        return [(path.lower().endswith(_DOCUMENTS), cache.file_digest(path)) for path in paths]

    def write(file: BinaryIO) -> None:
        with pa.ipc.new_file(file, _schema()) as writer:
            for batch in _row_batches(patterns, paths, line_breaks):
                writer.write_batch(batch)
        if contents() != before:
            raise OSError("a text file has changed while it was read")

    def read(path: str) -> pa.Table:
        return pa.ipc.open_file(pa.memory_map(path)).read_all()

    before = contents()
    name = cache.key("rows", _VERSION, PIECE_CHARACTERS, line_breaks, repr(before))
    return cache.kept(name, ".arrow", write, read)


def is_wrapped(lines: Sequence[str]) -> bool:
    """Whether `lines` are prose wrapped to a width, so that line breaks carry no meaning.

    Where a wrapped paragraph breaks, the next word would not have fitted on the line (up to the
    width), and it goes on in the middle of a sentence more often than not. Verse, code, lists and
    one sentence a line fail one or the other. The width is the 75th percentile of line lengths
    nearby: a few longer lines and chapters of another width must not hide that lines are full.
    """
    breaks = full = goes_on = words = 0
    for start in range(0, len(lines), _WRAP_WINDOW):
        nearby = lines[start : start + _WRAP_WINDOW]
        lengths = sorted(len(line.rstrip()) for line in nearby if line.strip())
        for line, following in itertools.pairwise(nearby):
            if line.strip() and following.strip():
                word = following.split(maxsplit=1)[0]
                width = lengths[int(0.75 * (len(lengths) - 1))]
                breaks += 1
                full += len(line.rstrip()) + 1 + len(word) > width
                goes_on += not (word[0].isupper() or word[0].isdigit())
                words += len(line.split())
    # Four words a line: DNA and base64 fill their lines too, but must not be joined.
    return breaks >= 3 and full > 0.8 * breaks and goes_on > 0.5 * breaks and words > 4 * breaks


def _expand(patterns: str) -> list[str]:
    found: dict[str, str] = {}
    for pattern in filter(None, (each.strip() for each in patterns.split(","))):
        name = os.path.expanduser(pattern)
        if os.path.isdir(name):
            raise UserError(f"{pattern}: is a folder; write {os.path.join(pattern, '**', '*.txt')}")
        # A name that exists is taken as it is, even if it has [ or * in it.
        matches = [name] if os.path.exists(name) else glob.glob(name, recursive=True)
        files = [match for match in matches if os.path.isfile(match)]
        if not files and not glob.has_magic(name):
            require_file(name)
        require(
            files, f"{pattern}: no file matches; write a file name or a glob such as texts/*.txt"
        )
        for path in sorted(files):
            found.setdefault(os.path.realpath(path), path)
    require(found, "no text files are given; write names or globs, separated by commas")
    return sorted(found.values())


def _corpus_lines(paths: Sequence[str], line_breaks: str) -> Iterator[str]:
    last = "\n"
    for path in paths:
        if not last.endswith("\n"):
            yield "\n"
        join = line_breaks == "join"
        if line_breaks == "auto":
            join = is_wrapped(list(itertools.islice(_lines(path), _WRAP_SAMPLE_LINES)))
        last = "\n"
        for last in _joined(_lines(path)) if join else _lines(path):
            yield last


def _lines(path: str) -> Iterator[str]:
    if path.lower().endswith(_DOCUMENTS):
        documents = read_table(path)
        require_columns(documents, ["text"], path)
        for batch in documents.select_columns("text").iter(1000):
            for text in batch["text"]:
                yield from (line + "\n" for line in f"{text or ''}\n".split("\n"))
        return
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as handle:
            for line in handle:
                yield line[:-2] + "\n" if line.endswith("\r\n") else line
    except UnicodeDecodeError as error:
        raise UserError(bad_byte(path)) from error


def _joined(lines: Iterable[str]) -> Iterator[str]:
    for is_text, group in itertools.groupby(lines, lambda line: bool(line.strip())):
        if is_text:
            yield " ".join(line.strip() for line in group) + "\n"


def pieces(lines: Iterable[str]) -> Iterator[str]:
    """Rows of a corpus: lines put together up to `PIECE_CHARACTERS`, longer ones cut at a space."""
    held: list[str] = []
    size = 0
    for line in lines:
        start = 0
        while size + len(line) - start > PIECE_CHARACTERS:
            if held:
                yield "".join(held)
                held, size = [], 0
            else:
                end = start + PIECE_CHARACTERS
                cut = line.rfind(" ", start, end) + 1 or end
                yield line[start:cut]
                start = cut
        held.append(line[start:])
        size += len(line) - start
    if size:
        yield "".join(held)


def load_hub(spec: str, split: str) -> Dataset:
    """Loads one split of a data set from the Hugging Face hub, or of a local folder of data files.

    Args:
      spec: "owner/name", "owner/name:config" or a folder.
      split: such as "train"; slices such as "train[:1000]" work too.

    Raises:
      UserError: not found, offline, an unknown split (names those that exist), or a data set that
        needs its own code to load (never run here).
    """
    datasets = import_datasets()
    name, _, config = spec.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # whatever a remote data set or the network does wrong
        try:
            offline = isinstance(error, ConnectionError)
            splits = [] if offline else datasets.get_dataset_split_names(name, config or None)
        except Exception:
            splits = []
        if splits and split.partition("[")[0] not in splits:
            message = f"no split {split!r}{nearest(split, splits)}; it has {', '.join(splits)}"
        else:
            message = f"cannot load split {split!r} ({type(error).__name__}: {one_line(error)})"
            message += "; check the name and the network, or give files instead"
        raise UserError(f"data set {spec}: {message}") from error


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
