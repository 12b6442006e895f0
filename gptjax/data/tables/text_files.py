"""Running text from files."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

from gptjax.config.schema import LineBreaks, split_names
from gptjax.data import cache, fingerprints
from gptjax.data.tables import expressions
from gptjax.data.tables.files import bad_byte, read_table, require_file
from gptjax.data.tables.texts import Texts
from gptjax.errors import UserError, require

if TYPE_CHECKING:
    import pyarrow as pa


PIECE_CHARACTERS = 1 << 16
_VERSION = 1  # raise it when `read_text` makes other rows of the same files
_WORTH_CACHING = 1 << 25  # bytes: smaller files are read within a second and fit in any memory
_DOCUMENTS = (".jsonl", ".parquet")
_WRAP_SAMPLE_LINES = 20_000
_WRAP_WINDOW = 64


def read_text(patterns: str, line_breaks: str = LineBreaks.AUTO) -> Texts:
    """Reads text files. All rows of the result, joined, are the corpus.

    A row has at most 64 Ki characters. It ends after a line break if possible, else after a space,
    so that tokenising row by row gives the tokens of the whole text. (Text without any space in 64
    Ki characters is cut anywhere.) Files are sorted by path, and each is read once even if several
    patterns match it. A file without a final line break gets one if another file follows. The rows
    of `.jsonl` and `.parquet` files (column `text`) are documents; a blank line follows each.

    The rows of large files are kept in the cache and mapped from there into memory.

    Args:
      patterns: comma-separated names or globs; `**` matches folders of any depth.
      line_breaks: "keep": as in the file, but CRLF becomes LF. "join": the lines of a paragraph are
        joined by spaces, so that each paragraph (they are separated by blank lines) is one line.
        "auto": join the files whose lines are wrapped to a width, see `is_wrapped`.

    Raises:
      UserError: a pattern without a file, no text at all, or a byte that is not UTF-8.
    """
    import pyarrow as pa

    require(
        line_breaks in tuple(LineBreaks),
        f"line_breaks={line_breaks!r}: write one of {', '.join(LineBreaks)}",
    )
    paths = _expand(patterns)
    if sum(map(os.path.getsize, paths)) >= _WORTH_CACHING:
        texts = _cached_rows(patterns, paths, line_breaks)
        if texts is not None:
            return texts
    return Texts.of(pa.chunked_array([*_row_chunks(patterns, paths, line_breaks)], pa.string()))


def _row_chunks(patterns: str, paths: Sequence[str], line_breaks: str) -> Iterator[pa.Array]:
    import pyarrow as pa

    blank = True
    rows = pieces(_corpus_lines(paths, line_breaks))
    while chunk := list(itertools.islice(rows, 256)):  # at most 16 Mi characters as Python strings
        yield pa.array(chunk, pa.string())
        blank = blank and all(row.isspace() for row in chunk)
    require(not blank, f"{patterns}: no text in {len(paths)} file(s); give a file with text")


def _cached_rows(patterns: str, paths: Sequence[str], line_breaks: str) -> Texts | None:
    """Returns the rows, mapped from a file of the cache; None if it cannot be written.

    The entry's name is made of the fingerprints of the files, and it is the fingerprint of the
    rows.
    """
    import pyarrow as pa

    schema = pa.schema([("text", pa.string())])

    def contents() -> list[tuple[bool, str]]:
        return [(path.lower().endswith(_DOCUMENTS), fingerprints.of_file(path)) for path in paths]

    def write(file: BinaryIO) -> None:
        with pa.ipc.new_file(file, schema) as writer:
            for chunk in _row_chunks(patterns, paths, line_breaks):
                writer.write_batch(pa.record_batch([chunk], schema))
        if contents() != before:
            raise OSError("a text file has changed while it was read")

    def read(path: str) -> pa.ChunkedArray:
        return pa.ipc.open_file(pa.memory_map(path)).read_all().column("text")

    before = contents()
    name = fingerprints.of_values("rows", _VERSION, PIECE_CHARACTERS, line_breaks, repr(before))
    rows = cache.get_or_make(name, ".arrow", write, read)
    return None if rows is None else Texts(rows, name)


def is_wrapped(lines: Sequence[str]) -> bool:
    """Returns whether `lines` are prose wrapped to a width, so that line breaks have no meaning.

    Two things are true of wrapped prose. At most line breaks the next word would not have fitted on
    the line before it. And the next line continues a sentence more often than it begins one. Verse,
    code, lists, and texts of one sentence a line fail one of the two. The width is the 75th
    percentile of the line lengths nearby, because a few longer lines, or chapters of another width,
    must not hide that the lines are full.
    """
    breaks = full = continued = words = 0
    for start in range(0, len(lines), _WRAP_WINDOW):
        nearby = lines[start : start + _WRAP_WINDOW]
        lengths = sorted(len(line.rstrip()) for line in nearby if line.strip())
        for line, following in itertools.pairwise(nearby):
            if line.strip() and following.strip():
                word = following.split(maxsplit=1)[0]
                width = lengths[int(0.75 * (len(lengths) - 1))]
                breaks += 1
                full += len(line.rstrip()) + 1 + len(word) > width
                continued += not (word[0].isupper() or word[0].isdigit())
                words += len(line.split())
    # More than four words a line: DNA and base64 fill their lines too, but must not be joined.
    return breaks >= 3 and full > 0.8 * breaks and continued > 0.5 * breaks and words > 4 * breaks


def _expand(patterns: str) -> list[str]:
    """Returns the files that the patterns match, each once, sorted by path."""
    by_real_path: dict[str, str] = {}
    for pattern in split_names(patterns):
        name = os.path.expanduser(pattern)
        if os.path.isdir(name):
            raise UserError(f"{pattern}: is a folder; write {os.path.join(pattern, '**', '*.txt')}")
        # The name of an existing file is no pattern, even if it contains [ or *.
        matches = [name] if os.path.exists(name) else glob.glob(name, recursive=True)
        files = [match for match in matches if os.path.isfile(match)]
        if not files and not glob.has_magic(name):
            require_file(name)
        require(
            files, f"{pattern}: no file matches; write a file name or a glob such as texts/*.txt"
        )
        for path in sorted(files):
            by_real_path.setdefault(os.path.realpath(path), path)
    require(by_real_path, "no text files are given; write names or globs, separated by commas")
    return sorted(by_real_path.values())


def _corpus_lines(paths: Sequence[str], line_breaks: str) -> Iterator[str]:
    """Yields the lines of all files, each with its line break."""
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
        expressions.require_columns(documents.column_names, ["text"], path)
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
    """Yields each paragraph as one line; blank lines, which separate them, are left out."""
    for is_text, group in itertools.groupby(lines, lambda line: bool(line.strip())):
        if is_text:
            yield " ".join(line.strip() for line in group) + "\n"


def pieces(lines: Iterable[str]) -> Iterator[str]:
    """Yields the rows of a corpus: as many whole lines as fit in `PIECE_CHARACTERS`.

    A longer line is divided after the last space that fits, or without one if it has none.
    """
    row: list[str] = []
    size = 0
    for line in lines:
        start = 0
        while size + len(line) - start > PIECE_CHARACTERS:
            if row:
                yield "".join(row)
                row, size = [], 0
            else:
                end = start + PIECE_CHARACTERS
                cut = line.rfind(" ", start, end) + 1 or end
                yield line[start:cut]
                start = cut
        row.append(line[start:])
        size += len(line) - start
    if size:
        yield "".join(row)
