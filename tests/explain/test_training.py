"""The training step of the page, against slopes of the losses in float64 NumPy."""

import dataclasses

import jax
import loaded
import numpy as np
import pytest
import reference

from gptjax.config import schema
from gptjax.explain import outcome, training

KINDS = ("", "classification", "entailment", "similarity", "multiple_choice", "regression")
LABELS = loaded.LABELS


def step(gpt, row):
    return training.step(gpt, row, outcome.of(gpt, gpt.params, row.batch))


def with_experiment(gpt, **changes):
    """The model as if it came from a run with these fields of the fine-tuning."""
    experiment = schema.from_dict(schema.Experiment, gpt.meta.experiment, "test")
    finetune = dataclasses.replace(experiment.finetune, **changes)
    experiment = dataclasses.replace(experiment, finetune=finetune)
    meta = dataclasses.replace(gpt.meta, experiment=schema.to_dict(experiment))
    return dataclasses.replace(gpt, meta=meta)


def losses(gpt, row, params):
    """The mean LM loss and the task loss of a row (None without a task), in float64."""
    sequences = [(row.batch.tokens[0, a:b], None) for a, b in row.sequences]
    if gpt.task is None:
        ((tokens, _),) = sequences
        return reference.lm_nats(params, reference.hidden(params, tokens), tokens).mean(), None
    _, _, task, lm = reference.run(params, gpt.task.kind, [(sequences, row.batch.labels[0, 0])])
    return lm, task


def walk(params, direction, size):
    return jax.tree.map(lambda p, d: p + size * np.asarray(d, np.float64), params, direction)


def random_like(x):
    return np.random.default_rng(x.size).normal(size=x.shape)


@pytest.mark.parametrize(
    "kind",
    ["", "similarity", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:]
                         if kind != "similarity")],
)  # fmt: skip
def test_the_norms_are_the_slopes_of_the_losses(kind):
    gpt = loaded.model(kind)
    row = gpt.read(loaded.texts(gpt), LABELS.get(kind))
    found = step(gpt, row)
    params = reference.cast(gpt.params)
    names = ("lm", "task") if kind else ("lm",)
    gradients = {}
    for i, name in enumerate(names):
        objective = training.Objective(gpt.task.kind, 0.0) if i else training.Objective()
        gradient = reference.cast(training._gradient(gpt.opened, objective, gpt.params, row.batch))
        gradients[name] = gradient
        norm = found["norms"][name]
        # Along a gradient a loss has the slope |gradient|^2.
        up, down = (losses(gpt, row, walk(params, gradient, s))[i] for s in (1e-5, -1e-5))
        assert abs((up - down) / 2e-5 / norm**2 - 1) < 2e-3
        # Along any other direction it has the slope <gradient, direction>.
        other = jax.tree.map(random_like, params)
        up, down = (losses(gpt, row, walk(params, other, s))[i] for s in (1e-6, -1e-6))
        pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True)
        expected = sum((g * d).sum() for g, d in pairs)
        assert abs((up - down) / 2e-6 - expected) < 2e-3 * norm
        squares = sum(group[name] ** 2 for group in found["groups"])
        np.testing.assert_allclose(squares, norm**2, rtol=1e-5)
        for layer, head in ((0, 1), (1, 2)):
            attention = gradient["blocks"]["attention"]
            own = [
                attention["qkv"]["kernel"][layer, :, :, head],
                attention["out"]["kernel"][layer, head],
            ]
            expected = np.sqrt(sum((x**2).sum() for x in own))
            np.testing.assert_allclose(found["heads"][name][layer][head], expected, rtol=1e-5)
    if kind:
        leaves = [np.concatenate([x.ravel() for x in jax.tree.leaves(gradients[n])]) for n in names]
        cosine = leaves[0] @ leaves[1] / np.prod([np.linalg.norm(x) for x in leaves])
        np.testing.assert_allclose(found["cosine"], cosine, atol=1e-5)
    before = losses(gpt, row, params)
    np.testing.assert_allclose(found["before"]["lm"], before[0], rtol=1e-5)
    if kind:
        np.testing.assert_allclose(found["before"]["task"], before[1], rtol=1e-4)


@pytest.mark.parametrize(
    "freeze", [1, *(pytest.param(count, marks=pytest.mark.slow) for count in (0, 2))]
)
def test_the_update_is_the_first_one_of_adam(freeze):
    gpt = with_experiment(loaded.model("classification"), freeze=freeze)
    row = gpt.read(loaded.texts(gpt), 1)
    found = step(gpt, row)
    config = gpt.experiment.finetune.optimizer
    params = reference.cast(gpt.params)
    lm, task = (
        reference.cast(training._gradient(gpt.opened, objective, gpt.params, row.batch))
        for objective in (training.Objective(), training.Objective(gpt.task.kind, 0.0))
    )
    total = jax.tree.map(lambda a, b: b + loaded.LM_WEIGHT * a, lm, task)
    trained = {name: value for name, value in total.items()
               if not freeze or not name.endswith("embedding")}  # fmt: skip
    if freeze:
        trained["blocks"] = jax.tree.map(lambda x: x[freeze:], trained["blocks"])
    norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(trained)))
    clip = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
    changed = jax.tree.map(np.copy, params)

    def update(path, new, gradient, first):
        names = [key.key for key in path]
        decayed = names[-1] == "kernel" or names[-1].endswith("embedding")
        g = clip * gradient[first:] if names[0] == "blocks" else clip * gradient
        place = new[first:] if names[0] == "blocks" else new
        direction = g / (np.abs(g) + config.epsilon) + decayed * config.weight_decay * place
        place -= config.learning_rate * direction

    for path, new in jax.tree_util.tree_leaves_with_path(changed):
        names = [key.key for key in path]
        gradient = total
        for name in names:
            gradient = gradient[name]
        if not freeze or not names[0].endswith("embedding"):
            update(path, new, gradient, freeze if names[0] == "blocks" else 0)
    after = losses(gpt, row, changed)
    np.testing.assert_allclose(found["after"]["lm"], after[0], rtol=1e-4)
    np.testing.assert_allclose(found["after"]["task"], after[1], rtol=1e-3, atol=1e-5)
    assert found["after"]["total"] < found["before"]["total"]
    for group in found["groups"]:
        is_frozen = (
            (group["layer"] or 0) < freeze
            if group["layer"] is not None
            else (bool(freeze) and group["name"].endswith("embedding"))
        )
        assert (group["update"] is None) == is_frozen


def test_a_task_without_a_label_has_no_step():
    gpt = loaded.model("classification")
    assert step(gpt, gpt.read(loaded.texts(gpt))) is None


def test_an_imported_model_has_the_default_optimizer():
    gpt = loaded.model("classification")
    meta = dataclasses.replace(gpt.meta, experiment=schema.to_dict(schema.Experiment()))
    imported = dataclasses.replace(gpt, meta=meta)
    row = gpt.read("the cat sat", 1)
    assert step(gpt, row)["from_run"]
    found = step(imported, row)
    assert not found["from_run"]
    assert found["learning_rate"] == schema.FinetuneConfig().optimizer.learning_rate
    assert found["frozen"] == 0
