"""The linear model that is shown beside a fine-tuned GPT: the score that a simple method reaches.

It reads the texts and labels of the same rows as GPT, and nothing of GPT. Its features are words
and pairs of neighbouring words with TF-IDF weights. The vectors of texts have length 1.

classification     the vector of the text
entailment         both vectors, their absolute difference, their product, and the word overlap
similarity         the sum of both vectors, their absolute difference, their product, and the word
                   overlap; none of these changes if the texts change places
regression         the features of similarity
multiple choice    for each answer: its vector, the absolute difference from the text's vector, the
                   product with it, and the word overlap

Classes are fitted by (multinomial) logistic regression, and numbers by ridge regression. A multiple
choice is fitted by conditional logistic regression (McFadden 1974): the probability of an answer is
the softmax of the scores of the answers of its row. This is the question that is asked, whereas a
logistic regression on single answers would also have to explain how likely an answer is by itself.
What all answers of a row share, such as the vector of the text, cancels in the softmax.

The strength of the regularisation is chosen by cross-validation on the training rows. The
validation rows choose nothing, so that their score is as honest as that of the test rows.

The result depends on the rows, not on their order. It does not depend on the clock either, unless
the time does not suffice. `LinearModel.reduced` then says what was left out.
"""

import dataclasses
import hashlib
import importlib
import itertools
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from gptjax.config.schema import TaskKind, TaskSpec, higher_is_better
from gptjax.data import tasks
from gptjax.data.tables.labelled import LabelledTable, as_text
from gptjax.evaluate import metrics
from gptjax.evaluate.score import never_stop

# A word is a run of letters and digits. Chinese and Japanese are written without spaces, so each of
# their characters is a word, as in most of their classifiers.
_CHARACTER = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = rf"[{_CHARACTER}]|[^\W{_CHARACTER}]+"

# The values of C from which cross-validation chooses. Ridge regression has alpha = 1 / C.
_STRENGTHS = (0.0625, 0.25, 1.0, 4.0, 16.0, 64.0, 256.0)
# The indices of the value that is tried first, and used if there is no time for more.
_FIRST = dict.fromkeys(TaskKind, 3) | {TaskKind.REGRESSION: 1}
# The number of folds of cross-validation, and how many of them are answered as the time allows.
_FOLDS = 5
_ANSWERED = (5, 2, 1)
_ITERATIONS = 100

# Limits of the memory. The optimiser keeps about 25 arrays as large as the coefficients, and the
# dictionary of words and word pairs takes up to 30 bytes for each character of the training texts.
_COEFFICIENTS = 2**21
_CHARACTERS = 2**25
_LIBRARIES = (
    "scipy.optimize", "scipy.sparse", "sklearn.dummy", "sklearn.feature_extraction.text",
    "sklearn.linear_model", "sklearn.model_selection",
)  # fmt: skip
# The number of rows on which the speed is measured.
_SAMPLE = 512
# `check_stop` is called once for so many rows that are read.
_CHECKED_ROWS = 256

T = TypeVar("T")

Columns = Sequence[Sequence[str]]
"""The texts of the rows, one sequence for each of `TaskSpec.text_columns`."""


class LeftOut(Exception):
    """There is no linear model for these rows. The message says why."""


