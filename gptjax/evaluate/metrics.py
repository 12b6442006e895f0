"""Metrics: scores of predictions against labels, computed by scikit-learn and SciPy.

The functions take the arrays of a whole split, gathered from all hosts. F1, Matthews and the
correlations are not means over examples, so they cannot be summed over batches as losses can.
"""

import difflib
import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gptjax.config.schema import TaskKind, split_names
from gptjax.errors import UserError, require

_CLASS_METRICS = ("accuracy", "f1", "macro_f1", "matthews")
_REGRESSION_METRICS = ("pearson", "spearman", "mse")

NAMES: tuple[str, ...] = (*_CLASS_METRICS, *_REGRESSION_METRICS)
"""All names that `finetune.metrics` accepts."""

FITTING: dict[TaskKind, tuple[str, ...]] = dict.fromkeys(TaskKind, _CLASS_METRICS) | {
    # The label is only the index of the right answer among the answers of its row. Such an index is
    # no class, so F1 and Matthews have no meaning.
    TaskKind.MULTIPLE_CHOICE: ("accuracy",),
    TaskKind.REGRESSION: _REGRESSION_METRICS,
}
"""Kind of task -> the metrics that are defined for it."""

PERCENT = frozenset({"accuracy", "f1", "macro_f1"})
"""The metrics that are shown as percentages."""


def parse(names: str, kind: str) -> tuple[str, ...]:
    """Splits a comma-separated string of metric names, and checks that they fit the kind of task.

    Args:
      names: comma-separated names such as ``"f1, accuracy"``. An empty string means accuracy, or in
        a regression all of its metrics.
      kind: a value of `TaskKind`.

    Returns:
      The distinct names, in the order of the string. The first metric selects the best checkpoint.

    Raises:
      UserError: an unknown name, or a metric that is not defined for `kind`.

    >>> parse("f1, accuracy", "entailment")
    ('f1', 'accuracy')
    """
    fitting = FITTING[TaskKind(kind)]
    chosen = tuple(dict.fromkeys(split_names(names.lower())))
    for name in chosen:
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
    return chosen or (fitting if kind == TaskKind.REGRESSION else ("accuracy",))


def compute(
    names: Iterable[str], labels: np.ndarray, predictions: np.ndarray, num_labels: int
) -> dict[str, float]:
    """Computes metrics of predictions.

    A score is 0.0 if its formula gives 0/0. This happens to a correlation if all labels or all
    predictions are equal, and to F1 if neither contains the second label. If any prediction is not
    finite, all scores are NaN.

    Args:
      names: metric names from `parse`.
      labels: [N], int class ids, or float targets of a regression.
      predictions: [N], class ids or numbers, as in `labels`.
      num_labels: the number of classes. The metrics of a regression do not use it.

    Returns:
      name -> score, in the order of `names`. Scores are fractions, not percentages.

    Raises:
      UserError: there are no examples, or `names` has ``f1`` and there are more than two classes.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or labels.ndim != 1:
        raise ValueError(f"labels {labels.shape} and predictions {predictions.shape}: want [N]")
    require(labels.size, "no labelled examples to score: the split is empty; give it rows")
    if not np.all(np.isfinite(predictions)):
        return dict.fromkeys(names, float("nan"))
    return {n: float(_score(n, labels, predictions, num_labels)) for n in names}


def majority_baseline(
    names: Sequence[str], labels: np.ndarray, num_labels: int
) -> dict[str, float]:
    """Computes the metrics of the majority-class baseline, or of the mean baseline in a regression.

    The majority-class baseline predicts the most frequent label for every row. The mean baseline
    predicts the mean of the targets. Arguments, result and errors are those of `compute`.
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
    # These libraries are imported here so that pretraining and generation do not wait for them.
    from scipy import stats
    from sklearn import metrics as sk

    if name == "f1":
        require(
            num_labels == 2,
            f"`finetune.metrics`: 'f1' is for two labels, this task has {num_labels}; "
            "write 'macro_f1'",
        )
        # Both arrays become booleans (whether the label is the second label), so a split
        # without the second label needs no special case.
        labels, predictions = labels == 1, predictions == 1
    if name in _REGRESSION_METRICS:
        labels, predictions = labels.astype(np.float64), predictions.astype(np.float64)
    scores: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "accuracy": sk.accuracy_score,
        "f1": functools.partial(sk.f1_score, zero_division=0.0),
        # This is the mean of F1 over the labels that occur in the labels or the predictions. A
        # small split may lack a label, which then has no F1.
        "macro_f1": functools.partial(sk.f1_score, average="macro", zero_division=0.0),
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
    # If the range of the values is below this fraction of their mean, a correlation would be mostly
    # rounding error. SciPy warns about inaccurate results at a spread of about this size.
    return bool(np.ptp(values) <= 1e-12 * np.abs(np.mean(values)))
