"""Built-in data, which needs no download: running text and five labelled tasks.

The texts are the docstrings that `corpus.py` collects from the Python standard library. All data is
divided into the same splits, and all docstrings of a module are in one split. No text is in two
splits.

In the tasks with several texts, one text alone does not reveal the label. In `entailment` and
`similarity`, each text occurs once with label 1 and once with label 0. In `multiple_choice`, each
docstring is once the right answer and three times a wrong answer. In these three tasks all labels
are equally frequent. A wrong partner of a text is from the same split, has about the same length,
and is mostly from the same or a neighbouring module. A docstring can contain the name of its
function. But a signature at the start of a docstring ("find(sub) -> int") is removed.
"""

import itertools
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
WORD_ORDER = "word_order"
TASKS = (
    WORD_ORDER, TaskKind.CLASSIFICATION.value, TaskKind.ENTAILMENT.value,
    TaskKind.SIMILARITY.value, TaskKind.MULTIPLE_CHOICE.value,
)  # fmt: skip
"""The names of the labelled tasks. Each is a kind of task, except for `word_order`, which is a
classification."""

_TASK_CHARACTERS = 400
_MIN_TASK_CHARACTERS = 20
_CLASSES = 10
_PARTNER_BLOCK = 48
_SENTENCE_END = re.compile(r"[.!?:;][\"')\]]*\s+(?=\S)")
_PUNCTUATION = " .!?:;"
_SENTENCE_WORDS = range(6, 17)


def builtin_text(split: str) -> Texts:
    """Returns running text, in rows of the same form as `read_text` returns.

    A document is a topic of the language reference, or a module with each signature above its
    docstring. A blank line follows each entry. A wrapped paragraph becomes one line.

    Args:
      split: "train" (about 80% of the characters), "validation" or "test".

    Raises:
      UserError: there is no such split, or the Python installation has no sources.
    """
    documents: dict[str, list[str]] = defaultdict(list)
    for entry in _of_split(read_entries(), split):
        text = f"{entry.signature}\n{_unwrap(entry.doc)}".strip("\n")
        documents[entry.unit].append(f"{text}\n\n")
    # Documents are sorted by a hash of their name, so every part of the text mixes topics and
    # modules.
    order = sorted(documents, key=name_hash)
    lines = (f"{line}\n" for unit in order for line in "".join(documents[unit]).split("\n")[:-1])
    return Texts.of(pieces(lines))


def builtin_task(name: str, split: str) -> Dataset:
    """Returns the labelled rows of one task.

    * `word_order`: `text` is the first sentence of a docstring. `label` is "original", or
      "shuffled" if its words are in a random order.
    * `classification`: `text` is a docstring. `label` is the name of its package.
    * `entailment`: `text` is a signature, and `text_pair` is a docstring. `label` is 1 if the
      docstring belongs to the signature, else 0.
    * `multiple_choice`: `text` is a signature, and `choice1` to `choice4` are docstrings. `label`
      is the index of the right docstring, 0 to 3.
    * `similarity`: `text` and `text_pair` are parts of docstrings. `label` is 1 if both are parts
      of the same docstring, else 0.

    Args:
      name: a task from `TASKS`.
      split: a split from `SPLITS`.

    Raises:
      UserError: there is no such task or split, or the Python installation has no sources.
    """
    require(name in TASKS, f"built-in task {name!r}: write one of {', '.join(TASKS)}")
    if name == WORD_ORDER:
        rows = _word_order(read_entries(), split)
    elif name == TaskKind.CLASSIFICATION:
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
    """Returns the first sentences of `doc` on one line, without a signature at the start.

    The result has at most 400 characters. If no sentence ends between character 200 and 400, the
    result ends after a word instead.
    """
    text, limit = " ".join(without_signature(doc).split()), _TASK_CHARACTERS
    if len(text) <= limit:
        return text
    cut = max((match.end() for match in _SENTENCE_END.finditer(text, 0, limit)), default=0)
    if cut <= limit // 2:
        cut = text.rfind(" ", 0, limit) + 1 or limit
    return text[:cut].strip()


