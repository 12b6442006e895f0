"""Confidence intervals of scores: Wilson's for an accuracy, the percentile bootstrap for others.

The interval of an accuracy is the score interval of Wilson ("Probable Inference, the Law of
Succession, and Statistical Inference", Journal of the American Statistical Association 22, 1927).
It is also right for few rows and near 0 or 1 (Brown, Cai and DasGupta 2001), where the bootstrap is
too narrow: if all rows are right, all draws are, and their interval would have no width.

The bootstrap draws as many rows as there are, with replacement, and computes the score of the drawn
rows. It does so many times. A 95 % interval holds the middle 95 % of these scores (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3). The interval describes the chance
in the choice of the rows. It does not describe the chance of the training, which another seed
shows.

A draw is a weight for each row: the number of times that the row was drawn. All metrics are written
here as functions of weights, so that all draws are computed at once. Rows with the same label and
the same answers form one cell, and the draws give weights to cells. In a classification there are
few cells, however many rows there are.

Letters of the shapes: R draws, M cells, K classes.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from gptjax.evaluate import metrics

LEVEL = 0.95
"""The probability of the intervals."""
DRAWS = 1000
"""The number of draws."""

# The largest number of weights in memory at a time.
_WEIGHTS = 2**21
# If the cells are so many that there would be more weights than this, there are fewer draws.
_ALL_WEIGHTS = 2**27
_MIN_DRAWS = 100
# With fewer rows than this, draws that are all equal say nothing about other rows.
_FEW_ROWS = 30
_SEED = 0


def intervals(
    names: Sequence[str], labels: np.ndarray, predictions: np.ndarray, num_labels: int
) -> dict[str, list[float]]:
    """Computes the interval of each score.

    The draws are the same in each call with the same arguments.

    Args:
      names: names from `metrics.parse`.
      labels: [N], int class ids, or float targets of a regression.
      predictions: [N], class ids or numbers, as in `labels`.
      num_labels: the number of classes. The metrics of a regression do not use it.

    Returns:
      name -> [low, high]. Both are NaN if a prediction is not finite.
    """
    drawn = [name for name in names if name != "accuracy"]
    scores = _draw(drawn, labels, [predictions], num_labels) if drawn else {}
    return {
        name: _middle(scores[name][0]) if name in scores else _wilson(labels == predictions)
        for name in names
    }


def differences(
    names: Sequence[str],
    labels: np.ndarray,
    predictions: np.ndarray,
    others: np.ndarray,
    num_labels: int,
) -> dict[str, list[float]]:
    """Computes how much higher the scores of one model are than those of another, with intervals.

    The comparison is paired: both models are scored on the same draws, so the rows that both answer
    in the same way add no noise.

    Two things widen the interval of the bootstrap, because it is too narrow for few rows. In an
    accuracy it is joined with the exact interval of `_exact_difference`. So it holds 0 if the exact
    test of McNemar (1947) finds no difference. If all draws of fewer than 30 rows are equal, it is
    extended to 0.

    Args:
      names: names from `metrics.parse`.
      labels: [N], int class ids, or float targets of a regression.
      predictions: [N], the answers of the one model.
      others: [N], the answers of the other model.
      num_labels: the number of classes. The metrics of a regression do not use it.

    Returns:
      name -> [difference, low, high]. The difference is that of all rows.
    """
    one, other = (metrics.compute(names, labels, p, num_labels) for p in (predictions, others))
    scores = _draw(names, labels, [predictions, others], num_labels)
    found = {}
    for name in names:
        difference = one[name] - other[name]
        low, high = _middle(scores[name][0] - scores[name][1])
        if name == "accuracy":
            exact = _exact_difference(labels == predictions, labels == others)
            # By rounding, the difference could lie beyond the bounds.
            low, high = min(low, exact[0], difference), max(high, exact[1], difference)
        if low == high and len(labels) < _FEW_ROWS:
            low, high = min(low, 0.0), max(high, 0.0)
        found[name] = [difference, low, high]
    return found


def _wilson(right: np.ndarray) -> list[float]:
    """Returns Wilson's interval of an accuracy.

    Args:
      right: bool [n], whether the answer to a row is right.
    """
    return _proportion(int(right.sum()), len(right), "wilson")


def _exact_difference(one: np.ndarray, other: np.ndarray) -> list[float]:
    """Returns the exact interval of the difference of two accuracies on the same rows.

    Only the m rows that one model alone answers right matter. The share of them that the first
    model answers right has the interval of Clopper and Pearson (1934), [l, h]. The difference then
    has [2 l - 1, 2 h - 1] m / n. The interval treats m as known, so it is too narrow by itself.

    Args:
      one, other: bool [n], whether the answer of each model is right.
    """
    wins, losses = int((one & ~other).sum()), int((other & ~one).sum())
    m = wins + losses
    shares = _proportion(wins, m, "exact") if m else [0.5, 0.5]
    return [(2 * share - 1) * m / len(one) for share in shares]


def _proportion(successes: int, trials: int, method: str) -> list[float]:
    """Returns SciPy's interval of a proportion, with the probability `LEVEL`."""
    from scipy import stats  # here, because this import takes long

    found = stats.binomtest(successes, trials).proportion_ci(LEVEL, method)
    # The interval holds the proportion, but rounding could put a bound beyond it.
    share = successes / trials
    return [min(float(found.low), share), max(float(found.high), share)]


