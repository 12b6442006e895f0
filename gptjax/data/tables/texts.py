"""Running text: its reading from files, and its division into train and validation.

Running text is stored as rows. A row is a piece of text, mostly of many lines.
"""

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
from gptjax.data.tables.labelled import LabelledTable, as_text
from gptjax.errors import UserError, require

PIECE_CHARACTERS = 1 << 16
_VERSION = 2  # raise it when `read_text` makes other rows from the same files
_WORTH_CACHING = 1 << 25  # in bytes. Smaller files are read within a second
_DOCUMENTS = (".jsonl", ".parquet")
_WRAP_SAMPLE_LINES = 20_000
_WRAP_WINDOW = 64
_ROWS_AT_ONCE = 100
_DOCUMENTS_AT_ONCE = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Running text. The corpus is all rows, joined without a separator.

    Iteration yields the rows as strings and can be repeated. The rows can be mapped from a file, so
    that only a few rows are in memory at a time.
    """

    rows: pa.ChunkedArray
    """The rows, as strings."""
    fingerprint: str
    """A hash that identifies the rows. Texts with equal fingerprints have equal rows. The reverse
    is not true: equal rows from different sources can have different fingerprints, because the
    fingerprint is computed either from the rows or from the files that contain them."""

    @classmethod
    def of(cls, rows: pa.ChunkedArray | Iterable[str]) -> Self:
        """Returns the rows with a fingerprint of their contents. All rows are read for this."""
        if not isinstance(rows, pa.ChunkedArray):
            rows = pa.chunked_array([pa.array(rows, pa.string())])
        return cls(rows, fingerprints.of_texts(cls(rows, "")))

    def __iter__(self) -> Iterator[str]:
        """Yields the rows in order."""
        for batch in pa.table([self.rows], ["text"]).to_batches(max_chunksize=_ROWS_AT_ONCE):
            yield from batch["text"].to_pylist()


def read_text(patterns: str, line_breaks: str = LineBreaks.AUTO) -> Texts:
    """Reads text files.

    A row of the result has at most 64 Ki (65,536) characters. It ends after a line break if
    possible, else after a space. So the tokens of the rows together are the tokens of the whole
    text. (If there is no space in 64 Ki characters, the text is divided anywhere.)

    Files are sorted by path. A file is read once, even if several patterns match it. If a file does
    not end with a line break and another file follows, a line break is added. Each row of the
    column `text` in `.jsonl` and `.parquet` files is a document. A blank line is added after it.

    If the files are large together, their rows are kept in the cache and mapped from there into
    memory.

    Args:
      patterns: comma-separated names or globs. `**` matches folders of any depth.
      line_breaks: "keep", "join" or "auto". With "keep", line breaks are kept, but CRLF becomes LF.
        With "join", the lines of each paragraph are joined with spaces, and blank lines are
        removed. "auto" means "join" for files whose lines are wrapped to a width (see `is_wrapped`)
        and "keep" for other files.

    Raises:
      UserError: a pattern matches no file, there is no text, or a byte is not UTF-8.
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
    # The name of the cache entry is a hash of the fingerprints of the files. It is also used as the
    # fingerprint of the rows, so the rows themselves need not be hashed.
    name = fingerprints.of_values("rows", _VERSION, PIECE_CHARACTERS, line_breaks, repr(before))
    return cache.get_or_make(name, ".arrow", write, read, make)


def _row_chunks(patterns: str, paths: Sequence[str], line_breaks: str) -> Iterator[pa.Array]:
    blank = True
    rows = pieces(_corpus_lines(paths, line_breaks))
    while chunk := list(itertools.islice(rows, 256)):  # at most 16 Mi characters
        yield pa.array(chunk, pa.string())
        blank = blank and all(row.isspace() for row in chunk)
    require(not blank, f"{patterns}: no text in {len(paths)} file(s); give a file with text")


def is_wrapped(lines: Sequence[str]) -> bool:
    """Returns whether `lines` are prose wrapped to a width, whose line breaks have no meaning.

    Wrapped prose has two properties. At most line breaks, the first word of the next line would not
    have fitted on the line before. And most lines begin inside a sentence. Verse, code, lists, and
    texts with one sentence a line lack one of these properties. The width is estimated as the 75th
    percentile of the lengths of nearby lines. So it does not matter if a few lines are longer, or
    if chapters have other widths.
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
    # Wrapped prose also has more than four words a line. DNA and base64 have full lines too, but
    # their lines must not be joined.
    return breaks >= 3 and full > 0.8 * breaks and continued > 0.5 * breaks and words > 4 * breaks


def _expand(patterns: str) -> list[str]:
    """Returns the distinct files that the patterns match, sorted by path."""
    by_real_path: dict[str, str] = {}
    for pattern in split_names(patterns):
        name = os.path.expanduser(pattern)
        if os.path.isdir(name):
            raise UserError(f"{pattern}: is a folder; write {os.path.join(pattern, '**', '*.txt')}")
        # If a file with this name exists, the name is no pattern, even if it contains [ or *.
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
    """Yields the lines of all files with their line breaks."""
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
        first = 1
        for batch in documents.select_columns("text").iter(_DOCUMENTS_AT_ONCE):
            numbers = range(first, first + _DOCUMENTS_AT_ONCE)
            table = LabelledTable(batch, path, numbers=numbers)
            first += _DOCUMENTS_AT_ONCE
            for text in table.columns(["text"])["text"]:
                yield from (line + "\n" for line in f"{as_text(text)}\n".split("\n"))
        return
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as handle:
            for line in handle:
                yield line[:-2] + "\n" if line.endswith("\r\n") else line
    except UnicodeDecodeError as error:
        raise UserError(bad_byte(path)) from error


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """Yields each paragraph as one line. Blank lines, which separate paragraphs, are left out."""
    for is_text, group in itertools.groupby(lines, lambda line: bool(line.strip())):
        if is_text:
            yield " ".join(line.strip() for line in group) + "\n"


def pieces(lines: Iterable[str]) -> Iterator[str]:
    """Yields the rows of a corpus. A row has as many whole lines as fit in `PIECE_CHARACTERS`.

    A longer line is divided after the last space that fits. If no space fits, it is divided inside
    a word.
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
    """Splits a corpus into (train, validation). Validation is about the last `fraction` of it.

    The corpus is divided at character int((1 - fraction) * characters). If a line ends at most 1%
    of the corpus before this character, the corpus is divided at the end of that line instead.

    The fingerprint of a part is a hash of the fingerprint of the corpus and of the character at
    which it is divided. These two determine the contents, so the text is not read again.

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

    All positions are counted in characters of the corpus. Row r begins at starts[r].
    """
    for row in range(bisect.bisect_left(starts, cut) - 1, -1, -1):
        start = starts[row] + rows[row].as_py().rfind("\n", 0, cut - starts[row]) + 1
        if starts[row] < start:
            return start if start >= cut - reach else cut
        if starts[row] < cut - reach:
            break
    return cut
