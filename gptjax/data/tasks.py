"""The paper's input transformations: a labelled row becomes the token sequences of one example.

classification     start text extract
entailment         start text delimiter text_pair extract
similarity         start text delimiter text_pair extract
                   start text_pair delimiter text extract
regression         the two sequences of similarity; the target is a real number
multiple choice    start text delimiter answer extract (a sequence for each answer)

start, delimiter and extract are special tokens. The task head reads the hidden state at the extract
token. A flattened task head (recipe `tutorial`) reads the hidden states of all positions instead.
An example is then one sequence, which is padded to a fixed length:

one text           start text delimiter
two texts          start text delimiter text_pair delimiter

A text that is longer than the context is cut, as in the paper, or is read in windows (`Long`). Each
window is a sequence of its own, and the windows of a text are the candidates of one example:

long text          start window extract (a sequence for each window)

The windows of a text do not overlap, and their lengths differ by at most one token. So each token
of the text is read once and predicted once, and in the mean over the windows every token counts
about the same. (With full windows, a last window of a few tokens would count as much as a full
one.) The language model predicts the first token of a window from the start token alone, as it
predicts the first token of a text.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.config.schema import Cut, TaskKind, TaskSpec
from gptjax.data import fingerprints
from gptjax.data.tables.labelled import LabelledTable, as_number, as_text, same_label
from gptjax.data.tokens import store
from gptjax.data.tokens.tokenizer import SPECIALS, Tokenizer
from gptjax.errors import UserError, nearest, require

# A user is warned if at least this fraction of the tokens is unknown.
_MANY_UNKNOWN = 0.05


@dataclasses.dataclass(frozen=True)
class Reading:
    """The part of the texts that the model reads."""

    in_windows: int = 0
    """The number of examples that are read in several windows."""
    most_windows: int = 1
    """The largest number of windows of an example."""
    share: float = 1.0
    """The fraction of the tokens of the texts that are read. The rest is cut."""

    def describe(self, cut: int, context_length: int) -> list[str]:
        """Returns parts of a line for the user. The list is empty if every text fits the context.

        Args:
          cut: the number of examples with a text that was shortened.
          context_length: the number of tokens of a window.

        >>> Reading(612, 9, 0.9738).describe(3, 128)[:2]
        ['612 in windows of 128 tokens, up to 9 a text', '3 cut to fit 9 windows']
        >>> Reading(share=0.41).describe(3, 128)
        ['3 cut to fit 128 tokens', '41.0% of the tokens are read']
        """
        parts = []
        if self.in_windows:
            windows = f"in windows of {context_length} tokens, up to {self.most_windows} a text"
            parts.append(f"{self.in_windows:,} {windows}")
        if cut:
            many = self.most_windows > 1
            room = f"{self.most_windows} windows" if many else f"{context_length} tokens"
            parts.append(f"{cut:,} cut to fit {room}")
        if parts:
            # The share is rounded down, so that it is 100% only if every token is read.
            parts.append(f"{math.floor(self.share * 1000) / 10:.1f}% of the tokens are read")
        return parts


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenised examples: n examples with at most C = num_candidates sequences each.

    Sequence c of example i has the index i * C + c. If an example has fewer than C sequences, the
    others are empty. (Texts are read in different numbers of windows.)
    """

    num_candidates: int
    tokens: list[np.ndarray]
    """n * C sequences, int32 [length] each."""
    second_start: np.ndarray
    """int32 [n * C]: the index of the first token of the second text. If there is one text, it is
    the number of tokens without padding."""
    labels: np.ndarray | None
    """int32 or float32 [n]; None if the rows have no label."""
    cut: int
    """The number of examples with a text that was shortened to fit into the context."""
    empty: int
    """The number of examples with an empty text."""
    unknown: float = 0.0
    """The fraction of the tokens of the texts that are `<unk>`. The model cannot tell such tokens
    apart."""
    padding_start: np.ndarray | None = None
    """int32 [n * C]: the index of the first padding token in each sequence. None means that the
    sequences are not padded, because the task head is not flattened."""
    reading: Reading = Reading()
    """The part of the texts that is read."""
    hidden: np.ndarray | None = None
    """[total number of tokens, D]: the hidden states of all sequences after the frozen blocks, one
    sequence after the other. None means that no block is frozen. The array is usually a file that
    is mapped into memory (`gptjax.data.states`)."""

    def __len__(self) -> int:
        return len(self.tokens) // self.num_candidates

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int32 [n]: the number of tokens of each example, in all its sequences together."""
        lengths = np.array([len(sequence) for sequence in self.tokens], np.int32)
        return lengths.reshape(-1, self.num_candidates).sum(axis=1, dtype=np.int32)

    @property
    def row_limit(self) -> int:
        """The largest row length that a packer should choose, in tokens; 0 means no limit.

        Examples in windows make a row of many sequences. On accelerators the cost of attention
        grows with the row length, so a row holds at most two of the longest examples.
        """
        return 2 * int(self.lengths.max()) if self.reading.most_windows > 1 else 0

    @functools.cached_property
    def fingerprint(self) -> str:
        """The hash of the tokens, lengths and labels. A checkpoint stores it for the training
        examples."""
        return fingerprints.of_arrays(np.concatenate(self.tokens), self.lengths, self.labels)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """int64 [n]: the index in `hidden` of the first token of each example."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    @property
    def max_sequence_length(self) -> int:
        """The number of tokens of the longest sequence; 0 if there are no examples."""
        return max(map(len, self.tokens), default=0)


