"""Built-in data, without a download: running text and four labelled tasks.

All of it comes from the docstrings that `corpus.py` collects from the Python standard library, and
all of it is split in the same way, by module. No text is in two splits.

No text alone tells the answer of a labelled task. In `entailment` and `similarity` each text occurs
once with label 1 and once with label 0. In `multiple_choice` each docstring is right once and wrong
three times. All labels are equally frequent. A wrong partner comes from the same split, has about
the same length, and mostly comes from the same or a neighbouring module. A docstring may contain
the name of its function, as it does in real life. But a signature that opens a docstring
("find(sub) -> int") is removed.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import pyarrow as pa

from gptjax.config.schema import TaskKind
from gptjax.data.builtin.corpus import Entry, name_hash, plain, read_entries, without_signature
from gptjax.data.tables.files import Dataset, to_dataset
from gptjax.data.tables.texts import Texts, pieces
from gptjax.errors import require

SPLITS = ("train", "validation", "test")
TASKS = (
    TaskKind.CLASSIFICATION, TaskKind.ENTAILMENT, TaskKind.SIMILARITY, TaskKind.MULTIPLE_CHOICE,
)  # fmt: skip

_TASK_CHARACTERS = 400
_MIN_TASK_CHARACTERS = 20
_CLASSES = 10
_PARTNER_BLOCK = 48
_SENTENCE_END = re.compile(r"[.!?:;][\"')\]]*\s+(?=\S)")


def builtin_text(split: str) -> Texts:
    """Returns running text in rows like those of `read_text`.

    A document is a module in the layout of `help()` (each signature above its docstring), or a
    topic of the language reference. A blank line ends it. A wrapped paragraph is one line.

    Args:
      split: "train" (about 80% of the volume), "validation" or "test".

    Raises:
      UserError: no such split, or a Python installation without its sources.
    """
    documents: dict[str, list[str]] = defaultdict(list)
    for entry in _of_split(read_entries(), split):
        text = f"{entry.signature}\n{_unwrap(entry.doc)}".strip("\n")
        documents[entry.unit].append(f"{text}\n\n")
    # The order of a hash mixes topics and modules, so that every part of the text is a mixture.
    order = sorted(documents, key=name_hash)
    lines = (f"{line}\n" for unit in order for line in "".join(documents[unit]).split("\n")[:-1])
    return Texts.of(pieces(lines))


def builtin_task(name: str, split: str) -> Dataset:
    """Returns the labelled rows of one task.

    * `classification`: `text` is a docstring, `label` is its package, a string.
    * `entailment`: `text` is a signature, `text_pair` a docstring; `label` is 1 if the docstring
      describes the signature, else 0.
    * `multiple_choice`: `text` is a signature, `choice1` to `choice4` are docstrings; `label` is
      the right one, 0 to 3.
    * `similarity`: `text` and `text_pair` are parts of docstrings; `label` is 1 if both are parts
      of the same docstring, else 0.

    Args:
      name: one of `TASKS`.
      split: one of `SPLITS`.

    Raises:
      UserError: no such task or split, or a Python installation without its sources.
    """
    require(name in TASKS, f"built-in task {name!r}: write one of {', '.join(TASKS)}")
    if name == TaskKind.CLASSIFICATION:
        rows = _classification(read_entries(), split)
    else:
        pairs = _halves if name == TaskKind.SIMILARITY else _described
        own = _of_split(pairs(read_entries()), split)
        rows = _choice_rows(own) if name == TaskKind.MULTIPLE_CHOICE else _pair_rows(own)
    rows.sort(key=lambda row: name_hash(repr(row)))
    return to_dataset(pa.Table.from_pylist(rows))


def _of_split(entries: Sequence[Entry], split: str) -> list[Entry]:
    require(split in SPLITS, f"built-in split {split!r}: write one of {', '.join(SPLITS)}")
    return [entry for entry in entries if entry.split == split]


def _gist(doc: str) -> str:
    """Returns whole sentences of `doc` on one line, without a signature in front.

    The result has at most 400 characters. If no sentence ends in their second half, it ends with a
    word.
    """
    text, limit = " ".join(without_signature(doc).split()), _TASK_CHARACTERS
    if len(text) <= limit:
        return text
    cut = max((match.end() for match in _SENTENCE_END.finditer(text, 0, limit)), default=0)
    if cut <= limit // 2:
        cut = text.rfind(" ", 0, limit) + 1 or limit
    return text[:cut].strip()


def _classification(entries: Sequence[Entry], split: str) -> list[dict[str, Any]]:
    """Returns rows of the packages with the most docstrings.

    No package gets more than twice the median number of rows, so that none dominates.
    """
    units: dict[str, set[str]] = defaultdict(set)
    docstrings: Counter[str] = Counter()
    for entry in entries:
        units[entry.package].add(entry.unit)
        docstrings[entry.package] += entry.subject != "topic"
    # A class needs at least three modules, one for each split.
    classes = [name for name, _ in docstrings.most_common() if len(units[name]) >= 3][:_CLASSES]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in classes}
    own = [entry for entry in _of_split(entries, split) if entry.package in rows]
    for entry in sorted(own, key=lambda entry: name_hash(entry.doc)):
        text = _gist(entry.doc)
        if len(text) >= _MIN_TASK_CHARACTERS:
            rows[entry.package].append({"text": text, "label": entry.package})
    most = int(2 * median(map(len, rows.values())))
    return [row for of_package in rows.values() for row in of_package[:most]]


def _described(entries: Sequence[Entry]) -> list[Entry]:
    """Returns pairs of texts that belong together: signature and docstring.

    Each signature occurs once, although several modules may have a function of the same name.
    """
    own = (entry for entry in entries if entry.subject in ("class", "function"))
    pairs = [entry._replace(doc=_gist(entry.doc)) for entry in own]
    return _unique([pair for pair in pairs if len(pair.doc) >= _MIN_TASK_CHARACTERS])


def _halves(entries: Sequence[Entry]) -> list[Entry]:
    """Returns the two parts of each docstring that has at least two sentences.

    It is divided at the end of the sentence that is nearest to its middle. The first part takes the
    place of the signature, so that the result is like that of `_described`.
    """
    pairs = []
    for entry in entries:
        text = _gist(entry.doc)
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        if entry.subject != "topic" and ends:
            cut = min(ends, key=lambda end: abs(end - len(text) / 2))
            left, right = text[:cut].strip(), text[cut:].strip()
            if min(len(left), len(right)) >= _MIN_TASK_CHARACTERS:
                pairs.append(entry._replace(signature=left, doc=right))
    return _unique(pairs)


def _unique(pairs: Sequence[Entry]) -> list[Entry]:
    """Returns the pairs without those that repeat a text, so that no text is in two splits."""
    seen: set[str] = set()
    kept = []
    for pair in pairs:
        keys = {plain(pair.signature), plain(pair.doc)}
        if not keys & seen:
            kept.append(pair)
            seen |= keys
    return kept


def _groups(pairs: Sequence[Entry], size: int) -> Iterator[list[Entry]]:
    """Yields groups of `size` pairs of similar length from the same or neighbouring modules.

    The caller combines each first text of a group with each second text of the group. Every text
    then has as many wrong partners as every other text, so one text alone does not reveal the
    label. The pairs are taken in blocks of `_PARTNER_BLOCK`, and the last `size` - 1 or fewer pairs
    of a block are not used.
    """
    ordered = sorted(pairs, key=lambda pair: (len(pair.doc), name_hash(pair.doc)))
    for start in range(0, len(ordered), _PARTNER_BLOCK):
        block = ordered[start : start + _PARTNER_BLOCK]
        block.sort(key=lambda pair: (pair.package, pair.unit, name_hash(pair.doc)))
        for first in range(0, len(block) - size + 1, size):
            yield block[first : first + size]


def _pair_rows(pairs: Sequence[Entry]) -> list[dict[str, Any]]:
    return [
        {"text": pair.signature, "text_pair": other.doc, "label": int(pair is other)}
        for group in _groups(pairs, 2)
        for pair in group
        for other in group
    ]


def _choice_rows(pairs: Sequence[Entry]) -> list[dict[str, Any]]:
    return [
        {"text": pair.signature}
        | {f"choice{number}": other.doc for number, other in enumerate(group, start=1)}
        | {"label": label}
        for group in _groups(pairs, 4)
        for label, pair in enumerate(group)
    ]


def _unwrap(doc: str) -> str:
    """Returns `doc` with each paragraph of prose on one line; lists, tables and code stay."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", doc):
        lines = [line.rstrip() for line in paragraph.split("\n") if line.strip("*=-~^#+ \t")]
        prose = not any(re.match(r"\s|[*+|>.-]|\w+\)|.* -- ", line) for line in lines)
        paragraphs.append(" ".join(" ".join(lines).split()) if prose else "\n".join(lines))
    return "\n".join(filter(None, paragraphs))
