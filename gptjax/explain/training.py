"""One training step on one text: the gradients of both losses, the update, and what it changes.

The step is that of the run's optimizer, with these differences, because a page shows one text: the
batch is this text alone, nothing is dropped out, classes have no weights, labels are not smoothed,
and Adam has no history. The first update of Adam moves each parameter by about the learning rate.
The learning rate is the highest of the run. An imported model has the default optimizer.

The letters of shapes are defined in `gptjax.batch`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from gptjax.batch import Batch
from gptjax.config.schema import FinetuneConfig, PretrainConfig, Schedule
from gptjax.explain import outcome as outcome_lib
from gptjax.explain.outcome import Outcome
from gptjax.infer.predictor import GPT
from gptjax.infer.row import Row
from gptjax.mesh import Params
from gptjax.model import frozen as frozen_lib
from gptjax.model import gpt as gpt_lib
from gptjax.model import objective as objective_lib
from gptjax.model.objective import Objective
from gptjax.parameters import BLOCKS
from gptjax.train.optimizer import Optimizer

# Path of a part of the parameters -> its name in the page. The parts of the blocks have an axis L.
_PARTS = {
    ("attention", "qkv"): "qkv", ("attention", "out"): "attention_out", ("norm1",): "norm1",
    ("ffn_in",): "ffn_in", ("ffn_out",): "ffn_out", ("norm2",): "norm2",
}  # fmt: skip


def step(gpt: GPT, row: Row, before: Outcome) -> dict[str, Any] | None:
    """Returns the entry `training` of `docs/explain_json.md`; None for a task without a label.

    Args:
      gpt: the model.
      row: the text.
      before: what the model makes of the row.
    """
    if gpt.task is not None and row.batch.labels is None:
        return None
    own, optimizer = outcome_lib.objective(gpt), _optimizer(gpt)
    config, frozen = optimizer.config, optimizer.frozen
    gradients = {"lm": _gradient(gpt.opened, Objective(), gpt.params, row.batch)}
    whole = gradients["lm"]
    if own.kind:
        alone = Objective(own.kind, lm_weight=0.0)
        gradients["task"] = _gradient(gpt.opened, alone, gpt.params, row.batch)
        whole = jax.tree.map(own.total, gradients["task"], gradients["lm"])
    updates = _updates(optimizer, gpt.params, whole)
    trained = frozen_lib.trained_part(gpt.params, frozen)
    changed = frozen_lib.with_trained_part(
        gpt.params, optax.apply_updates(trained, updates), frozen
    )
    host = {name: jax.device_get(tree) for name, tree in gradients.items()}
    return {
        "learning_rate": config.learning_rate,
        "algorithm": str(config.algorithm),
        "clip_norm": config.clip_norm,
        "lambda": own.lm_weight if own.kind else None,
        "from_run": _stage_config(gpt) is not None,
        "frozen": frozen,
        "norms": {
            **{name: _norm(tree) for name, tree in host.items()},
            "total": _norm(frozen_lib.trained_part(whole, frozen)),
        },
        "cosine": _cosine(host["lm"], host["task"]) if own.kind else None,
        "groups": _groups(host, jax.device_get(updates), jax.device_get(trained), frozen),
        "heads": {name: _by_head(tree[BLOCKS]) for name, tree in host.items()},
        "before": dataclasses.asdict(before),
        "after": dataclasses.asdict(outcome_lib.of(gpt, changed, row.batch)),
    }


def _optimizer(gpt: GPT) -> Optimizer:
    """Returns the optimizer of the run that trained a model, always at its highest rate.

    An imported model was trained elsewhere. It has the optimizer of the default configuration.
    """
    config = _stage_config(gpt) or (FinetuneConfig() if gpt.task else PretrainConfig())
    frozen = config.freeze if isinstance(config, FinetuneConfig) else 0
    steady = dataclasses.replace(
        config.optimizer,
        schedule=Schedule.CONSTANT,
        warmup_steps=0,
        warmup_fraction=0.0,
        accumulation=1,
    )
    return Optimizer(steady, total_steps=1, frozen=frozen)


def _stage_config(gpt: GPT) -> FinetuneConfig | PretrainConfig | None:
    """Returns the configuration of the stage that trained a model; None if it was imported."""
    return gpt.experiment.finetune if gpt.task else gpt.experiment.pretrain


@functools.partial(jax.jit, static_argnames=("model", "objective"))
def _gradient(model: gpt_lib.GPT, objective: Objective, params: Params, batch: Batch) -> Params:
    """Returns the gradient of an objective without dropout."""

    def loss(params: Params) -> jax.Array:
        sums, _ = objective_lib.forward(model, objective, params, batch)
        return objective_lib.joint(objective, sums, objective_lib.weights(batch))

    gradient: Params = jax.grad(loss)(params)
    return gradient


def _updates(optimizer: Optimizer, params: Params, gradient: Params) -> Params:
    """Returns the first update of an optimizer, for the trained part of the parameters."""
    trained = frozen_lib.trained_part(params, optimizer.frozen)
    part = frozen_lib.trained_part(gradient, optimizer.frozen)
    state = optimizer.transformation.init(trained)
    updates: Params = optimizer.transformation.update(part, state, trained)[0]
    return updates


def _norm(tree: Any) -> float:
    """Returns the root of the sum of all squares, in float64."""
    squares = (np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree))
    return float(np.sqrt(sum(squares)))


def _cosine(a: Params, b: Params) -> float | None:
    """Returns the cosine of the angle between two gradients; None if one of them is 0."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    product = sum(float((np.asarray(x, np.float64) * y).sum()) for x, y in pairs)
    norms = _norm(a) * _norm(b)
    return product / norms if norms else None


