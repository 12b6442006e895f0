"""Intervals against repeated rows, the binomial distribution, and SciPy's intervals and tests."""

import numpy as np
import pytest
from scipy import stats

from gptjax.evaluate import intervals, metrics

CLASS = ("accuracy", "f1", "macro_f1", "matthews")
REGRESSION = ("pearson", "spearman", "mse")


def answers(kind: str, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns labels, and the answers of two models that are right more or less often."""
    rng = np.random.default_rng(seed)
    if kind == "regression":
        labels = rng.integers(6, size=count).astype(np.float32)  # with ties
        one, other = (labels + rng.normal(0, s, count).round(1) for s in (1, 3))
        return labels, one.astype(np.float32), other.astype(np.float32)
    labels = rng.integers(int(kind), size=count)
    one, other = (
        np.where(rng.random(count) < p, labels, rng.integers(int(kind), size=count))
        for p in (0.7, 0.4)
    )
    return labels, one, other


@pytest.mark.parametrize("kind", ["2", "3", "regression"])
def test_a_weighted_score_is_the_score_of_repeated_rows(kind):
    names = REGRESSION if kind == "regression" else CLASS if kind == "2" else CLASS[::2] + CLASS[3:]
    num_labels = 0 if kind == "regression" else int(kind)
    labels, given, _ = answers(kind, 12)
    weights = np.random.default_rng(1).integers(0, 3, size=(20, 12))
    weights[0] = np.eye(12)[3]  # one row alone: nothing varies
    found = intervals.weighted_scores(names, weights.astype(float), labels, given, num_labels)
    for draw, counts in enumerate(weights):
        repeated = [np.repeat(each, counts) for each in (labels, given)]
        expected = metrics.compute(names, *repeated, num_labels)
        ours = {name: found[name][draw] for name in names}
        assert ours == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (1, 1), (3, 7), (930, 1000)])
def test_the_interval_of_accuracy_is_that_of_wilson(right, count):
    labels, given = np.zeros(count, int), (np.arange(count) >= right).astype(int)
    low, high = intervals.intervals(["f1", "accuracy"], labels, given, 2)["accuracy"]
    z = stats.norm.ppf(0.975)
    half = z * np.sqrt(right * (count - right) / count + z**2 / 4)
    expected = [(right + z**2 / 2 + each) / (count + z**2) for each in (-half, half)]
    assert [low, high] == pytest.approx(expected, abs=1e-12)
    assert 0 <= low <= right / count <= high <= 1
    assert low < high


@pytest.mark.parametrize("other", [0, 1, 4])
@pytest.mark.parametrize("one", range(9))
def test_a_difference_of_accuracies_is_no_chance_only_if_mcnemar_finds_it(one, other):
    """`one` rows only the first model answers right, and `other` rows only the second."""
    count = one + other
    if not count:
        return
    labels, wins = np.zeros(count, int), np.arange(count) < one
    difference, low, high = intervals.differences(
        ["accuracy"], labels, (~wins).astype(int), wins.astype(int), 2
    )["accuracy"]
    assert difference == pytest.approx((one - other) / count)
    assert low <= difference <= high
    if stats.binomtest(one, count).pvalue > 0.05:
        assert low <= 0 <= high
    elif not other:
        assert low > 0
    elif not one:
        assert high < 0


@pytest.mark.parametrize(("count", "chance"), [(1, True), (20, True), (40, False)])
def test_draws_that_are_all_equal_show_a_difference_only_in_many_rows(count, chance):
    labels = np.zeros(count, np.float32)
    found = intervals.differences(["mse"], labels, labels + 2, labels + 1, 0)["mse"]
    assert found == [3.0, 0.0 if chance else 3.0, 3.0]


def test_the_draws_of_accuracy_are_those_of_the_binomial_distribution():
    labels, given, _ = answers("3", 400)
    accuracy = np.mean(labels == given)
    drawn = intervals._draw(["accuracy"], labels, [given], 3)["accuracy"][0]
    low, high = intervals._middle(drawn)
    # The quantiles of 1,000 draws vary: these bounds are three standard errors wide.
    for bound, tail in ((low, 0.025), (high, 0.975)):
        error = 3 * np.sqrt(0.025 * 0.975 / intervals.DRAWS)
        between = stats.binom.ppf([tail - error, tail + error], 400, accuracy)
        assert between[0] - 1 <= bound * 400 <= between[1] + 1


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("mse", lambda x, y, axis: np.mean((x - y) ** 2, axis=axis)),
        ("pearson", lambda x, y, axis: stats.pearsonr(x, y, axis=axis).statistic),
    ],
)
def test_the_intervals_of_a_regression_are_those_of_scipy(name, score):
    labels, given, _ = answers("regression", 60)
    found = intervals.intervals([name], labels, given, 0)[name]
    theirs = stats.bootstrap(
        (labels, given), score, paired=True, n_resamples=1000, method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    # Both are estimates from 1,000 draws.
    np.testing.assert_allclose(found, theirs, atol=0.1 * (theirs.high - theirs.low))


@pytest.mark.parametrize("kind", ["2", "regression"])
def test_a_difference_is_paired(kind):
    names, num_labels = (REGRESSION, 0) if kind == "regression" else (CLASS, 2)
    labels, one, other = answers(kind, 200)
    same = intervals.differences(names, labels, one, one, num_labels)
    assert same == {name: [0.0, 0.0, 0.0] for name in names}
    there = intervals.differences(names, labels, one, other, num_labels)
    back = intervals.differences(names, labels, other, one, num_labels)
    scores = [metrics.compute(names, labels, each, num_labels) for each in (one, other)]
    for name in names:
        difference, low, high = there[name]
        assert difference == scores[0][name] - scores[1][name]
        assert low < difference < high
        # The draws of both calls are different, because the cells stand in another order.
        np.testing.assert_allclose([-difference, -high, -low], back[name], atol=(high - low) / 8)


def test_the_order_of_the_rows_changes_nothing_and_equal_calls_are_equal():
    labels, given, _ = answers("3", 100)
    order = np.random.default_rng(2).permutation(100)
    names = ["accuracy", "macro_f1"]
    found = intervals.intervals(names, labels, given, 3)
    assert intervals.intervals(names, labels[order], given[order], 3) == found


def test_answers_that_are_no_numbers_have_no_interval():
    labels, given, other = answers("regression", 20)
    given[3] = np.nan
    assert np.isnan(intervals.intervals(["mse"], labels, given, 0)["mse"]).all()
    assert np.isnan(intervals.differences(["mse"], labels, given, other, 0)["mse"]).all()
