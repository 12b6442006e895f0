"""Builds the train step of an experiment from shapes, without data, for the modules of `cost`.

Facts that a training run finds in its data, such as the number of classes, are assumed here, and
the report lists these assumptions.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax import state
from gptjax.batch import Batch
from gptjax.config import schema, validation
from gptjax.config.schema import Experiment, ModelConfig, Stage, TaskKind, TokenizerKind
from gptjax.data import splits
from gptjax.data.tokens import tokenizer
from gptjax.errors import require
from gptjax.interop import hub
from gptjax.model import gpt
from gptjax.model.objective import Objective
from gptjax.train import stages
from gptjax.train import step as step_lib
from gptjax.train.optimizer import Optimizer

STAGES = (Stage.PRETRAIN, Stage.FINETUNE)
"""The stages that have different train steps."""

# The number of entries in encoder_bpe_40000.json of OpenAI's finetune-transformer-lm.
_GPT1_VOCABULARY = 40478


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """The objects that determine the program of a train step."""

    model: gpt.GPT
    objective: Objective
    optimizer: Optimizer
    batch: Batch
    """A batch whose arrays are `jax.ShapeDtypeStruct`."""
    assumed: dict[str, str]
    """Name of a fact that a training run might find in its data -> the value or the source that is
    assumed here."""


def validated(experiment: Experiment, stage: str) -> Experiment:
    """Returns a validated copy of the experiment that has only this stage.

    The stage does not have to name any data. If it names none, the copy has a placeholder.

    Raises:
      UserError: the experiment lacks the stage, or the configuration is wrong.
    """
    config = getattr(experiment, stage)
    require(config, f"`stage`={stage}: the experiment has no {stage} part")
    files = config.train_files if stage == Stage.PRETRAIN else config.train_file
    changes: dict[str, Any] = {} if files or config.dataset else {"dataset": "not read"}
    if stage == Stage.FINETUNE:
        changes |= {"compare_from_scratch": False, "transfer": "all"}
    elif not (config.steps or config.epochs):
        changes["epochs"] = 1.0
    parts: dict[str, Any] = dict.fromkeys((*STAGES, "ablation"))
    parts[stage] = dataclasses.replace(config, **changes)
    return validation.validate(dataclasses.replace(experiment, **parts))


def vocabulary(experiment: Experiment) -> tuple[int, str]:
    """Returns the vocabulary size that a training run would have, and the source of this number.

    Raises:
      UserError: the size depends on the training text, because the tokenizer is one of characters.
    """
    config, special = experiment.tokenizer, len(tokenizer.SPECIALS)
    if experiment.model.vocab_size:
        return experiment.model.vocab_size, "model.vocab_size"
    if config.file or (config.kind == TokenizerKind.GPT1 and config.vocab_file):
        return len(tokenizer.build(config, ())), "the tokenizer's file"
    require(
        config.kind != TokenizerKind.CHARACTER,
        "`model.vocab_size`: give it; the characters of the text are not known",
    )
    if config.kind == TokenizerKind.GPT1:
        return _GPT1_VOCABULARY + special, "GPT-1's 40,478 and four special tokens"
    return config.vocab_size + special, "tokenizer.vocab_size and four special tokens"


def build(experiment: Experiment, stage: str, mesh: Mesh) -> StepSpec:
    """Returns the train step of a stage.

    Args:
      experiment: an experiment that `validated` returned.
      stage: pretrain or finetune.
      mesh: the devices.
    """
    config, model, assumed = getattr(experiment, stage), experiment.model, {}
    if experiment.init_from:
        commit, words = experiment.init_from_commit, experiment.tokenizer.words
        start = hub.open_checkpoint(experiment.init_from, "init_from", commit, words)
        model = start.meta.with_sizes(model)
        assumed["vocab_size"] = "init_from"
    else:
        size, assumed["vocab_size"] = vocabulary(experiment)
        model = dataclasses.replace(model, vocab_size=size)
    if stage == Stage.PRETRAIN:
        task, objective, frozen, average = None, Objective(), 0, 0.0
        batch = _abstract_batch(stages.pretrain_shape(config, model, mesh), mesh)
    else:
        task, batch = _task_and_batch(config, model, mesh, assumed)
        objective = Objective(task.kind, config.lm_weight, config.task_weight)
        frozen, average = config.freeze, config.average
    # The number of updates is only a constant in the learning rate schedule. Every number above the
    # warm-up compiles to the same program.
    steps = config.steps or 2 * config.optimizer.warmup_steps + 1000
    optimizer = Optimizer(config.optimizer, steps, f"{stage}.optimizer", frozen, average)
    return StepSpec(gpt.make_model(model, task, mesh), objective, optimizer, batch, assumed)


def _task_and_batch(
    config: schema.FinetuneConfig, model: ModelConfig, mesh: Mesh, assumed: dict[str, str]
) -> tuple[schema.TaskSpec, Batch]:
    """Returns the task of a fine-tuning run, and the largest batch that the configuration allows.

    Adds the assumptions about labels and batch to `assumed`.
    """
    require(
        config.freeze <= model.num_layers,
        f"`finetune.freeze`={config.freeze}: the model has {model.num_layers} layers; give at most "
        "that number",
    )
    task = splits.task_spec(config)
    if task.kind.has_classes:
        task = dataclasses.replace(task, labels=("no", "yes"))
        assumed["labels"] = "two classes"
    candidates, context = task.num_candidates, model.context_length
    if config.head == schema.Head.FLATTEN:
        task = dataclasses.replace(task, flatten=context)
    length = config.row_length or candidates * context
    divisor = mesh_lib.batch_divisor(mesh) * config.optimizer.accumulation
    rows = math.ceil(config.batch_size / divisor) * divisor
    assumed["batch"] = (
        f"a row of {length} tokens for each of {config.batch_size} examples: as if all were as "
        "long as they may be; packing makes fewer rows of shorter ones"
    )
    # This is the shape of the batches that `packing.Packer` makes if each example fills a row.
    examples = (rows, min(config.batch_size, 4), candidates)
    labels = np.float32 if task.kind is TaskKind.REGRESSION else np.int32
    batch = _abstract_batch((rows, length), mesh, examples, labels)
    if config.freeze:
        place, shape = mesh_lib.batch_sharding(mesh), (rows, length, model.width)
        hidden = jax.ShapeDtypeStruct(shape, jnp.dtype(model.dtype), sharding=place)
        batch = batch.replace(hidden=hidden)  # type: ignore[attr-defined]
    return task, batch


def _abstract_batch(
    shape: tuple[int, int], mesh: Mesh, examples: tuple[int, ...] = (), labels: Any = np.int32
) -> Batch:
    """Returns a batch of shapes whose rows are sharded over the mesh.

    Args:
      shape: (B, T), the number of rows and the row length in tokens.
      mesh: the devices.
      examples: (B, E, C), where E is the largest number of examples in a row and C is the number of
        candidates of an example. () means that the batch has no examples, as in pretraining.
      labels: the dtype of the labels.
    """
    place = mesh_lib.batch_sharding(mesh)

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    ids, weights = array(shape, np.int32), array(shape, np.float32)
    batch = Batch(ids, ids, ids, ids, weights)
    if not examples:
        return batch
    return batch.replace(  # type: ignore[attr-defined]
        extract=array(examples, np.int32),
        candidate_mask=array(examples, np.float32),
        example_mask=array(examples[:2], np.float32),
        labels=array(examples[:2], labels),
    )


def abstract_state(spec: StepSpec, mesh: Mesh) -> Any:
    """Returns a `TrainState` that has shapes and shardings in place of arrays."""
    make = step_lib.initial_state(spec.model, spec.optimizer)
    return state.abstract(make, mesh, jax.eval_shape(lambda: jax.random.key(0)))


def new_state(spec: StepSpec, mesh: Mesh) -> state.TrainState:
    """Returns a training state with random weights."""
    make = step_lib.initial_state(spec.model, spec.optimizer)
    return state.born_sharded(make, mesh, jax.random.key(0))


def lower(spec: StepSpec, mesh: Mesh, state_like: Any) -> jax.stages.Lowered:
    """Returns the traced and lowered train step, a function of (state, batch, seed).

    Args:
      spec: a step that `build` returned.
      mesh: the mesh that was passed to `build`.
      state_like: the shapes that `abstract_state` returned.
    """
    step = step_lib.jit_train_step(mesh, spec.model, spec.objective, spec.optimizer)
    seed = jax.ShapeDtypeStruct((), np.uint32)
    return step.lower(state_like, spec.batch, seed)  # type: ignore[attr-defined]
