"""Temperature and calibration errors, against scikit-learn, a root finder and plain loops."""

import json

import numpy as np
import pytest
from scipy import optimize, special
from sklearn import metrics as sk

from gptjax.evaluate import calibration


def outputs(count=400, classes=3, scale=4.0, seed=0):
    """Returns logits that are too large by `scale`, and labels drawn from the right ones."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, classes))
    labels = (np.log(-np.log(rng.random(logits.shape))) * -1 + logits).argmax(axis=1)
    return (scale * logits).astype(np.float32), labels


def root(logits, labels, prior):
    """Returns the temperature at which the derivative of the loss by 1 / T is 0.

    Without the prior, the mean logit of the labels is there the mean logit that the model expects.
    """
    exact = logits.astype(np.float64)

    def derivative(inverse):
        expected = (special.softmax(inverse * exact, axis=1) * exact).sum(axis=1)
        slope = (expected - exact[np.arange(len(labels)), labels]).mean()
        return slope + prior * np.log(inverse) / inverse / len(labels)

    return 1 / optimize.brentq(derivative, 0.01, 100)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_temperature_is_the_root_of_the_derivative(scale):
    logits, labels = outputs(scale=scale)
    found = calibration.fit_temperature(logits, labels)
    assert found == pytest.approx(root(logits, labels, prior=1), rel=1e-5)
    # The labels were drawn from the logits before they were scaled.
    assert found == pytest.approx(scale, rel=0.2)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_many_rows_give_the_temperature_of_maximum_likelihood(scale, classes):
    for count, tolerance in ((1000, 0.01), (10_000, 0.001)):
        logits, labels = outputs(count, classes, scale)
        found = calibration.fit_temperature(logits, labels)
        assert found == pytest.approx(root(logits, labels, prior=0), rel=tolerance)


def test_few_rows_give_a_temperature_near_1():
    for label in range(3):  # without the prior, label 1 gives 20
        row = np.array([[0.5, -0.5, 1.0]], np.float32)
        assert 0.5 < calibration.fit_temperature(row, np.array([label])) < 2
    # Without the prior, these lie between 0.18 and 6.6.
    found = [calibration.fit_temperature(*outputs(15, 2, 1.0, seed)) for seed in range(40)]
    assert 0.3 < min(found) < max(found) < 3


def test_the_loss_is_that_of_scikit_learn():
    logits, labels = outputs(classes=4)
    for temperature in (0.5, 1.0, 3.0):
        values = special.softmax(logits.astype(np.float64) / temperature, axis=1)
        expected = sk.log_loss(labels, values, labels=range(4))
        assert calibration.task_loss(logits, labels, temperature) == pytest.approx(expected)
    fitted = calibration.fitted(logits, labels)
    found = fitted["temperature"]
    assert fitted["calibrated_task_loss"] == calibration.task_loss(logits, labels, found)

    def objective(t):
        return calibration.task_loss(logits, labels, t) + np.log(t) ** 2 / 2 / len(labels)

    assert objective(found) <= min(objective(t) for t in np.geomspace(0.05, 20, 400))
    assert fitted["calibrated_task_loss"] < calibration.task_loss(logits, labels)


def test_scaled_logits_have_a_scaled_temperature_except_for_the_prior():
    logits, labels = outputs()
    one, two = (calibration.fit_temperature(s * logits, labels) for s in (1, 2))
    assert two < 2 * one
    many = [np.concatenate([each] * 200) for each in (logits, labels)]
    one, two = (calibration.fit_temperature(s * many[0], many[1]) for s in (1, 2))
    assert two == pytest.approx(2 * one, rel=1e-4)


def test_without_errors_or_with_infinite_logits_the_temperature_is_1():
    logits, _ = outputs()
    right = logits.argmax(axis=1)
    assert calibration.fit_temperature(logits, right) == 1.0
    wrong = right.copy()
    wrong[0] = (right[0] + 1) % 3
    assert 0.05 <= calibration.fit_temperature(logits, wrong) < 1.0
    assert calibration.fit_temperature(logits, logits.argmin(axis=1)) == pytest.approx(20, rel=1e-4)
    logits[3, 1] = np.inf
    assert calibration.fit_temperature(logits, wrong) == 1.0


def test_the_calibration_error_is_its_formula():
    """A loop over the examples and the bins, and a case whose error is known."""
    logits, labels = outputs(count=300)
    values = special.softmax(logits.astype(np.float64), axis=1)
    error = 0.0
    for m in range(1, 16):
        inside = [i for i in range(300) if (m - 1) / 15 < values[i].max() <= m / 15]
        if inside:
            confidence = sum(values[i].max() for i in inside) / len(inside)
            accuracy = sum(values[i].argmax() == labels[i] for i in inside) / len(inside)
            error += len(inside) / 300 * abs(accuracy - confidence)
    assert calibration.expected_calibration_error(values, labels) == pytest.approx(error)
    known = np.array([[0.9, 0.1]] * 4)
    assert calibration.expected_calibration_error(known, np.array([0, 0, 1, 1])) == pytest.approx(
        0.4
    )
    assert calibration.expected_calibration_error(np.eye(2), np.arange(2)) == 0.0


def test_the_brier_score_is_that_of_scikit_learn():
    """scikit-learn's score of two classes counts only one of them, which is half the sum."""
    logits, labels = outputs(classes=2)
    values = special.softmax(logits.astype(np.float64), axis=1)
    expected = 2 * sk.brier_score_loss(labels, values[:, 1])
    assert calibration.brier_score(values, labels) == pytest.approx(expected)


def test_the_temperature_mends_what_was_too_confident():
    logits, labels = outputs(count=4000)
    half = len(labels) // 2
    temperature = calibration.fit_temperature(logits[:half], labels[:half])
    found = calibration.report(logits[half:], labels[half:], temperature)
    assert found["ece"] < 0.04 < 0.15 < found["ece_before"]
    assert found["brier"] < found["brier_before"]
    assert sum(found["bins"]["count"]) == sum(found["bins_before"]["count"]) == half
    assert json.loads(json.dumps(found)) == found
