"""Calibration: whether a confidence of 80 % is right in 80 of 100 cases, and the temperature.

The temperature is one number T > 0 that divides the logits (Guo et al. 2017, "On Calibration of
Modern Neural Networks"). Each validation fits it on its split, for the weights of that step. It
changes neither the weights nor the order of the classes. T > 1 makes the probabilities less
extreme. The fit has a weak prior, because few rows tell little about T.

In this file n is the number of examples and K the number of classes or answers.
"""

from typing import Any

import numpy as np
from scipy import special

from gptjax.config.schema import TaskKind

BINS = 15
"""The number of bins of the confidence, as in Guo et al. 2017. They have equal widths."""

# The range of the temperature. Beyond it the probabilities are practically 0, 1 or 1 / K.
_LOWEST, _HIGHEST = 0.05, 20.0
# The standard deviation of log T in the prior: two of three temperatures lie between 1 / e and e.
_PRIOR_DEVIATION = 1.0


def is_defined(kind: str) -> bool:
    """Returns whether a task has probabilities. A regression has none."""
    return kind != TaskKind.REGRESSION


def task_loss(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """Returns the mean of -log softmax(logits / temperature)[label] over the examples, in nats.

    Args:
      logits: float [n, K].
      labels: int [n], the class or the right answer.
      temperature: the divisor of the logits.
    """
    log_probabilities = special.log_softmax(logits.astype(np.float64) / temperature, axis=1)
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the most probable temperature, between 0.05 and 20.

    It has the smallest task_loss(T) + (log T)^2 / (2 s^2 n), with s = 1. The second term is a
    prior: log T has a normal distribution with the mean 0 and the standard deviation s. With one
    row the temperature is near 1. With 1,000 rows or more it differs by less than 1 % from that of
    the smallest `task_loss`.

    If no example is answered wrong, the loss falls with T down to 0. Such a split says nothing
    about errors, and the result is 1.0. It is also 1.0 if a logit is not finite.

    Args:
      logits: float [n, K].
      labels: int [n], the class or the right answer.
    """
    from scipy import optimize  # here, so that other uses do not wait for it

    chosen = logits[np.arange(len(labels)), labels]
    if not np.isfinite(logits).all() or np.all(chosen >= logits.max(axis=1)):
        return 1.0
    factor = 1 / (2 * _PRIOR_DEVIATION**2 * len(labels))
    found = optimize.minimize_scalar(
        lambda log_t: task_loss(logits, labels, np.exp(log_t)) + factor * log_t**2,
        bounds=(np.log(_LOWEST), np.log(_HIGHEST)),
        method="bounded",
        options={"xatol": 1e-7},
    )
    return float(np.exp(found.x))


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Returns the expected calibration error (ECE) of Guo et al. 2017, equation 3.

    It is the sum over the bins of (examples in the bin / n) * |accuracy - mean confidence|. The
    confidence is the probability of the most likely class.

    Args:
      probabilities: float [n, K]. Each row adds up to 1.
      labels: int [n], the class or the right answer.
    """
    count, confidence, accuracy = _bins(probabilities, labels)
    return float((count * np.abs(accuracy - confidence)).sum() / len(labels))


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Returns the score of Brier 1950, from 0 (best) to 2.

    It is the mean over the examples of the sum over the classes of (p - y)^2. y is 1 for the label
    and 0 for the other classes. Arguments are those of `expected_calibration_error`.
    """
    one_hot = np.eye(probabilities.shape[1])[labels]
    return float(np.square(probabilities - one_hot).sum(axis=1).mean())


def _bins(
    probabilities: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns for each bin of the confidence three numbers, as three arrays [BINS].

    They are the number of examples, their mean confidence, and their accuracy. The last two are 0
    in an empty bin. Bin m, counted from 1, has the confidences in ((m - 1) / BINS, m / BINS].
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    index = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(index, minlength=BINS)
    sums = (np.bincount(index, each, minlength=BINS) for each in (confidence, right))
    mean_confidence, accuracy = (each / np.maximum(count, 1) for each in sums)
    return count, mean_confidence, accuracy


def report(logits: np.ndarray, labels: np.ndarray, temperature: float) -> dict[str, Any]:
    """Returns the calibration of a split, with the temperature and without it.

    If the split is the one that the temperature was fitted on, the values are optimistic.

    Args:
      logits: float [n, K].
      labels: int [n], the class or the right answer.
      temperature: the temperature of the checkpoint.

    Returns:
      A dictionary that can be written as JSON: "ece", "brier", and "bins", a dictionary of the
      lists "count", "confidence" and "accuracy" with an entry for each bin. The same values without
      a temperature are "ece_before", "brier_before" and "bins_before".
    """
    found: dict[str, Any] = {}
    for divisor, end in ((temperature, ""), (1.0, "_before")):
        probabilities = special.softmax(logits.astype(np.float64) / divisor, axis=1)
        found[f"ece{end}"] = expected_calibration_error(probabilities, labels)
        found[f"brier{end}"] = brier_score(probabilities, labels)
        parts = (each.tolist() for each in _bins(probabilities, labels))
        found[f"bins{end}"] = dict(zip(("count", "confidence", "accuracy"), parts, strict=True))
    return found


def fitted(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns the scores of a validation that belong to its calibration.

    Args:
      logits: float [n, K].
      labels: int [n], the class or the right answer.

    Returns:
      {"calibrated_task_loss" (the `task_loss` with the temperature), "temperature"}.
    """
    temperature = fit_temperature(logits, labels)
    calibrated = task_loss(logits, labels, temperature)
    return {"calibrated_task_loss": calibrated, "temperature": temperature}