def _groups(
    gradients: Mapping[str, Params], updates: Params, weights: Params, frozen: int
) -> list[dict[str, Any]]:
    """Returns the norms of each part of the parameters, in the order of the computation."""

    def entry(name: str, layer: int | None, pick: Any, trained: Any) -> dict[str, Any]:
        found = {loss: _norm(pick(tree)) for loss, tree in gradients.items()}
        task = found.get("task")
        both = [None, None] if trained is None else [_norm(trained(x)) for x in (updates, weights)]
        return {
            "name": name, "layer": layer, "lm": found["lm"], "task": task, "update": both[0],
            "weight": both[1],
        }  # fmt: skip

    tree = gradients["lm"]
    tops = [name for name in tree if name != BLOCKS]
    embeddings = [name for name in tops if name.endswith("embedding")]
    groups = []

    def top(name: str) -> dict[str, Any]:
        has_update = name in updates
        return entry(name, None, lambda t: t[name], (lambda t: t[name]) if has_update else None)

    groups += [top(name) for name in sorted(embeddings, reverse=True)]
    blocks = jax.tree.leaves(tree.get(BLOCKS, {}))
    for layer in range(blocks[0].shape[0] if blocks else 0):
        for path, name in _PARTS.items():

            def pick(t: Any, at: int = layer, path: tuple[str, ...] = path) -> Any:
                part = functools.reduce(dict.__getitem__, path, t[BLOCKS])
                return jax.tree.map(lambda x: x[at], part)

            above = functools.partial(pick, at=layer - frozen) if layer >= frozen else None
            groups.append(entry(name, layer, pick, above))
    groups += [top(name) for name in tops if name not in embeddings]
    return groups


def _by_head(blocks: Params) -> list[list[float]]:
    """Returns the norm of the gradient of each head's own weights, [L][H]."""
    attention = blocks["attention"]
    qkv = np.asarray(attention["qkv"]["kernel"], np.float64)
    out = np.asarray(attention["out"]["kernel"], np.float64)
    # qkv is [L, D, 3, H, K] and out is [L, H, K, D].
    squares = np.square(qkv).sum(axis=(1, 2, 4)) + np.square(out).sum(axis=(2, 3))
    return np.sqrt(squares).tolist()
