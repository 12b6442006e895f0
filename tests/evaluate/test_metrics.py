"""The metrics against their formulas in NumPy, and the errors that a user can cause."""

import numpy as np
import pytest

from gptjax.config import schema
from gptjax.errors import UserError
from gptjax.evaluate import metrics

CLASS = ("accuracy", "f1", "macro_f1", "matthews")
REGRESSION = ("pearson", "spearman", "mse")


def f1_by_hand(labels, predictions, positive):
    hit = np.sum((labels == positive) & (predictions == positive))
    wrong = np.sum((labels == positive) != (predictions == positive))
    return 2 * hit / (2 * hit + wrong)


def pearson_by_hand(x, y):
    x, y = x - x.mean(), y - y.mean()
    return x @ y / np.sqrt((x @ x) * (y @ y))


def ranks_by_hand(x):
    """Returns ranks from 1; equal values have the mean of their ranks."""
    return np.array([np.sum(x < v) + (np.sum(x == v) + 1) / 2 for v in x])


def matthews_by_hand(labels, predictions, num_labels):
    """Returns the multi-class R_k statistic, a correlation of the one-hot matrices."""
    y, p = np.eye(num_labels)[labels], np.eye(num_labels)[predictions]
    y, p = y - y.mean(0), p - p.mean(0)
    return np.sum(y * p) / np.sqrt(np.sum(y * y) * np.sum(p * p))


