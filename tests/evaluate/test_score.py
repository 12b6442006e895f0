"""Losses and outputs on a split against definitions: each token and example counts once."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from sklearn import metrics as sk

from gptjax.data.packing import Packer
from gptjax.errors import StopRequested
from gptjax.evaluate import metrics, score
from gptjax.evaluate.score import Evaluator
from gptjax.model import gpt, losses
from gptjax.model.gpt import GPT
from gptjax.model.objective import Objective

pytestmark = pytest.mark.devices(8)

WINDOW, ROWS = 16, 8


@pytest.fixture(scope="module")
def language_model():
    """Returns an evaluator of a small model on eight devices, and parameters."""
    model = GPT(small.config())
    return Evaluator(model, small.mesh(8)), small.params(model)


def nats(model, params, windows) -> np.ndarray:
    """Returns -log p of all tokens but the first of each window, in float64."""
    found = []

    @jax.jit
    def logits(ids):
        ones = jnp.ones_like(ids)
        positions = jnp.arange(WINDOW)[None]
        states = gpt.run(model, params, ids, ones, positions, method="hidden")
        return gpt.run(model, params, states, method="lm_logits")

    for window in windows:
        padded = np.zeros((1, WINDOW), np.int32)
        padded[0, : len(window)] = window
        out = np.asarray(logits(padded), np.float64)[0]
        log_p = out - np.log(np.exp(out - out.max(-1, keepdims=True)).sum(-1, keepdims=True))
        log_p -= out.max(-1, keepdims=True)
        found += [-log_p[i, window[i + 1]] for i in range(len(window) - 1)]
    return np.array(found)


@pytest.mark.parametrize("length", [2, 16, 17, 18, 200, 256, 259])
def test_the_loss_is_the_mean_over_all_predicted_tokens(language_model, length):
    evaluator, params = language_model
    stream = np.random.default_rng(length).integers(0, 97, length).astype(np.int32)
    windows = [stream[i : i + WINDOW] for i in range(0, length, WINDOW)]
    expected = nats(evaluator.model, params, windows)
    assert len(expected) == length - len(windows)
    found = evaluator.language_model(params, stream, WINDOW, ROWS)
    assert found["loss"] == pytest.approx(expected.mean(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected.mean()), rel=1e-4)


def test_a_limit_takes_the_first_batches(language_model):
    evaluator, params = language_model
    stream = np.random.default_rng(0).integers(0, 97, 1000).astype(np.int32)
    found = evaluator.language_model(params, stream, WINDOW, ROWS, limit=2)
    cut = stream[: 2 * ROWS * WINDOW]
    assert found == evaluator.language_model(params, cut, WINDOW, ROWS)


def test_a_stop_is_obeyed_between_batches(language_model):
    evaluator, params = language_model
    stream = np.zeros(1000, np.int32)
    calls = []

    def check_stop():
        calls.append(1)
        if len(calls) == 3:
            raise StopRequested

    stopping = dataclasses.replace(evaluator, check_stop=check_stop)
    with pytest.raises(StopRequested):
        stopping.language_model(params, stream, WINDOW, ROWS)
    assert len(calls) == 3


@pytest.fixture(scope="module")
def scorer():
    """Returns a function (kind, examples, batch size) -> (task, outputs)."""
    found = {}

    def run(kind, examples, batch_size):
        if kind not in found:
            spec, _ = small.examples(kind)
            model = gpt.make_model(small.config(), spec)
            evaluator = Evaluator(model, small.mesh(1), Objective(kind))
            found[kind] = spec, small.params(model), evaluator
        spec, params, evaluator = found[kind]
        packer = Packer(examples.lengths, batch_size, 64)
        return spec, evaluator.outputs(params, examples, packer)

    return run


@pytest.mark.parametrize("kind", ["classification", "multiple_choice", "regression"])
def test_every_example_is_answered_once_whatever_the_batch_size(scorer, kind):
    spec, examples = small.examples(kind, count=23)
    _, whole = scorer(kind, examples, 23)
    assert whole.logits.shape == (23, 1 if kind == "regression" else 3)
    assert len(np.unique(whole.logits[:, 0].round(6))) > 15
    for batch_size in (5, 64):
        _, outputs = scorer(kind, examples, batch_size)
        np.testing.assert_allclose(outputs.logits, whole.logits, atol=2e-5)
        assert outputs.lm_loss == pytest.approx(whole.lm_loss, rel=1e-5)
        assert outputs.task_loss == pytest.approx(whole.task_loss, rel=1e-4)
    labels = examples.labels
    if kind == "regression":
        expected = ((whole.logits[:, 0].astype(np.float64) - labels) ** 2).mean()
    else:
        expected = sk.log_loss(labels, softmax(whole.logits), labels=[0, 1, 2])
    assert whole.task_loss == pytest.approx(expected, rel=1e-4)
    assert spec.kind == kind


@pytest.mark.parametrize("kind", ["classification", "multiple_choice", "regression"])
def test_without_labels_no_task_loss_is_computed(monkeypatch, kind):
    spec, examples = small.examples(kind, count=7)
    model = gpt.make_model(small.config(num_layers=1), spec)
    params, packer = small.params(model), Packer(examples.lengths, 4, 64)
    evaluator = Evaluator(model, small.mesh(1), Objective(kind))
    labelled = evaluator.outputs(params, examples, packer)
    monkeypatch.setattr(losses, "task_loss", None)  # a call would fail
    unlabelled = dataclasses.replace(examples, labels=None)
    outputs = evaluator.outputs(params, unlabelled, packer)
    assert labelled.task_loss > 0
    assert outputs.task_loss is None
    assert outputs.lm_loss == pytest.approx(labelled.lm_loss, rel=1e-6)
    np.testing.assert_allclose(outputs.logits, labelled.logits, atol=1e-6)


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits.astype(np.float64))
    return exp / exp.sum(axis=1, keepdims=True)


def test_scores_are_those_of_scikit_learn_over_all_examples(scorer):
    spec, examples = small.examples("classification", count=23, seed=3)
    _, outputs = scorer("classification", examples, 5)
    found = outputs.logits.argmax(axis=1)
    names = ("accuracy", "macro_f1", "matthews")
    scores = metrics.compute(names, examples.labels, score.predictions(spec, outputs.logits), 3)
    assert scores == {
        "accuracy": pytest.approx(np.mean(found == examples.labels)),
        "macro_f1": pytest.approx(sk.f1_score(examples.labels, found, average="macro")),
        "matthews": pytest.approx(sk.matthews_corrcoef(examples.labels, found)),
    }


def test_the_joint_loss_adds_its_parts():
    task = small.task("classification")
    evaluator = Evaluator(task.model, small.mesh(1), Objective("classification", 0.3))
    packer = Packer(task.examples.lengths, 4, 0)
    scores = evaluator.task(task.params, task.examples, packer, task.spec, ("accuracy",))
    assert list(scores) == ["loss", "task_loss", "lm_loss", "accuracy"]
    assert scores["loss"] == pytest.approx(scores["task_loss"] + 0.3 * scores["lm_loss"])
