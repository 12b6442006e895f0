"""The paper's input transformations: a labelled row becomes the token sequences of one example.

classification     start text extract
entailment         start text delimiter text_pair extract
similarity         both orders of the two texts
regression         the same: it is similarity with a real-valued target
multiple choice    start text delimiter answer extract, one per answer

With a flattened head, the tutorial's: start text delimiter [text_pair delimiter], then padding up
to the same length for all.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.config.schema import Cut, TaskKind, TaskSpec
from gptjax.data.tokens import store
from gptjax.data.tokens.tokenizer import Tokenizer
from gptjax.errors import UserError, nearest, require

Rows = Mapping[str, Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenised examples; sequence c of example i is `tokens[i * C + c]`, C = num_candidates."""

    num_candidates: int
    tokens: list[np.ndarray]
    """int32 [length] each."""
    second_start: np.ndarray
    """int32 [n * C]: where the second text begins (the sequence's length where there is none)."""
    labels: np.ndarray | None
    """int32 or float32 [n]; None where the rows carry no label column."""
    cut: int
    """Examples whose text was cut to fit the context."""
    empty: int
    """Examples with an empty text."""
    padding_start: np.ndarray | None = None
    """int32 [n * C]: where padding inside the sequence begins; None: there is none."""

    def __len__(self) -> int:
        return len(self.tokens) // self.num_candidates

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int32 [n]: tokens of all sequences of each example."""
        lengths = np.array([len(t) for t in self.tokens], np.int32)
        return lengths.reshape(-1, self.num_candidates).sum(axis=1, dtype=np.int32)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; 0 where there is none."""
        return max(map(len, self.tokens), default=0)


def as_text(value: Any) -> str:
    """A cell as text: None is empty."""
    return "" if value is None else str(value)


def _order(names: set[str]) -> tuple[str, ...]:
    """Numbers in numeric order, anything else in alphabetic order."""
    try:
        # Of a sorted list: the order of a set, which differs by process, must not decide a tie.
        return tuple(sorted(sorted(names), key=float))
    except ValueError:
        return tuple(sorted(names))


def find_labels(
    spec: TaskSpec, rows: Rows, where: str, numbers: Sequence[int] | None = None
) -> TaskSpec:
    """Returns `spec` with the label names that the training rows use.

    Classes are the distinct labels, numbers in numeric order. Answers of a multiple choice may be
    numbered from 0 or from 1 (from 1 where no 0 but the number of answers occurs) or lettered.

    Raises:
      UserError: an empty label, one class only, or labels that do not number the answers.
    """
    if spec.kind is TaskKind.REGRESSION:
        return spec
    seen: set[str] = set()
    for number, value in zip(_numbers(rows[spec.label], numbers), rows[spec.label], strict=True):
        name = as_text(value).strip()
        require(name, f"{where}: row {number}, column {spec.label}: the label is empty")
        seen.add(name)
    if spec.kind is not TaskKind.MULTIPLE_CHOICE:
        require(
            len(seen) > 1,
            f"{where}: column {spec.label}: every row has the label {next(iter(seen), '')!r}; "
            "a classifier needs at least two",
        )
        return dataclasses.replace(spec, labels=_order(seen))
    count = len(spec.choices)
    numbered = tuple(str(i) for i in range(count))
    from_one = tuple(str(i + 1) for i in range(count))
    letters = tuple(chr(ord("A") + i) for i in range(count))
    options = [from_one, numbered] if from_one[-1] in seen else [numbered, from_one]
    for names in (*options, letters):
        if seen <= set(names):
            return dataclasses.replace(spec, labels=names)
    raise UserError(
        f"{where}: column {spec.label}: labels {', '.join(_order(seen)[:5])} do not number the "
        f"{count} answers; use 0 to {count - 1}, 1 to {count}, or letters from A"
    )


def _numbers(values: Sequence[Any], numbers: Sequence[int] | None) -> Sequence[int]:
    """The rows' numbers in their file: as given, or from 1."""
    return range(1, len(values) + 1) if numbers is None else numbers


def label_ids(
    spec: TaskSpec, values: Sequence[Any], where: str, numbers: Sequence[int] | None
) -> np.ndarray:
    """Returns int32 [n] classes or answers, or float32 [n] targets; errors name the row."""
    numbers = _numbers(values, numbers)
    if spec.kind is TaskKind.REGRESSION:
        targets = np.zeros(len(values), np.float32)
        for i, value in enumerate(values):
            try:
                with np.errstate(over="ignore"):
                    targets[i] = float(value)
            except (TypeError, ValueError):
                targets[i] = math.nan
            require(
                math.isfinite(targets[i]),
                f"{where}: row {numbers[i]}, column {spec.label}: {as_text(value)!r} is not "
                "a number",
            )
        return targets
    ids = {name: i for i, name in enumerate(spec.labels)}
    known = f"known labels: {', '.join(spec.labels[:10])}"
    classes = np.zeros(len(values), np.int32)
    for i, value in enumerate(values):
        name = as_text(value).strip()
        require(
            name in ids,
            f"{where}: row {numbers[i]}, column {spec.label}: label {name!r} was not seen in "
            f"training; {known}{nearest(name, ids)}",
        )
        classes[i] = ids[name]
    return classes


def cut_pair(first: int, second: int, budget: int) -> tuple[int, int]:
    """Returns how many tokens of two texts to keep so that they fit `budget` together.

    The longer is cut first; a text is cut below half the budget only if it is shorter.
    >>> cut_pair(10, 2, 8), cut_pair(10, 9, 8), cut_pair(3, 3, 8)
    ((6, 2), (4, 4), (3, 3))
    """
    if first + second <= budget:
        return first, second
    half = budget // 2
    keep_second = min(second, max(half, budget - first))
    return min(first, budget - keep_second), keep_second