def _in_order(names: set[str]) -> tuple[str, ...]:
    """Returns names in numeric order if all are numbers, else in alphabetic order."""
    try:
        # The inner sort decides the order of equal numbers such as "1" and "1.0", because the order
        # of a set differs from process to process.
        return tuple(sorted(sorted(names), key=float))
    except ValueError:
        return tuple(sorted(names))


def find_labels(spec: TaskSpec, table: LabelledTable) -> TaskSpec:
    """Returns `spec` with the names of the labels in the training rows.

    The classes are the distinct labels, in alphabetic order or, if all are numbers, in numeric
    order. In a multiple choice, the labels number the answers from 0, from 1, or with letters from
    A. For n answers, the numbers start at 1 if the label n occurs. Otherwise they start at 0, if
    all labels fit. A number can be written as 1 or as 1.0.

    Raises:
      UserError: a label is empty, there is only one class, or labels do not number the answers.
    """
    if spec.kind is TaskKind.REGRESSION:
        return spec
    source = f"{table.source}: column {spec.label}"
    cells = [as_text(value).strip() for value in table.columns([spec.label])[spec.label]]
    if "" in cells:
        raise UserError(f"{table.cell(cells.index(''), spec.label)}: the label is empty")
    names = set(cells)
    if spec.kind is not TaskKind.MULTIPLE_CHOICE:
        require(
            len(names) > 1,
            f"{source}: every row has the label {next(iter(names), '')!r}; "
            "a classifier needs at least two",
        )
        return dataclasses.replace(spec, labels=_in_order(names))
    count = len(spec.choices)
    from_zero = tuple(str(i) for i in range(count))
    from_one = tuple(str(i + 1) for i in range(count))
    letters = tuple(chr(ord("A") + i) for i in range(count))
    names = {_whole_number(name) for name in names}
    numberings = [from_one, from_zero] if from_one[-1] in names else [from_zero, from_one]
    for labels in (*numberings, letters):
        if names <= set(labels):
            return dataclasses.replace(spec, labels=labels)
    raise UserError(
        f"{source}: labels {', '.join(_in_order(names)[:5])} do not number the "
        f"{count} answers; use 0 to {count - 1}, 1 to {count}, or letters from A"
    )


