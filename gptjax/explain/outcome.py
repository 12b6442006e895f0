"""What a model makes of one row: the losses, the answer, and the surprise of each token."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from gptjax.batch import Batch
from gptjax.config.schema import FinetuneConfig, TaskKind
from gptjax.errors import require
from gptjax.infer import inside
from gptjax.infer.predictor import GPT
from gptjax.mesh import Params
from gptjax.model import gpt as gpt_lib
from gptjax.model import objective as objective_lib
from gptjax.model.losses import Sum, lm_targets
from gptjax.model.objective import Losses, Objective


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The losses in nats, the answer, and the surprise of each token."""

    lm: float
    task: float | None
    """The task loss; None without a label."""
    total: float | None
    """The objective of the run: both losses with their weights. None without a label."""
    answer: list[float] | None
    """The result of `answer`; None for a language model."""
    surprise: list[float | None]
    """-log P of the next token at each place; None where no token is predicted."""


def objective(gpt: GPT) -> Objective:
    """Returns the objective of the run that trained a model, without class weights and smoothing.

    An imported model was trained elsewhere. It has the default values of a fine-tuning.
    """
    if gpt.task is None:
        return Objective()
    finetune = gpt.experiment.finetune or FinetuneConfig()
    return Objective(gpt.task.kind, finetune.lm_weight, finetune.task_weight)


def answer(gpt: GPT, logits_O: np.ndarray) -> list[float]:
    """Returns the probabilities of the labels or answers; in a regression, the number alone."""
    assert gpt.task is not None
    if gpt.task.kind is TaskKind.REGRESSION:
        return [float(logits_O[0])]
    probabilities: list[float] = special.softmax(logits_O.astype(float) / gpt.temperature).tolist()
    return probabilities


def of(gpt: GPT, params: Params, batch: Batch) -> Outcome:
    """Returns what the model with some parameters makes of a row.

    Raises:
      UserError: a number is NaN or infinite.
    """
    kind = gpt.task.kind if gpt.task else None
    # Both losses are computed, even if the run had lambda 0.
    sums, logits, nats_T = jax.device_get(_forward(gpt.opened, Objective(kind), params, batch))
    finite = np.isfinite(nats_T).all() and (logits is None or np.isfinite(logits).all())
    require(bool(finite), f"{gpt.path}: the model computes NaN or infinity for this text")
    lm = _mean(sums.lm)
    task = None if sums.task is None else _mean(sums.task)
    is_known = task is not None or kind is None
    return Outcome(
        lm=lm,
        task=task,
        total=objective(gpt).total(task, lm) if is_known else None,
        answer=None if logits is None else answer(gpt, logits[0, 0]),
        surprise=[
            float(nats) if weight else None
            for nats, weight in zip(nats_T, batch.lm_weights[0], strict=True)
        ],
    )


def _mean(part: Sum) -> float:
    return float(part.total) / max(float(part.weight), 1e-9)


@functools.partial(jax.jit, static_argnames=("model", "both"))
def _forward(
    model: gpt_lib.GPT, both: Objective, params: Params, batch: Batch
) -> tuple[Losses, Any, jax.Array]:
    """Returns the losses, the task logits, and -log P of each next token, float32 [T]."""
    sums, logits = objective_lib.forward(model, both, params, batch)
    ids = (batch.tokens, batch.segment_ids, batch.positions, batch.token_types)
    x_BTD = gpt_lib.run(model, params, *ids, method="hidden")
    logits_TV = gpt_lib.run(model, params, x_BTD, method="lm_logits")[0]
    next_T1 = lm_targets(batch)[0][:, None]
    normaliser_T = inside.lm_normaliser(model, params, x_BTD)[0]
    return sums, logits, normaliser_T - jnp.take_along_axis(logits_TV, next_T1, axis=1)[:, 0]


def largest(logits_TV: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the largest logits of each row, largest first, [T, count]."""
    count = min(count, logits_TV.shape[1])
    some = np.argpartition(-logits_TV, count - 1, axis=1)[:, :count]
    values = np.take_along_axis(logits_TV, some, axis=1)
    order = np.lexsort((some, -values), axis=1)
    return np.take_along_axis(some, order, axis=1)
