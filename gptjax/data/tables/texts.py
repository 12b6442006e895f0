"""Running text: rows of strings with a fingerprint, read from files and divided for validation."""

import bisect
import dataclasses
import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, Self

import pyarrow as pa

from gptjax.config.schema import LineBreaks, split_names
from gptjax.data import cache, fingerprints
from gptjax.data.tables.files import bad_byte, read_table, require_file
from gptjax.data.tables.labelled import LabelledTable
from gptjax.errors import UserError, require

PIECE_CHARACTERS = 1 << 16
_VERSION = 1  # raise it when `read_text` makes other rows of the same files
_WORTH_CACHING = 1 << 25  # bytes: smaller files are read within a second and fit in any memory
_DOCUMENTS = (".jsonl", ".parquet")
_WRAP_SAMPLE_LINES = 20_000
_WRAP_WINDOW = 64
_ROWS_AT_ONCE = 100


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Running text. All rows, joined without a separator, are the corpus.

    Iterating yields the rows as strings, any number of times. The rows may be mapped from a file:
    only a few of them are in memory at a time.
    """

    rows: pa.ChunkedArray
    """Strings."""
    fingerprint: str
    """Names the rows: texts of equal fingerprints have equal rows. It is computed once, where the
    rows are read. Equal rows may have different fingerprints if they come from different places."""

    @classmethod
    def of(cls, rows: pa.ChunkedArray | Iterable[str]) -> Self:
        """Returns the rows with the fingerprint of their contents, for which all are read once."""
        if not isinstance(rows, pa.ChunkedArray):
            rows = pa.chunked_array([pa.array(rows, pa.string())])
        return cls(rows, fingerprints.of_texts(cls(rows, "")))

    def __iter__(self) -> Iterator[str]:
        """Yields the rows in order."""
        for batch in pa.table([self.rows], ["text"]).to_batches(max_chunksize=_ROWS_AT_ONCE):
            yield from batch["text"].to_pylist()


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
    paths = _expand(patterns)

    def make() -> Texts:
        return Texts.of(pa.chunked_array([*_row_chunks(patterns, paths, line_breaks)], pa.string()))

    def contents() -> list[tuple[bool, str]]:
        return [(path.lower().endswith(_DOCUMENTS), fingerprints.of_file(path)) for path in paths]

    def write(file: BinaryIO) -> None:
        schema = pa.schema([("text", pa.string())])
        with pa.ipc.new_file(file, schema) as writer:
            for chunk in _row_chunks(patterns, paths, line_breaks):
                writer.write_batch(pa.record_batch([chunk], schema))
        if contents() != before:
            raise OSError("a text file has changed while it was read")

    def read(path: str) -> Texts:
        return Texts(pa.ipc.open_file(pa.memory_map(path)).read_all().column("text"), name)

    if sum(map(os.path.getsize, paths)) < _WORTH_CACHING:
        return make()
    before = contents()
    # The rows of large files have no fingerprint but the name of their entry in the cache, which is
    # made of the fingerprints of the files.
    name = fingerprints.of_values("rows", _VERSION, PIECE_CHARACTERS, line_breaks, repr(before))
    return cache.get_or_make(name, ".arrow", write, read, make)


def _row_chunks(patterns: str, paths: Sequence[str], line_breaks: str) -> Iterator[pa.Array]:
    blank = True
    rows = pieces(_corpus_lines(paths, line_breaks))
    while chunk := list(itertools.islice(rows, 256)):  # at most 16 Mi characters as Python strings
        yield pa.array(chunk, pa.string())
        blank = blank and all(row.isspace() for row in chunk)
    require(not blank, f"{patterns}: no text in {len(paths)} file(s); give a file with text")


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
        LabelledTable(documents, path).require_columns(["text"])
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


def holdout_text(texts: Texts, fraction: float) -> tuple[Texts, Texts]:
    """Splits a corpus into (train, validation), which is the last `fraction` of its characters.

    The corpus is cut at int((1 - fraction) * characters). If a line ends within 1% of the corpus
    before this place, the cut is moved back to the end of that line.

    The fingerprints of the parts are derived from that of the corpus and the place of the cut,
    which determine their contents, so that the text is not read for them again.

    Raises:
      UserError: a part would be empty.
    """
    import pyarrow.compute as pc

    rows = texts.rows
    starts = [0, *itertools.accumulate(pc.utf8_length(rows).to_pylist())]
    cut = _line_start(rows, starts, int((1 - fraction) * starts[-1]), starts[-1] // 100)
    require(
        0 < cut < starts[-1],
        f"cannot hold out {fraction:g} of {starts[-1]} characters; give validation files",
    )
    divided = bisect.bisect_right(starts, cut) - 1
    text = rows[divided].as_py()
    before, after = text[: cut - starts[divided]], text[cut - starts[divided] :]
    head = [*rows.slice(0, divided).chunks, pa.array([before] if before else [], rows.type)]
    tail = [pa.array([after], rows.type), *rows.slice(divided + 1).chunks]

    def part(name: str, chunks: list[pa.Array]) -> Texts:
        fingerprint = fingerprints.of_values(name, texts.fingerprint, cut)
        return Texts(pa.chunked_array(chunks, rows.type), fingerprint)

    return part("before", head), part("after", tail)


def _line_start(rows: pa.ChunkedArray, starts: Sequence[int], cut: int, reach: int) -> int:
    """Returns the last start of a line in [cut - reach, cut], or `cut` if there is none.

    All places are characters of the corpus; row r begins at starts[r].
    """
    for row in range(bisect.bisect_left(starts, cut) - 1, -1, -1):
        start = starts[row] + rows[row].as_py().rfind("\n", 0, cut - starts[row]) + 1
        if starts[row] < start:
            return start if start >= cut - reach else cut
        if starts[row] < cut - reach:
            break
    return cut