class Budget:
    """The time that the linear model may take.

    Args:
      seconds: the time from now on.
      clock: a function that returns the time in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.seconds, self._clock = seconds, clock
        self._start = clock()

    @property
    def spent(self) -> float:
        """The seconds since the start."""
        return self._clock() - self._start

    @property
    def left(self) -> float:
        """The seconds that are left. The number is negative if the time is over."""
        return self.seconds - self.spent


@dataclasses.dataclass(frozen=True)
class LinearModel:
    """A fitted linear model: its answers, and how it was fitted."""

    answers: dict[str, np.ndarray]
    """Name of a split -> the answer to each row, as `score.predictions` returns them: int class ids
    or indices of answers; in a regression, float numbers."""
    strength: float
    """C, the inverse of the strength of the regularisation. In a ridge regression, 1 / alpha."""
    reduced: tuple[str, ...]
    """What was left out for lack of time or memory."""


class _Model(Protocol):
    def predict(self, features: Any) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class _Fit:
    """A fitted model of some of the features."""

    model: _Model
    columns: np.ndarray

    def predict(self, features: Any) -> np.ndarray:
        """Returns the answers to rows with all features."""
        return self.model.predict(features[:, self.columns])


def load_libraries() -> None:
    """Imports what the fit needs, which takes seconds at first: before a `Budget` starts."""
    for name in _LIBRARIES:
        importlib.import_module(name)


def fit(
    spec: TaskSpec,
    tables: Mapping[str, LabelledTable],
    metric: str,
    budget: Budget,
    check_stop: Callable[[], None] = never_stop,
) -> LinearModel:
    """Fits the linear model of a task on the split "train", and answers the other splits.

    Args:
      spec: the task, with the names of its labels.
      tables: name of a split -> its rows.
      metric: the metric by which cross-validation chooses.
      budget: the time. If it does not suffice, there are fewer folds, fewer values of C, or fewer
        training rows. The time is measured on a sample first, so it can be exceeded by a little.
      check_stop: a function that is called while rows are read and between two fits. It raises
        `StopRequested` if the run was asked to stop.

    Raises:
      LeftOut: the training texts have no words, or the time suffices for nothing.
    """
    from threadpoolctl import threadpool_limits

    # The libraries are imported before the time of anything is measured, and before their threads
    # are limited, because the limit holds for libraries that are loaded.
    load_libraries()
    # The vectors are short for BLAS: its threads would wait for each other most of the time. One
    # thread also adds in one order, so the result is the same on each machine of a kind.
    with threadpool_limits(limits=1):
        rows = _Rows(spec, tables, check_stop)
        features = _Features(spec, rows, budget, check_stop)
        search = _Search(spec, features.train, rows.labels["train"][: features.count], metric)
        search.run(budget, check_stop)
        fitted = search.final()
        answers = {name: fitted.predict(features.split(name)) for name in tables if name != "train"}
    reduced = (*features.reduced, *search.reduced)
    return LinearModel(answers, _STRENGTHS[search.best], reduced)


class _Rows:
    """The texts and labels of all splits. The training rows stand in the order of a hash.

    A part from the start of the training rows is thus a random sample. Rows of equal text stand
    together, so a fold of cross-validation has all of them or none, except at its ends.
    """

    def __init__(
        self, spec: TaskSpec, tables: Mapping[str, LabelledTable], check_stop: Callable[[], None]
    ):
        self.texts: dict[str, Columns] = {}
        self.labels: dict[str, np.ndarray] = {}
        for name, table in tables.items():
            cells = table.columns(spec.text_columns)
            self.texts[name] = [list(map(as_text, cells[each])) for each in spec.text_columns]
            self.labels[name] = tasks.label_ids(spec, table)
        columns, labels = self.texts["train"], self.labels["train"]
        keys = []
        cells_of_rows = _checked(zip(*columns, strict=True), check_stop)
        for row, label in zip(cells_of_rows, labels, strict=True):
            texts = sorted(row) if spec.kind.sums_candidates else row
            text = "\x1f".join(texts).encode(errors="surrogatepass")
            keys.append((hashlib.blake2b(text, digest_size=16).digest(), float(label)))
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self.texts["train"] = [[column[i] for i in order] for column in columns]
        self.labels["train"] = labels[order]


class _Features:
    """The features of all rows.

    Attributes:
      count: the number of training rows that are used.
      train: their features, a sparse matrix [count, F]; in a multiple choice [count * C, F].
      reduced: what was left out.
    """

    def __init__(self, spec: TaskSpec, rows: _Rows, budget: Budget, check_stop: Callable[[], None]):
        self._spec, self._rows, self._check_stop = spec, rows, check_stop
        self.reduced: list[str] = []
        total = len(rows.labels["train"])
        self.count = self._affordable_rows(budget)
        if self.count < total:
            self.reduced.append(f"trained on {self.count:,} of {total:,} rows")
        texts = [column[: self.count] for column in rows.texts["train"]]
        outputs = len(np.unique(rows.labels["train"][: self.count]))
        outputs = outputs if spec.kind.has_classes and outputs > 2 else 1
        blocks = 1 if spec.kind is TaskKind.CLASSIFICATION else 4
        limit = max(1, _COEFFICIENTS // (outputs * blocks))
        self._vectorizer = _fit_vectorizer(texts, limit, check_stop)
        if len(self._vectorizer.vocabulary_) == limit:
            self.reduced.append(f"the {limit:,} most frequent words and word pairs")
        self.train = _join(spec, texts, self._vectorizer, check_stop)

    def _affordable_rows(self, budget: Budget) -> int:
        """Returns the number of training rows that can be read in a third of the time.

        Raises:
          LeftOut: the time does not suffice for the rows of the other splits and a few of these.
        """
        texts = self._rows.texts["train"]
        lengths = np.sum([list(map(len, column)) for column in texts], axis=0)
        total = len(lengths)
        in_memory = int(np.searchsorted(np.cumsum(lengths), _CHARACTERS, side="right"))
        count = min(total, max(in_memory, min(total, _SAMPLE)))
        # A few training rows are not enough to measure the speed, so other rows are added to them.
        splits = ["train", *(name for name in self._rows.texts if name != "train")]
        sample = [
            list(itertools.islice(itertools.chain(*column), _SAMPLE))
            for column in zip(*(self._rows.texts[name] for name in splits), strict=True)
        ]
        check_stop, start = self._check_stop, budget.spent
        vectorizer = _fit_vectorizer(sample, _COEFFICIENTS, check_stop)
        _join(self._spec, sample, vectorizer, check_stop)
        seconds = (budget.spent - start) / len(sample[0])
        others = sum(len(self._rows.labels[name]) for name in self._rows.labels) - total
        affordable = int(budget.seconds / 3 / max(seconds, 1e-9)) - others
        if affordable < min(count, _SAMPLE):
            raise LeftOut(
                f"{others:,} validation and test rows would take {others * seconds:,.0f} s of "
                f"{budget.seconds:,.0f} s"
            )
        return min(count, affordable)

    def split(self, name: str) -> Any:
        """Returns the features of a split, a sparse matrix like `train`."""
        return _join(self._spec, self._rows.texts[name], self._vectorizer, self._check_stop)


def _checked(items: Iterable[T], check_stop: Callable[[], None]) -> Iterator[T]:
    """Yields the items, and calls `check_stop` now and then."""
    for i, item in enumerate(items):
        if i % _CHECKED_ROWS == 0:
            check_stop()
        yield item


def _fit_vectorizer(texts: Columns, limit: int, check_stop: Callable[[], None]) -> Any:
    """Returns the TF-IDF weights of the words and word pairs of all texts.

    The columns share one vocabulary. Each cell is a document.

    Args:
      texts: the texts.
      limit: the largest number of words and word pairs. The most frequent ones are kept.
      check_stop: a function that is called while the texts are read.

    Raises:
      LeftOut: no text has a word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        token_pattern=_WORD, ngram_range=(1, 2), sublinear_tf=True, max_features=limit
    )
    try:
        return vectorizer.fit(_checked(itertools.chain(*texts), check_stop))
    except ValueError as error:
        if "empty vocabulary" in str(error):
            raise LeftOut("the training texts have no words") from None
        raise


