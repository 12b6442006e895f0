"""Running text from files, as a `datasets.Dataset` with one column."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

from gptjax.config.schema import LineBreaks
from gptjax.data import cache
from gptjax.data.tables.files import (
    bad_byte,
    read_table,
    require_columns,
    require_file,
    to_dataset,
)
from gptjax.errors import UserError, require

if TYPE_CHECKING:  # `datasets` takes 1.6 s to import, and `launch.py --help` needs none of it
    import pyarrow as pa
    from datasets import Dataset


PIECE_CHARACTERS = 1 << 16
_VERSION = 1  # raise it when `read_text` makes other rows of equal files
_WORTH_KEEPING = 1 << 25  # bytes: smaller files are read in a second and fit in any memory
_DOCUMENTS = (".jsonl", ".parquet")
_WRAP_SAMPLE_LINES = 20_000
_WRAP_WINDOW = 64


def read_text(patterns: str, line_breaks: str = LineBreaks.AUTO) -> Dataset:
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
        line_breaks in tuple(LineBreaks),
        f"line_breaks={line_breaks!r}: write one of {', '.join(LineBreaks)}",
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
        join = line_breaks == LineBreaks.JOIN
        if line_breaks == LineBreaks.AUTO:
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