def _classification(entries: Sequence[Entry], split: str) -> list[dict[str, Any]]:
    """Returns the rows of the ten packages with the most docstrings.

    A package has at most twice the median number of rows, so no package dominates.
    """
    units: dict[str, set[str]] = defaultdict(set)
    docstrings: Counter[str] = Counter()
    for entry in entries:
        units[entry.package].add(entry.unit)
        docstrings[entry.package] += entry.subject != "topic"
    # A package needs at least three units, one for each split.
    classes = [name for name, _ in docstrings.most_common() if len(units[name]) >= 3][:_CLASSES]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in classes}
    own = [entry for entry in _of_split(entries, split) if entry.package in rows]
    for entry in sorted(own, key=lambda entry: name_hash(entry.doc)):
        text = _gist(entry.doc)
        if len(text) >= _MIN_TASK_CHARACTERS:
            rows[entry.package].append({"text": text, "label": entry.package})
    most = int(2 * median(map(len, rows.values())))
    return [row for of_package in rows.values() for row in of_package[:most]]


def _word_order(entries: Sequence[Entry], split: str) -> list[dict[str, Any]]:
    """Returns the first sentence of each docstring, half of them with shuffled words.

    Each sentence occurs once in all splits. It has no punctuation at its end, because a full stop
    in the middle of a sentence would reveal the label.
    """
    seen: set[str] = set()
    sentences = []
    for entry in entries:
        text = " ".join(without_signature(entry.doc).split())
        sentence = _SENTENCE_END.split(text, maxsplit=1)[0].rstrip(_PUNCTUATION)
        is_new = plain(sentence) not in seen
        seen.add(plain(sentence))
        words = sentence.split()
        # Words that are all equal have no other order.
        if is_new and len(set(words)) > 1 and len(words) in _SENTENCE_WORDS:
            sentences.append((entry.split, sentence))
    own = [sentence for of, sentence in sentences if of == split]
    own.sort(key=name_hash)
    return [
        {"text": _shuffled(sentence), "label": "shuffled"}
        if i % 2
        else {"text": sentence, "label": "original"}
        for i, sentence in enumerate(own)
    ]


def _shuffled(sentence: str) -> str:
    """Returns the words of a sentence in another order, which is the same on all machines."""
    words = sentence.split()

    def order(attempt: int) -> list[str]:
        places = sorted(range(len(words)), key=lambda i: name_hash(f"{attempt} {i} {sentence}"))
        return [words[i] for i in places]

    return " ".join(next(found for found in map(order, itertools.count()) if found != words))


def _described(entries: Sequence[Entry]) -> list[Entry]:
    """Returns pairs of texts that belong together: `signature` and a shortened `doc`.

    Each signature occurs only once, although several modules can have functions of equal names.
    """
    own = (entry for entry in entries if entry.subject in ("class", "function"))
    pairs = [entry._replace(doc=_gist(entry.doc)) for entry in own]
    return _unique([pair for pair in pairs if len(pair.doc) >= _MIN_TASK_CHARACTERS])


def _halves(entries: Sequence[Entry]) -> list[Entry]:
    """Returns the two parts of each docstring that has at least two sentences.

    A docstring is divided at the end of a sentence, as near to its middle as possible. The result
    has the form of the result of `_described`: `signature` is the first part, and `doc` is the
    second part.
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
    """Returns the pairs that repeat no text of an earlier pair, so no text is in two splits."""
    seen: set[str] = set()
    kept = []
    for pair in pairs:
        keys = {plain(pair.signature), plain(pair.doc)}
        if not keys & seen:
            kept.append(pair)
            seen |= keys
    return kept


def _groups(pairs: Sequence[Entry], size: int) -> Iterator[list[Entry]]:
    """Yields groups of `size` pairs of similar length, from the same or neighbouring modules.

    The caller joins every first text of a group with every second text of the group. So all texts
    have equally many right and wrong partners, and one text alone does not reveal the label.

    To form the groups, the pairs are sorted by length and divided into blocks of `_PARTNER_BLOCK`
    pairs. Each block is sorted by module and divided into groups. Pairs at the end of a block, at
    most `size` - 1, are not used.
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
    """Returns `doc` with each paragraph of prose on one line.

    Lists, tables and code keep their lines. Blank lines and underlines of headings are removed.
    """
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", doc):
        lines = [line.rstrip() for line in paragraph.split("\n") if line.strip("*=-~^#+ \t")]
        prose = not any(re.match(r"\s|[*+|>.-]|\w+\)|.* -- ", line) for line in lines)
        paragraphs.append(" ".join(" ".join(lines).split()) if prose else "\n".join(lines))
    return "\n".join(filter(None, paragraphs))