def _middle(scores: np.ndarray) -> list[float]:
    """Returns the bounds of the middle 95 % of scores [R]."""
    tail = (1 - LEVEL) / 2
    return [float(bound) for bound in np.quantile(scores, [tail, 1 - tail])]


def _draw(
    names: Sequence[str], labels: np.ndarray, predictions: Sequence[np.ndarray], num_labels: int
) -> dict[str, np.ndarray]:
    """Returns name -> scores [P, R] of P models on the same R draws."""
    if not all(np.all(np.isfinite(each)) for each in predictions):
        return {name: np.full((len(predictions), 1), np.nan) for name in names}
    columns = np.stack([np.asarray(each, np.float64) for each in (labels, *predictions)])
    # `unique` sorts the cells, so the intervals do not depend on the order of the rows.
    cells, counts = np.unique(columns, axis=1, return_counts=True)
    parts = [
        [weighted_scores(names, w_RM, cells[0], answers, num_labels) for answers in cells[1:]]
        for w_RM in _weights(counts)
    ]
    models = range(len(predictions))
    return {
        name: np.stack([np.concatenate([part[i][name] for part in parts]) for i in models])
        for name in names
    }


def _weights(counts: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the weights of the draws, float64 [R, M], in pieces that fit into memory.

    The numbers of drawn rows in the cells have a multinomial distribution.

    Args:
      counts: [M], the number of rows in each cell.
    """
    rng = np.random.default_rng(_SEED)
    rows, cells = counts.sum(), len(counts)
    left = min(DRAWS, max(_MIN_DRAWS, _ALL_WEIGHTS // cells))
    while left:
        count = min(left, max(1, _WEIGHTS // cells))
        yield rng.multinomial(rows, counts / rows, size=count).astype(np.float64)
        left -= count


def weighted_scores(
    names: Sequence[str],
    w_RM: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    num_labels: int,
) -> dict[str, np.ndarray]:
    """Computes metrics of weighted rows, for several sets of weights.

    If the weights are integers, a score is that of `metrics.compute` on rows that are repeated as
    often as their weight says.

    Args:
      names: names from `metrics.parse`.
      w_RM: [R, M], the weights of M rows.
      labels: [M], class ids or targets.
      predictions: [M], class ids or numbers.
      num_labels: K, the number of classes.

    Returns:
      name -> scores, float64 [R].
    """
    if set(names) & set(metrics.FITTING[metrics.TaskKind.REGRESSION]):
        x, y = labels.astype(np.float64), predictions.astype(np.float64)
        return {name: _regression_score(name, w_RM, x, y) for name in names}
    classes, answers = labels.astype(np.int64), predictions.astype(np.int64)
    right = classes == answers
    true_RK = _class_weights(w_RM, classes, num_labels)
    given_RK = _class_weights(w_RM, answers, num_labels)
    right_RK = _class_weights(w_RM * right, classes, num_labels)
    return {name: _class_score(name, true_RK, given_RK, right_RK) for name in names}


def _class_weights(w_RM: np.ndarray, classes: np.ndarray, num_labels: int) -> np.ndarray:
    """Returns the sum of the weights of each class, [R, K]."""
    from scipy import sparse

    rows = np.arange(len(classes))
    indicator = sparse.csr_array(
        (np.ones(len(classes)), (rows, classes)), shape=(len(classes), num_labels)
    )
    return np.asarray(w_RM @ indicator)


def _class_score(
    name: str, true_RK: np.ndarray, given_RK: np.ndarray, right_RK: np.ndarray
) -> np.ndarray:
    """Returns a score [R] from three sums of weights for each class.

    Args:
      name: a metric of a classification.
      true_RK: the weights of the rows that have the class as their label.
      given_RK: the weights of the rows that have the class as their answer.
      right_RK: the weights of the rows that have it as both.
    """
    total, right = true_RK.sum(axis=1), right_RK.sum(axis=1)
    if name == "accuracy":
        return right / total
    if name == "matthews":
        # Gorodkin (2004), which is also scikit-learn's formula.
        covariance = right * total - (true_RK * given_RK).sum(axis=1)
        spread = [total**2 - (each**2).sum(axis=1) for each in (true_RK, given_RK)]
        return _ratio(covariance, np.sqrt(spread[0] * spread[1]))
    f1_RK = _ratio(2 * right_RK, true_RK + given_RK)
    if name == "f1":
        return f1_RK[:, 1]
    return f1_RK.sum(axis=1) / ((true_RK + given_RK) > 0).sum(axis=1)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Returns the quotient, or 0.0 where the denominator is 0."""
    zero = denominator == 0
    return np.where(zero, 0.0, numerator / np.where(zero, 1.0, denominator))


def _regression_score(name: str, w_RM: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the scores [R] of predictions y [M] for targets x [M]."""
    if name == "mse":
        return np.asarray(w_RM @ (x - y) ** 2 / w_RM.sum(axis=1))
    if name == "spearman":
        return _correlation(w_RM, _ranks(w_RM, x), _ranks(w_RM, y))
    # The mean of all rows is taken off first, because sums of squares of large numbers with a small
    # spread would be mostly rounding error.
    return _correlation(w_RM, (x - x.mean())[None], (y - y.mean())[None])


def _ranks(w_RM: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Returns the rank of each value in each draw, [R, M]. Equal values have their mean rank."""
    _, group = np.unique(x, return_inverse=True)
    weights_RG = _class_weights(w_RM, group, int(group.max()) + 1)
    ranks_RG = np.cumsum(weights_RG, axis=1) - (weights_RG - 1) / 2
    ranks_RM: np.ndarray = ranks_RG[:, group]
    return ranks_RM


def _correlation(w_RM: np.ndarray, x_RM: np.ndarray, y_RM: np.ndarray) -> np.ndarray:
    """Returns the Pearson correlation [R] of weighted values; 0.0 if x or y is constant.

    Args:
      w_RM: the weights.
      x_RM, y_RM: the values, [R, M] or [1, M].
    """

    rows_R1 = w_RM.sum(axis=1, keepdims=True)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.einsum("rm,rm->r", w_RM, np.broadcast_to(values, w_RM.shape))[:, None] / rows_R1

    x_RM, y_RM = x_RM - mean(x_RM), y_RM - mean(y_RM)
    spread = [np.sqrt(mean(each**2))[:, 0] for each in (x_RM, y_RM)]
    size = [np.abs(each).max() for each in (x_RM, y_RM)]
    constant = [each <= 1e-12 * bound for each, bound in zip(spread, size, strict=True)]
    covariance = mean(x_RM * y_RM)[:, 0]
    return np.where(constant[0] | constant[1], 0.0, _ratio(covariance, spread[0] * spread[1]))