def _join(spec: TaskSpec, texts: Columns, vectorizer: Any, check_stop: Callable[[], None]) -> Any:
    """Returns the features of rows as a sparse matrix [N, F]; in a multiple choice [N * C, F]."""
    from scipy import sparse

    vectors = [vectorizer.transform(_checked(column, check_stop)) for column in texts]
    if spec.kind is TaskKind.CLASSIFICATION:
        return vectors[0]
    words = [_word_sets(_checked(column, check_stop)) for column in texts]
    parts = [
        _pair_features(spec.kind, vectors[0], vectors[i], _overlap(spec.kind, words[0], words[i]))
        for i in range(1, len(texts))
    ]
    features = sparse.vstack(parts, format="csr")
    # The rows of one answer stand together. Afterwards the answers of one row do.
    return features[np.arange(features.shape[0]).reshape(len(parts), -1).T.ravel()]


def _pair_features(kind: TaskKind, u: Any, v: Any, overlap: np.ndarray) -> Any:
    """Returns the features of pairs of texts from their vectors u and v, a sparse matrix [N, F].

    Args:
      kind: the kind of the task.
      u, v: sparse matrices [N, V].
      overlap: float64 [N, 4], from `_overlap`.
    """
    from scipy import sparse

    product = u.multiply(v)
    cosine = np.asarray(product.sum(axis=1)).reshape(-1, 1)
    if kind is TaskKind.MULTIPLE_CHOICE:
        vectors = [v]
    else:
        vectors = [u + v] if kind.sums_candidates else [u, v]
    parts = [*vectors, abs(u - v), product, sparse.csr_matrix(np.hstack([cosine, overlap]))]
    return sparse.hstack(parts, format="csr")


def _word_sets(texts: Iterable[str]) -> list[set[str]]:
    find = re.compile(_WORD).findall
    return [set(find(text.lower())) for text in texts]