def _whole_number(name: str) -> str:
    """Returns the decimal digits of a whole number such as "1.0". Other texts are not changed."""
    number = as_number(name)
    whole = number is not None and number == number.to_integral_value()
    return str(int(number)) if number is not None and whole else name


def label_ids(spec: TaskSpec, table: LabelledTable) -> np.ndarray:
    """Returns the index of each row's class or answer, int32 [n]; in a regression, float32 targets.

    A label that is a number has the class of an equal number, such as 1 for 1.0.

    Raises:
      UserError: a label did not occur in training, or a target is not a finite number.
    """
    values = table.columns([spec.label])[spec.label]
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
                f"{table.cell(i, spec.label)}: {as_text(value)!r} is not a number",
            )
        return targets
    ids = {name: i for i, name in enumerate(spec.labels)}
    names = [as_text(value).strip() for value in values]
    for name in set(names) - set(ids):
        same = [label for label in spec.labels if same_label(label, name)]
        if len(same) == 1:
            ids[name] = ids[same[0]]
    for i, name in enumerate(names):
        if name not in ids:
            raise UserError(
                f"{table.cell(i, spec.label)}: label {name!r} was not seen in training; "
                f"known labels: {', '.join(spec.labels[:10])}{nearest(name, spec.labels)}"
            )
    return np.array([ids[name] for name in names], np.int32)


def cut_pair(first: int, second: int, budget: int) -> tuple[int, int]:
    """Returns the numbers of tokens of two texts to keep. Their sum is at most `budget`.

    The longer text is shortened first. A text is never shortened to less than half of the budget.

    Args:
      first: the number of tokens of the first text.
      second: the number of tokens of the second text.
      budget: the largest number of tokens of both texts together.

    >>> cut_pair(10, 2, 8), cut_pair(10, 9, 8), cut_pair(3, 3, 8)
    ((6, 2), (4, 4), (3, 3))
    """
    if first + second <= budget:
        return first, second
    half = budget // 2
    keep_second = min(second, max(half, budget - first))
    return min(first, budget - keep_second), keep_second


class _Sequence(NamedTuple):
    """A token sequence of an example."""

    tokens: np.ndarray
    second_start: int
    """The index of the first token of the second text. If there is one text, it is the number of
    tokens without padding."""
    padding_start: int
    """The index of the first padding token; the number of tokens if there is no padding."""
    kept: int
    """The number of tokens of the texts in this sequence."""
    lost: int
    """The number of tokens by which the texts were shortened."""


_MISSING = _Sequence(np.zeros(0, np.int32), 0, 0, 0, 0)
"""The sequence in place of a window that an example does not have."""