class _Builder:
    """Joins tokenised texts with the special tokens, cutting to the context length."""

    def __init__(self, tokenizer: Tokenizer, context_length: int, halves: bool = False):
        require(
            context_length >= 5,
            f"`model.context_length`={context_length}: a pair of texts needs at least 5",
        )
        self._start, self._delimiter, self._extract = (
            np.array([i], np.int32)
            for i in (tokenizer.start_id, tokenizer.delimiter_id, tokenizer.extract_id)
        )
        self._context, self._halves = context_length, halves
        self._padding = tokenizer.padding_id
        self.cut = False

    def build(
        self, spec: TaskSpec, texts: Sequence[np.ndarray]
    ) -> list[tuple[np.ndarray, int, int]]:
        """Returns an example's sequences, and where their second text and padding begin."""
        if spec.flatten:
            return [self.padded(texts, spec.flatten)]
        if spec.kind is TaskKind.CLASSIFICATION:
            built = [self.single(texts[0])]
        elif spec.kind is TaskKind.ENTAILMENT:
            built = [self.pair(texts[0], texts[1])]
        elif spec.kind is TaskKind.MULTIPLE_CHOICE:
            built = [self.pair(texts[0], answer, spec.ends_in_question) for answer in texts[1:]]
        else:
            built = [self.pair(texts[0], texts[1]), self.pair(texts[1], texts[0])]
        return [(tokens, second, len(tokens)) for tokens, second in built]

    def single(self, text: np.ndarray) -> tuple[np.ndarray, int]:
        keep = self._context - 2
        self.cut |= len(text) > keep
        tokens = np.concatenate([self._start, text[:keep], self._extract])
        return tokens, len(tokens)

    def pair(
        self, first: np.ndarray, second: np.ndarray, keep_end: bool = False
    ) -> tuple[np.ndarray, int]:
        keep, keep_second = cut_pair(len(first), len(second), self._context - 3)
        if self._halves:
            half = self._context // 2 - 2
            keep, keep_second = min(len(first), half), min(len(second), half)
        self.cut |= keep < len(first) or keep_second < len(second)
        first = first[len(first) - keep :] if keep_end else first[:keep]
        parts = [self._start, first, self._delimiter, second[:keep_second], self._extract]
        return np.concatenate(parts), keep + 2

    def padded(self, texts: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, int, int]:
        """The tutorial's sequence, and where its second text and its padding begin."""
        if len(texts) == 1:
            keep = [min(len(texts[0]), length - 2)]
        else:
            keep = list(cut_pair(len(texts[0]), len(texts[1]), length - 3))
        self.cut |= any(n < len(text) for n, text in zip(keep, texts, strict=True))
        parts = [self._start]
        for text, n in zip(texts, keep, strict=True):
            parts += [text[:n], self._delimiter]
        tokens = np.concatenate(parts)
        rest = np.full(length - len(tokens), self._padding, np.int32)
        second = keep[0] + 2 if len(texts) > 1 else len(tokens)
        return np.concatenate([tokens, rest]), second, len(tokens)


def padded_length(spec: TaskSpec, rows: Rows, tokenizer: Tokenizer, context_length: int) -> int:
    """Returns the tokens of the longest row of a flattened head, at most the context length."""
    longest = 0
    columns = [
        store.encode_batch(tokenizer, [as_text(value) for value in rows[name]])
        for name in spec.text_columns
    ]
    for texts in zip(*columns, strict=True):
        longest = max(longest, 1 + sum(len(text) + 1 for text in texts))
    return min(longest, context_length)


def encode(
    spec: TaskSpec,
    rows: Rows,
    tokenizer: Tokenizer,
    context_length: int,
    where: str,
    labelled: bool = True,
    numbers: Sequence[int] | None = None,
    keep: bool = False,
) -> Examples:
    """Tokenises labelled rows into examples.

    Args:
      spec: the task, with its label names.
      rows: column name -> values, all columns equally long.
      tokenizer: text -> ids.
      context_length: longest sequence; longer ones are cut inside their texts and counted.
      where: the file or data set, for error messages.
      labelled: whether to read the label column.
      numbers: row of the file (from 1) of each row, for error messages; None: 1, 2, ...
      keep: whether to keep the ids of long columns in the cache.

    Raises:
      UserError: a label that training did not see, or a target that is not a number.
    """
    ids = functools.partial(store.encode_batch, tokenizer) if keep else tokenizer.encode_batch
    columns = {name: ids([as_text(value) for value in rows[name]]) for name in spec.text_columns}
    builder = _Builder(tokenizer, context_length, halves=spec.cut == Cut.HALF)
    built: list[tuple[np.ndarray, int, int]] = []
    cut = empty = 0
    for i in range(len(rows[spec.text])):
        texts = [columns[name][i] for name in spec.text_columns]
        builder.cut = False
        built += builder.build(spec, texts)
        cut += builder.cut
        empty += any(len(text) == 0 for text in texts)
    labels = label_ids(spec, rows[spec.label], where, numbers) if labelled else None
    tokens = [sequence for sequence, _, _ in built]
    seconds, ends = (np.array([each[i] for each in built], np.int32) for i in (1, 2))
    padding_start = ends if spec.flatten else None
    return Examples(spec.num_candidates, tokens, seconds, labels, cut, empty, padding_start)