def _overlap(kind: TaskKind, firsts: Sequence[set[str]], seconds: Sequence[set[str]]) -> np.ndarray:
    """Returns how many words two texts share, float64 [N, 4].

    The features are Jaccard's index, the parts of the first and of the second text that the other
    one contains, and the difference of the numbers of words, divided by the larger number. All are
    0 if a text has no words. If the order of the texts means nothing, the two parts are sorted, and
    the difference is absolute.

    Args:
      kind: the kind of the task.
      firsts, seconds: the distinct words of the texts.
    """
    a, b = (np.array([len(words) for words in each], np.float64) for each in (firsts, seconds))
    shared = np.array([len(x & y) for x, y in zip(firsts, seconds, strict=True)], np.float64)
    jaccard = shared / np.maximum(a + b - shared, 1)
    parts = np.stack([shared / np.maximum(a, 1), shared / np.maximum(b, 1)], axis=1)
    difference = (a - b) / np.maximum(np.maximum(a, b), 1)
    if kind.sums_candidates:
        parts, difference = np.sort(parts, axis=1), np.abs(difference)
    return np.column_stack([jaccard, parts, difference])


class _Search:
    """The fits, and the choice of C by cross-validation.

    Attributes:
      best: the index of the chosen value in `_STRENGTHS`.
      reduced: what was left out.
    """

    def __init__(self, spec: TaskSpec, features: Any, labels: np.ndarray, metric: str):
        self._spec, self._metric = spec, metric
        self._features, self._labels = features, labels
        self.best = _FIRST[spec.kind]
        self.reduced: list[str] = []
        # The index of a value of C -> the fit on all rows.
        self._fitted: dict[int, _Fit] = {}

    def run(self, budget: Budget, check_stop: Callable[[], None]) -> None:
        """Chooses C, with as many folds, values and rows as the time allows.

        Raises:
          LeftOut: the time does not suffice for one fit.
        """
        self._limit_rows(budget)
        count, start = len(self._labels), budget.spent
        self.final()
        seconds = budget.spent - start
        # The search tries three values or more, unless the time is over.
        answered = [n for n in _ANSWERED if seconds * (3 * n + 1) < budget.left]
        if not answered or count < 2 * _FOLDS:
            self.reduced.append("no cross-validation")
            return
        if answered[0] < _FOLDS:
            self.reduced.append(f"{answered[0]} of {_FOLDS} folds of the cross-validation")
        self._climb(answered[0], seconds, budget, check_stop)

    def final(self) -> _Fit:
        """Returns the fit on all rows with the chosen value of C."""
        if self.best not in self._fitted:
            self._fitted[self.best] = self.fit(self.best)
        return self._fitted[self.best]

    def _limit_rows(self, budget: Budget) -> None:
        """Leaves out training rows until one fit seems to take a third of the time that is left."""
        sample = min(len(self._labels), _SAMPLE)
        start = budget.spent
        self.fit(self.best, np.arange(sample))
        measured = budget.spent - start

        def seconds(count: int) -> float:
            # A fit takes time for each row, feature and output. More rows have more features, but
            # not in proportion, so this is rather more than the time will be.
            outputs = self._num_outputs(count) / self._num_outputs(sample)
            return measured * count / sample * outputs

        count = total = len(self._labels)
        while seconds(count) > budget.left / 3 and count > sample:
            count = max(int(0.8 * count), sample)
        if seconds(count) > budget.left:
            raise LeftOut(
                f"one fit of {count:,} rows takes {seconds(count):,.0f} s of "
                f"{budget.seconds:,.0f} s"
            )
        if count < total:
            self.reduced.append(f"fitted on {count:,} of {total:,} rows")
            self._features, self._labels = self._part(np.arange(count)), self._labels[:count]

    def _num_outputs(self, count: int) -> int:
        return len(np.unique(self._labels[:count])) if self._spec.kind.has_classes else 1

    def _climb(
        self, folds: int, seconds: float, budget: Budget, check_stop: Callable[[], None]
    ) -> None:
        """Goes from the first value of C to larger ones, or else to smaller ones, while it helps.

        Args:
          folds: the number of folds that are answered.
          seconds: the time of one fit on all rows.
          budget: the time.
          check_stop: a function that is called between two fits.
        """
        sign = 1 if higher_is_better(self._metric) else -1
        longest = 0.0

        def score(index: int) -> float:
            nonlocal longest
            start = budget.spent
            found = sign * self._cross_validate(index, folds, check_stop)
            longest = max(longest, budget.spent - start)
            return found

        first = self.best
        highest = score(first)
        for step in (1, -1):
            index = first + step
            while 0 <= index < len(_STRENGTHS):
                # A fit with a larger C takes longer.
                if 1.5 * longest + 2 * seconds > budget.left:
                    self.reduced.append("fewer values of C")
                    return
                if (found := score(index)) <= highest:
                    break
                self.best, highest = index, found
                index += step
            if self.best != first:
                return

    def _cross_validate(self, index: int, folds: int, check_stop: Callable[[], None]) -> float:
        """Returns the score of the rows of some folds. A fit on the other folds answers each."""
        from sklearn.model_selection import KFold

        labels, answers = [], []
        for others, held_out in itertools.islice(KFold(_FOLDS).split(self._labels), folds):
            check_stop()
            labels.append(self._labels[held_out])
            answers.append(self.fit(index, others).predict(self._part(held_out)))
        arrays = np.concatenate(labels), np.concatenate(answers)
        return metrics.compute((self._metric,), *arrays, len(self._spec.labels))[self._metric]

    def _part(self, rows: np.ndarray) -> Any:
        """Returns the features of some training rows."""
        if self._spec.kind is TaskKind.MULTIPLE_CHOICE:
            count = self._spec.num_candidates
            rows = (rows[:, None] * count + np.arange(count)).ravel()
        return self._features[rows]

    def fit(self, index: int, rows: np.ndarray | None = None) -> _Fit:
        """Returns the model with a value of C, fitted on some training rows; None means all.

        Args:
          index: the index of C in `_STRENGTHS`.
          rows: the indices of the rows.
        """
        from sklearn.dummy import DummyClassifier
        from sklearn.linear_model import LogisticRegression, Ridge

        rows = np.arange(len(self._labels)) if rows is None else rows
        strength, labels, features = _STRENGTHS[index], self._labels[rows], self._part(rows)
        # A feature that none of the rows has would get no weight, and would cost time.
        columns = np.flatnonzero(features.getnnz(axis=0))
        model: Any
        if self._spec.kind is TaskKind.REGRESSION:
            model = Ridge(alpha=1 / strength)
        elif self._spec.kind is TaskKind.MULTIPLE_CHOICE:
            model = ConditionalLogit(strength, self._spec.num_candidates)
        elif len(np.unique(labels)) == 1:  # logistic regression needs two classes
            model = DummyClassifier(strategy="most_frequent")
        else:
            model = LogisticRegression(C=strength, max_iter=_ITERATIONS)
        with warnings.catch_warnings():
            # scikit-learn warns if a fit has not come to its end, which changes few answers, and if
            # there are nearly as many classes as rows.
            warnings.simplefilter("ignore", UserWarning)
            return _Fit(model.fit(features[:, columns], labels), columns)