@pytest.mark.parametrize("num_labels", [2, 3, 7])
def test_class_metrics_equal_their_formulas(num_labels):
    rng = np.random.default_rng(num_labels)
    labels = rng.integers(num_labels, size=200)
    noise = rng.integers(num_labels, size=200)
    predictions = np.where(rng.random(200) < 0.6, labels, noise)
    names = CLASS if num_labels == 2 else ("accuracy", "macro_f1", "matthews")

    scores = metrics.compute(names, labels, predictions, num_labels)

    assert list(scores) == list(names)
    assert scores["accuracy"] == pytest.approx(np.mean(labels == predictions))
    per_class = [f1_by_hand(labels, predictions, c) for c in range(num_labels)]
    assert scores["macro_f1"] == pytest.approx(np.mean(per_class))
    assert scores["matthews"] == pytest.approx(matthews_by_hand(labels, predictions, num_labels))
    if num_labels == 2:
        assert scores["f1"] == pytest.approx(per_class[-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_regression_metrics_equal_their_formulas(dtype):
    rng = np.random.default_rng(0)
    labels = np.round(rng.uniform(0, 5, 150), 1).astype(dtype)  # rounded, so that there are ties
    predictions = (labels + rng.normal(size=150)).astype(dtype)
    scores = metrics.compute(REGRESSION, labels, predictions, 1)
    x, y = labels.astype(np.float64), predictions.astype(np.float64)
    assert scores["pearson"] == pytest.approx(pearson_by_hand(x, y))
    assert scores["spearman"] == pytest.approx(pearson_by_hand(ranks_by_hand(x), ranks_by_hand(y)))
    assert scores["mse"] == pytest.approx(np.mean((x - y) ** 2))


def test_spearman_sees_only_the_order():
    x = np.linspace(-2, 2, 30)
    scores = metrics.compute(("spearman", "pearson"), x, np.exp(3 * x), 1)
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["pearson"] < 0.9


@pytest.mark.parametrize("names", [("accuracy", "macro_f1", "matthews"), REGRESSION])
def test_scores_do_not_depend_on_the_order_of_examples(names):
    rng = np.random.default_rng(1)
    labels, predictions = rng.integers(4, size=(2, 60))
    order = rng.permutation(60)
    assert metrics.compute(names, labels[order], predictions[order], 4) == pytest.approx(
        metrics.compute(names, labels, predictions, 4)
    )


@pytest.mark.parametrize("constant", [0, 1])
def test_constant_class_predictions_are_defined(constant):
    labels = np.array([0, 1, 1, 0, 1])
    scores = metrics.compute(CLASS, labels, np.full(5, constant), 2)
    assert scores["matthews"] == 0.0
    assert scores["accuracy"] == pytest.approx([0.4, 0.6][constant])
    assert scores["f1"] == pytest.approx([0.0, 2 * 3 / (2 * 3 + 2)][constant])


@pytest.mark.parametrize("labels", [np.array([0, 0]), np.array([1, 1]), np.array([1])])
def test_splits_of_one_label_are_defined(labels):
    for predictions in (labels, 1 - labels):
        scores = metrics.compute(CLASS, labels, predictions, 2)
        assert all(np.isfinite(list(scores.values())))
        assert scores["accuracy"] == float(predictions[0] == labels[0])
        assert scores["matthews"] == 0.0


@pytest.mark.parametrize("wiggle", [0.0, 1e-15, 1e-14, 1e-13, 1e-11, 1e-6])
def test_nearly_constant_regression_is_defined_and_silent(wiggle):
    labels = np.array([1.0, 2.0, 3.0, 5.0])
    predictions = 3.0 + wiggle * np.arange(4)
    scores = metrics.compute(REGRESSION, labels, predictions, 1)
    assert all(np.isfinite(list(scores.values())))
    if wiggle <= 1e-15:
        assert scores["pearson"] == scores["spearman"] == 0.0
    if wiggle >= 1e-6:
        assert scores["spearman"] == pytest.approx(1.0)


def test_predictions_of_a_diverged_model_score_nan():
    scores = metrics.compute(REGRESSION, np.arange(3.0), np.array([1.0, np.nan, 2.0]), 1)
    assert list(scores) == list(REGRESSION)
    assert np.all(np.isnan(list(scores.values())))


def test_a_label_absent_from_the_split_does_not_lower_macro_f1():
    labels = np.array([0, 1, 0, 1])
    assert metrics.compute(("macro_f1",), labels, labels, 5)["macro_f1"] == 1.0


def test_empty_input_is_a_user_error():
    for names, dtype in ((("accuracy",), np.int32), (REGRESSION, np.float32)):
        empty = np.zeros(0, dtype)
        with pytest.raises(UserError, match="no labelled examples"):
            metrics.compute(names, empty, empty, 2)
        with pytest.raises(UserError, match="no labelled examples"):
            metrics.majority_baseline(names, empty, 2)


def test_arrays_that_do_not_match_are_a_bug_not_a_score():
    with pytest.raises(ValueError, match=r"want \[N\]"):
        metrics.compute(("accuracy",), np.zeros(3, int), np.zeros((3, 1), int), 2)


def test_f1_of_three_labels_names_the_remedy():
    labels = np.array([0, 1, 2])
    with pytest.raises(UserError, match="write 'macro_f1'"):
        metrics.compute(("f1",), labels, labels, 3)


def test_the_majority_baseline_is_its_share_and_the_variance():
    labels = np.array([2, 0, 2, 1, 2, 2])
    scores = metrics.majority_baseline(("accuracy", "matthews"), labels, 3)
    assert scores == {"accuracy": pytest.approx(4 / 6), "matthews": 0.0}

    targets = np.random.default_rng(2).normal(3.0, 1.0, 50).astype(np.float32)
    scores = metrics.majority_baseline(REGRESSION, targets, 1)
    assert scores["mse"] == pytest.approx(np.var(targets.astype(np.float64)))
    assert scores["pearson"] == scores["spearman"] == 0.0


def test_no_constant_answer_beats_the_majority_baseline():
    rng = np.random.default_rng(3)
    labels = rng.choice(4, size=80, p=[0.1, 0.5, 0.3, 0.1])
    best = max(
        metrics.compute(("accuracy",), labels, np.full(80, c), 4)["accuracy"] for c in (0, 1, 2, 3)
    )
    assert metrics.majority_baseline(("accuracy",), labels, 4)["accuracy"] == best


def test_every_fitting_metric_can_be_computed():
    values = np.array([0, 1, 1, 0])
    for kind, fitting in metrics.FITTING.items():
        assert metrics.parse(",".join(fitting), kind) == fitting
        assert list(metrics.compute(fitting, values, values, 2)) == list(fitting)
        default = metrics.parse("", kind)
        assert default
        assert set(default) <= set(fitting)
    assert set().union(*metrics.FITTING.values()) == set(metrics.NAMES)


def test_parse_keeps_the_order_and_forgives_spelling():
    assert metrics.parse(" F1 , accuracy,,f1 ", "entailment") == ("f1", "accuracy")
    assert metrics.parse("F1, accuracy", "similarity")[0] == "f1"


@pytest.mark.parametrize(("typo", "meant"), [("acuracy", "accuracy"), ("mathews", "matthews")])
def test_unknown_name_suggests_the_nearest(typo, meant):
    with pytest.raises(UserError, match=f"'{typo}'; did you mean '{meant}'"):
        metrics.parse(typo, "classification")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("pearson", "classification"), ("accuracy", "regression"), ("f1", "multiple_choice")],
)
def test_a_metric_that_does_not_fit_says_what_does(name, kind):
    with pytest.raises(UserError, match=f"{name}.*does not fit a {kind} task; write") as error:
        metrics.parse(name, kind)
    assert "\n" not in str(error.value)


def test_direction_agrees_with_what_a_perfect_answer_scores():
    labels = np.array([0, 1, 1, 0, 1])
    for name in metrics.NAMES:
        perfect = metrics.compute((name,), labels, labels, 2)[name]
        wrong = metrics.compute((name,), labels, 1 - labels, 2)[name]
        assert schema.higher_is_better(name) == (perfect > wrong)
    assert not schema.higher_is_better("loss")
