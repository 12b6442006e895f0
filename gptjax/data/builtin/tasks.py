"""Built-in data, no download: running text and four labelled tasks from the standard library.

`docstrings.py` collects; one split by module holds for the running text and for all tasks.

The labelled tasks are built so that no text alone tells the answer: in `entailment` and
`similarity` each text occurs once with label 1 and once with label 0, in `multiple_choice` each
docstring is right once and wrong three times, and each label is equally frequent. Wrong partners
come from the same split, have about the same length and mostly come from the same or a neighbouring
module. No text is in two splits. The name of a function is left in its docstring, as that is what
connects them in real life, but a signature that opens a docstring ("find(sub) -> int") is cut off.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from gptjax.config.schema import TaskKind
from gptjax.data.builtin.corpus import Entry, name_hash, plain, read_entries, without_signature
from gptjax.data.tables.files import to_dataset
from gptjax.data.tables.text_files import pieces
from gptjax.errors import require

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")
TASKS = tuple(kind for kind in TaskKind if kind is not TaskKind.REGRESSION)

_TASK_CHARACTERS = 400
_MIN_TASK_CHARACTERS = 20
_CLASSES = 10
_PARTNER_BLOCK = 48
_SENTENCE_END = re.compile(r"[.!?:;][\"')\]]*\s+(?=\S)")


class Item(NamedTuple):
    """Two texts that belong together, for the tasks that ask whether they do."""

    package: str
    unit: str
    split: str
    left: str
    right: str


def builtin_text(split: str) -> Dataset:
    """Running text with the column `text`: the rows concatenated are the corpus, as in `read_text`.

    A document is a module, set out as `help()` does (each signature above its docstring), or a
    topic of the language reference; a blank line ends it. Wrapped paragraphs are one line each.

    Args:
      split: "train" (about 80% of the volume), "validation" or "test".

    Raises:
      UserError: no such split, or a Python installation without its sources.
    """
    import pyarrow as pa

    documents: dict[str, list[str]] = defaultdict(list)
    for entry in _of_split(read_entries(), split):
        text = f"{entry.signature}\n{_unwrap(entry.doc)}".strip("\n")
        documents[entry.unit].append(f"{text}\n\n")
    order = sorted(
        documents, key=name_hash
    )  # topics among modules: any part of the text is a mixture
    lines = (f"{line}\n" for unit in order for line in "".join(documents[unit]).split("\n")[:-1])
    return to_dataset(pa.table({"text": pa.array(pieces(lines), pa.string())}))


def builtin_task(name: str, split: str) -> Dataset:
    """Labelled rows of one task; labels are int64 but for `classification`, where they are strings.

    * `classification`: `text` a docstring, `label` the package it is from.
    * `entailment`: `text` a signature, `text_pair` a docstring, `label` 1 if that describes it.
    * `multiple_choice`: `text` a signature, `choice1` to `choice4` docstrings, `label` 0 to 3.
    * `similarity`: `text` and `text_pair` parts of docstrings, `label` 1 if of the same.

    Args:
      name: one of `TASKS`.
      split: one of `SPLITS`.

    Raises:
      UserError: no such task or split, or a Python installation without its sources.
    """
    import pyarrow as pa

    require(name in TASKS, f"built-in task {name!r}: write one of {', '.join(TASKS)}")
    if name == TaskKind.CLASSIFICATION:
        rows = _classification(read_entries(), split)
    else:
        items = (
            _halves(read_entries()) if name == TaskKind.SIMILARITY else _described(read_entries())
        )
        own = _of_split(items, split)
        rows = _choice_rows(own) if name == TaskKind.MULTIPLE_CHOICE else _pair_rows(own)
    rows.sort(key=lambda row: name_hash(repr(row)))
    return to_dataset(pa.Table.from_pylist(rows))


def _of_split(entries: Sequence[Any], split: str) -> list[Any]:
    require(split in SPLITS, f"built-in split {split!r}: write one of {', '.join(SPLITS)}")
    return [entry for entry in entries if entry.split == split]


def _gist(doc: str) -> str:
    """`doc` on one line without an opening signature, at most 400 characters of whole sentences."""
    return _cut(" ".join(without_signature(doc).split()), _TASK_CHARACTERS)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    ends = [match.end() for match in _SENTENCE_END.finditer(text, 0, limit)]
    long_enough = [end for end in ends if end > limit // 2]
    return text[
        : long_enough[-1] if long_enough else text.rfind(" ", 0, limit) + 1 or limit
    ].strip()


def _classification(entries: Sequence[Entry], split: str) -> list[dict[str, Any]]:
    """The packages with most docstrings; none has over twice the median of the split."""
    units: dict[str, set[str]] = defaultdict(set)
    volume: Counter[str] = Counter()
    for entry in entries:
        units[entry.package].add(entry.unit)
        volume[entry.package] += entry.kind != "topic"
    # Three modules at least: one for each split.
    classes = [name for name, _ in volume.most_common() if len(units[name]) >= 3][:_CLASSES]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in classes}
    own = [each for each in _of_split(entries, split) if each.package in rows]
    for entry in sorted(own, key=lambda each: name_hash(each.doc)):
        text = _gist(entry.doc)
        if len(text) >= _MIN_TASK_CHARACTERS:
            rows[entry.package].append({"text": text, "label": entry.package})
    cap = int(2 * median(len(each) for each in rows.values()))
    return [row for each in rows.values() for row in each[:cap]]


def _described(entries: Sequence[Entry]) -> list[Item]:
    """(signature, docstring), each signature once: some have the same name in several modules."""
    items = [
        Item(entry.package, entry.unit, entry.split, entry.signature, _gist(entry.doc))
        for entry in entries
        if entry.kind in ("class", "function")
    ]
    return _unique([item for item in items if len(item.right) >= _MIN_TASK_CHARACTERS])


def _halves(entries: Sequence[Entry]) -> list[Item]:
    """(first part, second part) of each docstring of two sentences or more, cut near the middle."""
    items = []
    for entry in entries:
        text = _gist(entry.doc)
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        if entry.kind != "topic" and ends:
            cut = min(ends, key=lambda end: abs(end - len(text) / 2))
            left, right = text[:cut].strip(), text[cut:].strip()
            if min(len(left), len(right)) >= _MIN_TASK_CHARACTERS:
                items.append(Item(entry.package, entry.unit, entry.split, left, right))
    return _unique(items)


def _unique(items: Sequence[Item]) -> list[Item]:
    """Without items one of whose texts occurred before, so that no text is in two splits."""
    seen: set[str] = set()
    kept = []
    for item in items:
        keys = {plain(item.left), plain(item.right)}
        if not keys & seen:
            kept.append(item)
            seen |= keys
    return kept


def _groups(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Groups of `size` items of similar length, from the same or neighbouring modules.

    Within a group every right text is offered to every left one: what tells the answer can only be
    how the two fit. Up to `size` - 1 items of a block are left over.
    """
    ordered = sorted(items, key=lambda item: (len(item.right), name_hash(item.right)))
    for start in range(0, len(ordered), _PARTNER_BLOCK):
        block = sorted(
            ordered[start : start + _PARTNER_BLOCK],
            key=lambda item: (item.package, item.unit, name_hash(item.right)),
        )
        for first in range(0, len(block) - size + 1, size):
            yield block[first : first + size]


def _pair_rows(items: Sequence[Item]) -> list[dict[str, Any]]:
    return [
        {"text": item.left, "text_pair": other.right, "label": int(item is other)}
        for group in _groups(items, 2)
        for item in group
        for other in group
    ]


def _choice_rows(items: Sequence[Item]) -> list[dict[str, Any]]:
    return [
        {"text": item.left}
        | {f"choice{number}": other.right for number, other in enumerate(group, start=1)}
        | {"label": label}
        for group in _groups(items, 4)
        for label, item in enumerate(group)
    ]


def _unwrap(doc: str) -> str:
    """Joins the lines of each paragraph of prose; lists, tables and code keep their lines."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", doc):
        lines = [line.rstrip() for line in paragraph.split("\n") if line.strip("*=-~^#+ \t")]
        prose = not any(re.match(r"\s|[*+|>.-]|\w+\)|.* -- ", line) for line in lines)
        paragraphs.append(" ".join(" ".join(lines).split()) if prose else "\n".join(lines))
    return "\n".join(filter(None, paragraphs))