class ConditionalLogit:
    """Conditional logistic regression (McFadden 1974): one answer of each row is right.

    The probability of answer c of row i is the softmax over c of w . x_ic. The fit minimises the
    sum of w . w / 2 and C times the negative log-likelihood. With two answers, this is logistic
    regression without intercept on the differences of the features of the two answers.

    Args:
      strength: C.
      num_answers: the number of answers of each row.
    """

    def __init__(self, strength: float, num_answers: int):
        self._strength, self._num_answers = strength, num_answers
        self.weights = np.zeros(0)

    def fit(self, features: Any, labels: np.ndarray) -> "ConditionalLogit":
        """Fits the weights.

        Args:
          features: a sparse matrix [N * A, F]. Row i * A + c has the features of answer c of row i.
          labels: int [N], the index of the right answer.
        """
        from scipy import optimize, special

        right = np.arange(len(labels)) * self._num_answers + labels

        def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
            log_NA = special.log_softmax(self._scores(features, weights), axis=1)
            slope = np.exp(log_NA).ravel()
            slope[right] -= 1
            value = weights @ weights / 2 - self._strength * log_NA.ravel()[right].sum()
            return value, weights + self._strength * (features.T @ slope)

        start = np.zeros(features.shape[1])
        options = {"maxiter": _ITERATIONS}
        found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
        self.weights = found.x
        return self

    def predict(self, features: Any) -> np.ndarray:
        """Returns int [N], the index of the best answer of each row."""
        return self._scores(features, self.weights).argmax(axis=1)

    def _scores(self, features: Any, weights: np.ndarray) -> np.ndarray:
        scores_NA: np.ndarray = (features @ weights).reshape(-1, self._num_answers)
        return scores_NA
