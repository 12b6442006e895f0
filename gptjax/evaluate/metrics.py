"""Scores of predictions against labels, by scikit-learn and SciPy, and the score to beat.

The functions take whole arrays, gathered from all hosts: F1, Matthews and the correlations are not
means over examples, so they cannot be summed batch by batch as the losses are.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gptjax.config.schema import TaskKind
from gptjax.errors import UserError, require

_CLASS_METRICS = ("accuracy", "f1", "macro_f1", "matthews")
_REGRESSION_METRICS = ("pearson", "spearman", "mse")

NAMES: tuple[str, ...] = (*_CLASS_METRICS, *_REGRESSION_METRICS)
"""Every name that `finetune.metrics` takes."""

FITTING: dict[TaskKind, tuple[str, ...]] = {
    TaskKind.CLASSIFICATION: _CLASS_METRICS,
    TaskKind.ENTAILMENT: _CLASS_METRICS,
    TaskKind.SIMILARITY: _CLASS_METRICS,
    # A label is the place of the right answer in its row, not a class with an F1 of its own.
    TaskKind.MULTIPLE_CHOICE: ("accuracy",),
    TaskKind.REGRESSION: _REGRESSION_METRICS,
}
"""Kind of task -> the metrics that mean something for it."""

DEFAULTS: dict[TaskKind, tuple[str, ...]] = {
    kind: _REGRESSION_METRICS if kind is TaskKind.REGRESSION else ("accuracy",) for kind in FITTING
}
"""Kind of task -> the metrics when the user names none."""

PRIMARY = 0
"""``names[PRIMARY]`` selects the best checkpoint."""

PERCENT = frozenset({"accuracy", "f1", "macro_f1"})
"""The metrics that people read as percentages."""


def parse(names: str, kind: str) -> tuple[str, ...]:
    """The metric names in a comma-separated string, checked against the kind of task.

    Args:
      names: such as ``"f1, accuracy"``; the first selects the best checkpoint. Empty: `DEFAULTS`.
      kind: a `TaskKind`.

    Raises:
      UserError: for an unknown name, or one that means nothing for `kind`.

    >>> parse("f1, accuracy", "entailment")
    ('f1', 'accuracy')
    """
    fitting = FITTING[TaskKind(kind)]
    asked = tuple(dict.fromkeys(n for n in (p.strip().lower() for p in names.split(",")) if n))
    for name in asked:
        if name not in NAMES:
            nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
            raise UserError(
                f"`finetune.metrics`: no metric {name!r}; did you mean {nearest!r}? "
                f"Metrics of a {kind} task: {', '.join(fitting)}"
            )
        require(
            name in fitting,
            f"`finetune.metrics`: {name!r} does not fit a {kind} task; "
            f"write {' or '.join(fitting)}",
        )
    return asked or DEFAULTS[TaskKind(kind)]


def compute(
    names: Iterable[str], labels: np.ndarray, predictions: np.ndarray, num_labels: int
) -> dict[str, float]:
    """The score of `predictions` by each of `names`.

    A score that its formula leaves as 0/0 (a correlation with a constant, F1 without a positive)
    is 0.0; every score of predictions that are not finite is NaN.

    Args:
      names: from `parse`.
      labels: [N] int class ids, or float targets of a regression.
      predictions: [N] like `labels`.
      num_labels: number of classes; not used by the metrics of a regression.

    Returns:
      name -> score, in the order of `names`. Fractions, not percentages.

    Raises:
      UserError: for no examples at all, or ``f1`` of more than two classes.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or labels.ndim != 1:
        raise ValueError(f"labels {labels.shape} and predictions {predictions.shape}: want [N]")
    require(labels.size, "no labelled examples to score: the split is empty; give it rows")
    if not np.all(np.isfinite(predictions)):
        return dict.fromkeys(names, float("nan"))
    return {n: float(_score(n, labels, predictions, num_labels)) for n in names}


def floor(names: Sequence[str], labels: np.ndarray, num_labels: int) -> dict[str, float]:
    """What always answering the most frequent label scores (regression: the mean label).

    A model below it has learned nothing of the task. Arguments and errors as in `compute`.
    """
    labels = np.asarray(labels)
    if not labels.size:
        return compute(names, labels, labels, num_labels)
    if set(names) & set(_REGRESSION_METRICS):
        answer = np.full(labels.shape, labels.mean(dtype=np.float64))
    else:
        answer = np.full(labels.shape, np.bincount(labels, minlength=num_labels).argmax())
    return compute(names, labels, answer, num_labels)


def _score(name: str, labels: np.ndarray, predictions: np.ndarray, num_labels: int) -> float:
    # Imported here: a run that only pretrains, or generates, should not wait for them.
    from scipy import stats
    from sklearn import metrics as sk

    if name == "f1":
        require(
            num_labels == 2,
            f"`finetune.metrics`: 'f1' is for two labels, this task has {num_labels}; "
            "write 'macro_f1'",
        )
        # As 0/1 for "is the last label", so that a split without that label is no special case.
        return sk.f1_score(labels == 1, predictions == 1, zero_division=0.0)
    if name == "macro_f1":
        # Over the labels that occur: one absent from a small split should not count as a failure.
        return sk.f1_score(labels, predictions, average="macro", zero_division=0.0)
    if name in _REGRESSION_METRICS:
        labels, predictions = labels.astype(np.float64), predictions.astype(np.float64)
    scores: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "accuracy": sk.accuracy_score,
        "mse": sk.mean_squared_error,
        "matthews": sk.matthews_corrcoef,
        "pearson": lambda y, p: stats.pearsonr(y, p).statistic,
        "spearman": lambda y, p: stats.spearmanr(y, p).statistic,
    }
    correlation = name in ("matthews", "pearson", "spearman")
    if correlation and (_constant(labels) or _constant(predictions)):
        return 0.0
    return scores[name](labels, predictions)


def _constant(values: np.ndarray) -> bool:
    # The bound is above the one under which SciPy warns that a correlation is rounding noise.
    return bool(np.ptp(values) <= 1e-12 * np.abs(np.mean(values)))