class _Builder:
    """Joins tokenised texts and special tokens to sequences that fit into the context."""

    def __init__(self, spec: TaskSpec, tokenizer: Tokenizer, context_length: int):
        """Creates a builder of the examples of one task.

        Args:
          spec: the task.
          tokenizer: the tokenizer, for the ids of the special tokens.
          context_length: the largest number of tokens in a sequence.
        """
        require(
            context_length >= 5,
            f"`model.context_length`={context_length}: a pair of texts needs at least 5",
        )
        ids = (tokenizer.start_id, tokenizer.delimiter_id, tokenizer.extract_id)
        self._start, self._delimiter, self._extract = np.split(np.array(ids, np.int32), 3)
        self._padding, self._flatten = tokenizer.padding_id, bool(spec.flatten)
        self._length = spec.flatten or context_length
        # `build` runs for every example, so the properties of the task are read here, once.
        self._many_answers = spec.kind is TaskKind.MULTIPLE_CHOICE
        self._orders = 2 if spec.kind.sums_candidates else 1
        self._keeps_end = self._many_answers and spec.ends_in_question
        self._halves = spec.cut == Cut.HALF and not spec.flatten
        self._windows = spec.windows

    def build(self, texts: Sequence[np.ndarray]) -> list[_Sequence]:
        """Returns the sequences of an example with these texts."""
        if self._many_answers:
            return [self._join([texts[0], answer]) for answer in texts[1:]]
        if self._windows and len(texts[0]) > self._length - 2:
            return self._join_windows(texts[0])
        return [self._join(order) for order in (texts, texts[::-1])[: self._orders]]

    def _join(self, texts: Sequence[np.ndarray]) -> _Sequence:
        """Returns the sequence of one or two texts. The sequence of a flattened head is padded."""
        lengths = [len(text) for text in texts]
        keep = self._kept(lengths)
        kept = sum(keep)
        end = 1 + kept + len(keep)
        parts = [self._start]
        for text, count in zip(texts, keep, strict=True):
            parts += (text[:count], self._delimiter)
        if self._keeps_end:
            parts[1] = texts[0][lengths[0] - keep[0] :]
        if self._flatten:
            parts.append(np.full(self._length - end, self._padding, np.int32))
        else:
            parts[-1] = self._extract
        second_start = keep[0] + 2 if len(texts) > 1 else end
        return _Sequence(np.concatenate(parts), second_start, end, kept, sum(lengths) - kept)

    def _join_windows(self, text: np.ndarray) -> list[_Sequence]:
        """Returns the sequences of the windows of a long text."""
        room = self._length - 2
        count = min(self._windows, -(-len(text) // room))
        kept = min(len(text), count * room)
        ends = [kept * (i + 1) // count for i in range(count)]
        windows = [self._join([part]) for part in np.split(text[:kept], ends[:-1])]
        windows[-1] = windows[-1]._replace(lost=len(text) - kept)
        return windows

    def _kept(self, lengths: Sequence[int]) -> Sequence[int]:
        """Returns the numbers of tokens to keep of one or two texts with these lengths."""
        if len(lengths) == 1:
            return [min(lengths[0], self._length - 2)]
        if self._halves:  # as in the authors' code
            return [min(length, self._length // 2 - 2) for length in lengths]
        return cut_pair(lengths[0], lengths[1], self._length - 3)


def _encode_columns(
    spec: TaskSpec, columns: Mapping[str, list[Any]], tokenizer: Tokenizer, use_cache: bool
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields the token ids of the texts of each row, in the order of `spec.text_columns`."""
    encoded = {}
    for name in dict.fromkeys(spec.text_columns):
        texts = list(map(as_text, columns[name]))
        encoded[name] = store.encode_texts(texts, tokenizer, use_cache)
    return zip(*(encoded[name] for name in spec.text_columns), strict=True)


def padded_length(
    spec: TaskSpec, table: LabelledTable, tokenizer: Tokenizer, context_length: int
) -> int:
    """Returns the length to which the sequences of a flattened task head are padded.

    It is the length of the longest sequence, in tokens, but at most the context length.
    """
    lengths = sequence_lengths(spec, table, tokenizer)
    return min(int(lengths.max(initial=0)), context_length)


def sequence_lengths(spec: TaskSpec, table: LabelledTable, tokenizer: Tokenizer) -> np.ndarray:
    """Returns the number of tokens of the longest sequence of each row, int32 [n].

    The numbers are those of sequences that are not cut. They include the special tokens.
    """
    columns = table.columns(spec.text_columns)
    rows = _encode_columns(spec, columns, tokenizer, use_cache=True)
    # In a multiple choice, each answer has a sequence, which begins with the text.
    lengths = (
        2 + len(texts[0]) + max((len(other) + 1 for other in texts[1:]), default=0)
        for texts in rows
    )
    return np.fromiter(lengths, np.int32)


def share_longer(lengths: np.ndarray, context_length: int) -> float:
    """Returns the fraction of the rows that do not fit into the context; 0 if there are no rows.

    >>> share_longer(np.array([10, 128, 129, 700]), 128)
    0.5

    Args:
      lengths: int [n], from `sequence_lengths`.
      context_length: the largest number of tokens in a sequence.
    """
    return int(np.count_nonzero(lengths > context_length)) / max(1, len(lengths))


def encode(
    spec: TaskSpec,
    table: LabelledTable,
    tokenizer: Tokenizer,
    context_length: int,
    labelled: bool = True,
    use_cache: bool = False,
) -> Examples:
    """Tokenises the rows of a table into examples.

    Args:
      spec: the task, with the names of its labels.
      table: the rows.
      tokenizer: the tokenizer.
      context_length: the largest number of tokens in a sequence. If a sequence would be longer, its
        text is read in windows (`spec.windows`), or its texts are shortened. `Examples.cut` counts
        the examples with a text that is shortened.
      labelled: whether to read the label column.
      use_cache: whether to keep the token ids of long columns in the cache.

    Raises:
      UserError: a label did not occur in training, a target is not a number, or columns have
        different lengths.
    """
    columns = table.columns([*spec.text_columns, *([spec.label] if labelled else [])])
    builder = _Builder(spec, tokenizer, context_length)
    built: list[list[_Sequence]] = []
    cut = empty = 0
    for texts in _encode_columns(spec, columns, tokenizer, use_cache):
        example = builder.build(texts)
        built.append(example)
        cut += any(sequence.lost for sequence in example)
        empty += any(len(text) == 0 for text in texts)
    reading = _reading(spec, built)
    candidates = spec.num_candidates
    if spec.windows:
        # A power of two, so that data of other lengths often has batches of the same shape.
        candidates = min(candidates, 1 << (reading.most_windows - 1).bit_length())
        for example in built:
            example += [_MISSING] * (candidates - len(example))
    sequences = [sequence for example in built for sequence in example]
    tokens = [sequence.tokens for sequence in sequences]
    second = np.array([sequence.second_start for sequence in sequences], np.int32)
    padding = np.array([sequence.padding_start for sequence in sequences], np.int32)
    labels = label_ids(spec, table) if labelled else None
    unknown = _unknown(tokens, tokenizer)
    return Examples(
        candidates, tokens, second, labels, cut, empty, unknown,
        padding_start=padding if spec.flatten else None, reading=reading,
    )  # fmt: skip


def _reading(spec: TaskSpec, built: Sequence[Sequence[_Sequence]]) -> Reading:
    """Returns the part of the texts that is in the sequences of the examples."""
    kept = sum(sequence.kept for example in built for sequence in example)
    lost = sum(sequence.lost for example in built for sequence in example)
    share = kept / max(1, kept + lost)
    if not spec.windows:
        return Reading(share=share)
    counts = [len(example) for example in built]
    return Reading(sum(count > 1 for count in counts), max(counts, default=1), share)


def _unknown(sequences: Sequence[np.ndarray], tokenizer: Tokenizer) -> float:
    """Returns the fraction of unknown tokens in sequences. Special tokens are not counted."""
    tokens = np.concatenate([np.zeros(0, np.int32), *sequences])
    special = [tokenizer.token_id(name) for name in SPECIALS]
    words = int(np.count_nonzero(~np.isin(tokens, special)))
    return int(np.count_nonzero(tokens == tokenizer.unknown_id)) / max(1, words)


def unknown_warning(unknown: float, what: str) -> tuple[str, ...]:
    """Returns a line that warns of unknown tokens, if there are many of them.

    Args:
      unknown: the fraction of unknown tokens.
      what: the name of the texts.

    >>> unknown_warning(0.84, "train")[0][:60]
    'warning: 84% of the tokens of train are unknown to the token'
    >>> unknown_warning(0.001, "train")
    ()
    """
    if unknown < _MANY_UNKNOWN:
        return ()
    return (
        f"warning: {unknown:.0%} of the tokens of {what} are unknown to the tokenizer, so the "
        "model cannot read them; was it trained on texts of this language?",
    )
