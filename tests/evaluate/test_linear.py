"""The linear model against scikit-learn and NumPy, its invariances, its time, and bad rows."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from gptjax.config.schema import TaskKind, TaskSpec
from gptjax.data import tasks
from gptjax.data.tables.labelled import LabelledTable
from gptjax.errors import StopRequested
from gptjax.evaluate import linear
from gptjax.evaluate.linear import Budget, LeftOut

WORDS = (
    "red", "green", "blue", "old", "new", "big", "small", "cat", "dog", "bird", "house", "tree",
    "river", "stone", "king", "Queen",
)  # fmt: skip
METRIC = dict.fromkeys(TaskKind, "accuracy") | {TaskKind.REGRESSION: "pearson"}
LONG = 3600.0


def sentences(rng, count: int, length: int = 6) -> list[str]:
    return [" ".join(rng.choice(WORDS, size=rng.integers(2, length))) for _ in range(count)]


def rows(kind: TaskKind, count: int, seed: int = 0) -> dict[str, list]:
    """Returns columns with labels that words, or shared words, explain in part."""
    rng = np.random.default_rng(seed)
    text, other = sentences(rng, count), sentences(rng, count)
    noise = rng.random(count) < 0.15
    if kind is TaskKind.CLASSIFICATION:
        label = [("cat" in t.split()) ^ bool(n) for t, n in zip(text, noise, strict=True)]
        return {"text": text, "label": [str(int(value)) for value in label]}
    shared = [len({*a.split()} & {*b.split()}) for a, b in zip(text, other, strict=True)]
    if kind is TaskKind.REGRESSION:
        label = [s + rng.normal(0, 0.3) for s in shared]
        return {"text": text, "pair": other, "label": label}
    if kind is TaskKind.MULTIPLE_CHOICE:
        right = rng.integers(3, size=count)
        answers = [sentences(rng, count) for _ in range(3)]
        for i, c in enumerate(right):
            if not noise[i]:
                answers[c][i] += " " + text[i].split()[0] + " stone"
        return {
            "text": text, "label": [str(c) for c in right], **dict(zip("abc", answers, strict=True))
        }  # fmt: skip
    label = [str(int((s > 0) ^ bool(n))) for s, n in zip(shared, noise, strict=True)]
    return {"text": text, "pair": other, "label": label}


def spec_of(kind: TaskKind, table: LabelledTable) -> TaskSpec:
    spec = TaskSpec(
        kind, "text", "pair" if kind.is_pair else "",
        tuple("abc") if kind is TaskKind.MULTIPLE_CHOICE else (),
    )  # fmt: skip
    return tasks.find_labels(spec, table)


def fit(kind: TaskKind, train: dict[str, list], test: dict[str, list], budget=None, **more):
    tables = {"train": LabelledTable(train, "train"), "test": LabelledTable(test, "test")}
    budget = budget or Budget(LONG)
    return linear.fit(spec_of(kind, tables["train"]), tables, METRIC[kind], budget, **more)


def reordered(columns: dict[str, list], order) -> dict[str, list]:
    return {name: [cells[i] for i in order] for name, cells in columns.items()}


def test_texts_are_answered_as_by_scikit_learn():
    train, test = (rows(TaskKind.CLASSIFICATION, 150, seed) for seed in (0, 1))
    found = fit(TaskKind.CLASSIFICATION, train, test)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=found.strength, max_iter=1000)
    model.fit(vectorizer.fit_transform(train["text"]), np.array(train["label"], int))
    features = vectorizer.transform(test["text"])
    # Where the model is sure, the answers do not depend on rounding.
    sure = np.abs(model.decision_function(features)) > 1e-3
    assert sure.mean() > 0.95
    np.testing.assert_array_equal(found.answers["test"][sure], model.predict(features)[sure])
    assert np.mean(found.answers["test"] == np.array(test["label"], int)) > 0.75


def symmetric_features(vectorizer, one: list[str], other: list[str]) -> np.ndarray:
    """Returns the features of similarity in NumPy, from their definition."""
    found = []
    for first, second in zip(one, other, strict=True):
        u, v = vectorizer.transform([first, second]).toarray()
        a, b = set(first.lower().split()), set(second.lower().split())
        parts = sorted([len(a & b) / len(a), len(a & b) / len(b)])
        difference = abs(len(a) - len(b)) / max(len(a), len(b))
        overlap = [u @ v, len(a & b) / len(a | b), *parts, difference]
        found.append(np.concatenate([u + v, abs(u - v), u * v, overlap]))
    return np.array(found)


def test_numbers_are_answered_by_the_closed_form_of_ridge_regression():
    train, test = (rows(TaskKind.REGRESSION, 80, seed) for seed in (0, 1))
    found = fit(TaskKind.REGRESSION, train, test)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    vectorizer.fit(train["text"] + train["pair"])
    x, z = (symmetric_features(vectorizer, c["text"], c["pair"]) for c in (train, test))
    y = np.array(train["label"], np.float32).astype(float)
    mean = x.mean(axis=0)
    x, z = x - mean, z - mean
    weights = np.linalg.solve(x.T @ x + np.eye(len(mean)) / found.strength, x.T @ (y - y.mean()))
    # The fit of scikit-learn is iterative, with a tolerance of 1e-4.
    np.testing.assert_allclose(found.answers["test"], z @ weights + y.mean(), atol=2e-3)


def test_a_choice_between_two_is_logistic_regression_on_differences():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(80, 2, 5)), rng.integers(2, size=80)
    model = linear.ConditionalLogit(0.7, 2).fit(sparse.csr_array(features.reshape(160, 5)), labels)
    theirs = LogisticRegression(C=0.7, fit_intercept=False, tol=1e-8, max_iter=1000)
    theirs.fit(features[:, 1] - features[:, 0], labels)
    np.testing.assert_allclose(model.weights, theirs.coef_[0], atol=1e-4)


def test_a_choice_whose_answers_are_classes_is_multinomial_regression():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(90, 4)), rng.integers(3, size=90)
    features = np.stack([np.kron(np.eye(3), row) for row in x]).reshape(270, 12)
    model = linear.ConditionalLogit(0.5, 3).fit(sparse.csr_array(features), labels)
    theirs = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-8, max_iter=1000)
    theirs.fit(x, labels)
    np.testing.assert_allclose(model.weights.reshape(3, 4), theirs.coef_, atol=1e-4)
    np.testing.assert_array_equal(model.predict(sparse.csr_array(features)), theirs.predict(x))


@pytest.mark.parametrize("kind", TaskKind)
def test_the_order_of_the_rows_changes_nothing(kind):
    train, test = (rows(kind, 60, seed) for seed in (0, 1))
    rng = np.random.default_rng(3)
    found = fit(kind, train, test)
    order, places = rng.permutation(60), rng.permutation(60)
    again = fit(kind, reordered(train, order), reordered(test, places))
    assert again.strength == found.strength
    np.testing.assert_array_equal(again.answers["test"], found.answers["test"][places])


@pytest.mark.parametrize("kind", [TaskKind.SIMILARITY, TaskKind.REGRESSION])
def test_texts_of_a_similarity_may_change_places(kind):
    train, test = (rows(kind, 60, seed) for seed in (0, 1))
    found = fit(kind, train, test)

    def swapped(columns):
        some = np.random.default_rng(4).random(60) < 0.5
        pairs = zip(columns["text"], columns["pair"], some, strict=True)
        both = [(b, a) if swap else (a, b) for a, b, swap in pairs]
        text, pair = map(list, zip(*both, strict=True))
        return columns | {"text": text, "pair": pair}

    again = fit(kind, swapped(train), swapped(test))
    np.testing.assert_array_equal(again.answers["test"], found.answers["test"])


@pytest.mark.parametrize("kind", [k for k in TaskKind if k is not TaskKind.CLASSIFICATION])
def test_pairs_and_choices_are_learned(kind):
    train, test = (rows(kind, 300, seed) for seed in (0, 1))
    found = fit(kind, train, test).answers["test"]
    labels = np.array(test["label"], float)
    if kind is TaskKind.REGRESSION:
        assert np.corrcoef(found, labels)[0, 1] > 0.8
    else:
        assert np.mean(found == labels) > 0.7


def test_words_of_texts_without_spaces_are_characters():
    good, bad = "这部电影很好看", "这部电影很难看"
    columns = {"text": [good, bad] * 10, "label": ["1", "0"] * 10}
    test = {"text": ["很好", "很难"], "label": ["1", "0"]}
    assert fit(TaskKind.CLASSIFICATION, columns, test).answers["test"].tolist() == [1, 0]


class Work:
    """A clock that counts the work of the linear model instead of the time.

    Each text that is read costs `reading` seconds. Each row of a fit costs `fitting` seconds.
    """

    def __init__(self, monkeypatch, reading: float, fitting: float):
        self.now = 0.0
        fit_rows, join = linear._Search.fit, linear._join

        def slow_fit(search, index, rows=None):
            self.now += fitting * (len(search._labels) if rows is None else len(rows))
            return fit_rows(search, index, rows)

        def slow_join(spec, texts, *more):
            self.now += reading * len(texts[0])
            return join(spec, texts, *more)

        monkeypatch.setattr(linear._Search, "fit", slow_fit)
        monkeypatch.setattr(linear, "_join", slow_join)

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("reading", "fitting", "reduced"),
    [
        (0.0, 1e-4, ""),
        (0.0, 6e-4, "fewer values of C"),
        (0.0, 9e-4, "2 of 5 folds"),
        (0.0, 2e-3, "1 of 5 folds"),
        (0.0, 25e-4, "no cross-validation"),
        (0.0, 7e-3, "fitted on 736 of 1,800 rows; no cross-validation"),
        (1e-3, 0.0, ""),
        (6e-3, 0.0, "trained on 1,061 of 1,800 rows"),
    ],
)
def test_the_time_is_kept(monkeypatch, reading, fitting, reduced):
    budget = Budget(20.0, Work(monkeypatch, reading, fitting))
    train, test = rows(TaskKind.CLASSIFICATION, 1800), rows(TaskKind.CLASSIFICATION, 50, 1)
    found = fit(TaskKind.CLASSIFICATION, train, test, budget)
    assert budget.spent <= 20
    text = "; ".join(found.reduced)
    assert reduced in text
    assert bool(text) == bool(reduced)
    assert np.mean(found.answers["test"] == np.array(test["label"], int)) > 0.6


@pytest.mark.parametrize(
    ("reading", "fitting", "words"), [(1.0, 0.0, "50 validation"), (0.0, 1.0, "one fit")]
)
def test_without_time_the_model_is_left_out(monkeypatch, reading, fitting, words):
    budget = Budget(20.0, Work(monkeypatch, reading, fitting))
    train, test = rows(TaskKind.CLASSIFICATION, 1800), rows(TaskKind.CLASSIFICATION, 50, 1)
    with pytest.raises(LeftOut, match=words):
        fit(TaskKind.CLASSIFICATION, train, test, budget)


@pytest.mark.parametrize(("count", "others"), [(40, 3000), (512, 3000), (512, 0)])
def test_few_training_rows_beside_many_others_keep_the_time_too(monkeypatch, count, others):
    budget = Budget(20.0, Work(monkeypatch, 5e-3, 0.0))
    train, test = rows(TaskKind.CLASSIFICATION, count), rows(TaskKind.CLASSIFICATION, others + 1, 1)
    if others:
        with pytest.raises(LeftOut, match="3,001 validation and test rows would take 15 s of 20 s"):
            fit(TaskKind.CLASSIFICATION, train, test, budget)
    else:
        assert fit(TaskKind.CLASSIFICATION, train, test, budget).reduced == ()
    assert budget.spent < 20


@pytest.mark.parametrize("kind", TaskKind)
@pytest.mark.parametrize("after_fits", [False, True])
def test_a_request_to_stop_is_noticed_while_rows_are_read(monkeypatch, kind, after_fits):
    asked = not after_fits
    run = linear._Search.run

    def stop():
        if asked:
            raise StopRequested

    def then_ask(search, *more):
        nonlocal asked
        run(search, *more)
        asked = True

    monkeypatch.setattr(linear._Search, "run", then_ask if after_fits else None)
    with pytest.raises(StopRequested):
        fit(kind, rows(kind, 30), rows(kind, 10, 1), check_stop=stop)


def test_training_rows_have_a_limit_of_memory(monkeypatch):
    monkeypatch.setattr(linear, "_CHARACTERS", 20_000)
    monkeypatch.setattr(linear, "_COEFFICIENTS", 100)
    train = rows(TaskKind.CLASSIFICATION, 1800)
    found = fit(TaskKind.CLASSIFICATION, train, rows(TaskKind.CLASSIFICATION, 9))
    count = int(found.reduced[0].split()[2].replace(",", ""))
    assert found.reduced == (
        f"trained on {count:,} of 1,800 rows", "the 100 most frequent words and word pairs"
    )  # fmt: skip
    mean = np.mean([len(text) for text in train["text"]])
    assert count == pytest.approx(20_000 / mean, rel=0.1)


BAD = {
    "a class with one row": {"text": ["a b", "c d"] * 10 + ["e"], "label": ["0", "1"] * 10 + ["2"]},
    "all texts equal": {"text": ["same text"] * 12, "label": ["0", "1", "1"] * 4},
    "some empty texts": {"text": ["", "b c"] * 10, "label": ["0", "1"] * 10},
    "two rows": {"text": ["a", "b"], "label": ["0", "1"]},
    "one row of the other class": {"text": ["a b"] * 20, "label": ["0"] * 19 + ["1"]},
    "None": {"text": [None, "b c"] * 10, "label": ["0", "1"] * 10},
    "half a character": {"text": ["\ud800 a", "b"] * 10, "label": ["0", "1"] * 10},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_have_a_score(name):
    found = fit(TaskKind.CLASSIFICATION, BAD[name], BAD[name])
    assert set(found.answers["test"]) <= {0, 1, 2}
    # Texts that are all equal have the most frequent label.
    if name == "all texts equal":
        assert set(found.answers["test"]) == {1}


@pytest.mark.parametrize("kind", TaskKind)
def test_texts_without_words_are_left_out(kind):
    columns = rows(kind, 20)
    columns |= {name: ["", " ", "!?", "  "] * 5 for name in columns if name != "label"}
    with pytest.raises(LeftOut, match="no words"):
        fit(kind, columns, columns)


def test_thousands_of_labels_take_no_longer():
    rng = np.random.default_rng(0)
    columns = {"text": sentences(rng, 6000), "label": [str(i % 5000) for i in range(6000)]}
    budget, outcome = Budget(2.0), ()
    try:
        outcome = fit(
            TaskKind.CLASSIFICATION, columns, reordered(columns, range(50)), budget
        ).reduced
    except LeftOut as error:
        outcome = (str(error),)
    assert "rows" in " ".join(outcome)
    assert budget.spent < 20
