"""The stages of an experiment: configuration and tokenised data -> what the loop trains."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax.batch import Batch
from gptjax.config import schema
from gptjax.config.schema import (
    FinetuneConfig,
    Head,
    LmMean,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TaskSpec,
)
from gptjax.data import fingerprints, loader, splits, tasks
from gptjax.data.packing import Packer
from gptjax.data.tables.labelled import LabelledTable, as_text
from gptjax.data.tables.texts import Texts
from gptjax.data.tasks import Examples
from gptjax.data.tokens import store
from gptjax.data.tokens.tokenizer import Tokenizer
from gptjax.errors import require
from gptjax.evaluate import metrics, probes
from gptjax.evaluate import score as score_lib
from gptjax.mesh import Params
from gptjax.model.gpt import GPT, make_model
from gptjax.model.objective import Objective

Scores = dict[str, float]


class Batches(Protocol):
    """The training batches, by step."""

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields the batches of steps [start, stop)."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """All that the loop needs to know of a stage."""

    name: str
    model: GPT
    objective: Objective
    optimizer: OptimizerConfig
    total_steps: int
    eval_every: int
    save_every: int
    batches: Batches
    validate: Callable[[Params, Callable[[], bool]], Scores | None]
    """(params, stop) -> scores on the validation split; None if stopped."""
    test: Callable[[Params, Callable[[], bool]], Scores | None] | None
    metric: str
    """The validation score that ranks checkpoints."""
    fingerprint: str
    """Hash of the training data."""
    spec: TaskSpec | None = None
    transfer: str = "all"
    """What is taken of pretrained weights, as in `FinetuneConfig.transfer`."""
    floors: dict[str, Scores] = dataclasses.field(default_factory=dict)
    """Split -> scores of the majority answer."""
    notes: tuple[str, ...] = ()
    """What to tell the user about the data."""


def pretrain_texts(data: dict[str, Texts]) -> Texts:
    """Returns the training texts, for the tokenizer to learn from."""
    return data["train"]


def finetune_texts(data: dict[str, LabelledTable], config: FinetuneConfig) -> Iterator[str]:
    """Yields the training texts, for the tokenizer to learn from."""
    for values in data["train"].columns(splits.task_spec(config).text_columns).values():
        yield from map(as_text, values)


def _text_scorer(
    config: PretrainConfig,
    model: GPT,
    stream: np.ndarray,
    window: int,
    mesh: Mesh,
    asked: Sequence[probes.Probe],
) -> Callable[[Params, Callable[[], bool]], Scores | None]:
    """Returns what scores the LM on the validation text, and on the probes."""
    step = score_lib.jit_eval_step(mesh, model, Objective())

    def validate(params: Params, stop: Callable[[], bool]) -> Scores | None:
        scores = score_lib.language_model(
            step, params, stream, window, config.batch_size, mesh, config.eval_batches, stop
        )
        if scores is None or not asked:
            return scores
        span_step = probes.jit_span_step(mesh, model)
        found = probes.run(asked, span_step, params, model.config.vocab_size, mesh, stop)
        if found is None:
            return None
        for each in asked:
            for name in (each.metric, "floor"):
                scores[f"probe_{each.name}_{name}"] = found[each.name][name]
        return scores

    return validate


def pretrain_shape(
    config: PretrainConfig, model_config: ModelConfig, mesh: Mesh
) -> tuple[int, int]:
    """Returns rows and tokens a row of a pretraining batch; a `UserError` if they do not fit."""
    window = config.window or model_config.context_length
    require(
        window <= model_config.context_length,
        f"`pretrain.window`={window}: the model has a context of {model_config.context_length}",
    )
    divisor = mesh_lib.batch_divisor(mesh) * config.optimizer.accumulation
    require(
        config.batch_size % divisor == 0,
        f"`pretrain.batch_size`={config.batch_size}: must be a multiple of {divisor} "
        "(devices along data and fsdp, times accumulation)",
    )
    return config.batch_size, window


def pretrain(
    config: PretrainConfig,
    model_config: ModelConfig,
    data: dict[str, Texts],
    tokenizer: Tokenizer,
    mesh: Mesh,
    seed: int,
    asked: Sequence[probes.Probe] = (),
) -> Stage:
    """Builds the pretraining stage from the texts of `splits.text_splits`.

    Every validation scores the probes `asked` too, as "probe_NAME_METRIC" and "probe_NAME_floor".
    """
    stream = {
        name: store.token_stream(each, tokenizer, each.fingerprint) for name, each in data.items()
    }
    statistics = store.statistics(stream["train"], tokenizer, data["train"].fingerprint)
    _, window = pretrain_shape(config, model_config, mesh)
    require(
        len(stream["validation"]) > 1,
        "`pretrain`: the validation text is empty; give validation_files or more text",
    )
    local = functools.partial(mesh_lib.local_rows, mesh)
    batches = loader.TextBatches(stream["train"], window, config.batch_size, seed, local)
    total = config.steps or math.ceil(config.epochs * batches.windows / config.batch_size)
    model, objective = make_model(model_config, None, mesh), Objective()
    validate = _text_scorer(config, model, stream["validation"], window, mesh, asked)
    unknown = statistics.unknown / len(stream["train"])
    epochs = total * config.batch_size / batches.windows
    notes = (
        f"pretrain: {len(stream['train']):,} training tokens ({unknown:.2%} unknown), "
        f"{len(stream['validation']):,} for validation",
        f"pretrain: {total:,} steps of {config.batch_size} x {window} tokens, {epochs:.1f} epochs",
    )
    return Stage(
        schema.Stage.PRETRAIN, model, objective, config.optimizer, total,
        config.eval_every or total, config.save_every, batches, validate, None,
        "loss", statistics.fingerprint, notes=notes,
    )  # fmt: skip


def _encode(
    data: dict[str, LabelledTable], spec: TaskSpec, tokenizer: Tokenizer, context_length: int
) -> dict[str, Examples]:
    examples = {}
    for name, table in data.items():
        examples[name] = tasks.encode(spec, table, tokenizer, context_length, use_cache=True)
    return examples


def _with_labels(spec: TaskSpec, data: dict[str, LabelledTable]) -> TaskSpec:
    """The labels of the training file, of the part that was held out of it too."""
    train = data["train"]
    tables = [table for table in data.values() if table is train or table.part_of == train.source]
    values = [value for table in tables for value in table.columns((spec.label,))[spec.label]]
    numbers = None
    if train.numbers is not None:
        numbers = [number for table in tables for number in table.numbers or ()]
    labels = LabelledTable({spec.label: values}, train.source, numbers=numbers)
    return tasks.find_labels(spec, labels)


def _floors(
    names: tuple[str, ...], examples: dict[str, Examples], spec: TaskSpec
) -> dict[str, Scores]:
    return {
        name: metrics.floor(names, split.labels, len(spec.labels))
        for name, split in examples.items()
        if name != "train" and split.labels is not None
    }


def _epoch_steps(config: FinetuneConfig, examples: int) -> float:
    """Steps of an epoch."""
    if not config.drop_last:
        return examples / config.batch_size
    require(
        examples >= config.batch_size,
        f"`finetune.batch_size`={config.batch_size}: with drop_last the {examples} examples "
        "make no batch",
    )
    return examples // config.batch_size


def _note(name: str, examples: Examples, ignored: int, model: ModelConfig) -> str:
    text = f"finetune: {len(examples):,} {name} examples"
    if examples.cut:
        text += f", {examples.cut:,} cut to fit {model.context_length} tokens"
    if examples.empty:
        text += f", {examples.empty:,} with an empty text"
    if ignored:
        text += f", {ignored:,} left out for their label"
    return text


def _what(config: FinetuneConfig, total: int, packer: Packer) -> str:
    task = "task" if config.task_weight == 1 else f"{config.task_weight:g} * task"
    return (
        f"finetune: {total:,} steps of {config.batch_size} examples packed in {packer.rows} rows "
        f"of {packer.row_length} tokens, {task} + {config.lm_weight:g} * LM"
    )


def _spec(
    config: FinetuneConfig, model: ModelConfig, data: dict[str, LabelledTable], tokenizer: Tokenizer
) -> TaskSpec:
    """The task with its label names and, for a flattened head, its length."""
    spec = _with_labels(splits.task_spec(config), data)
    if config.head != Head.FLATTEN:
        return spec
    length = tasks.padded_length(spec, data["train"], tokenizer, model.context_length)
    return dataclasses.replace(spec, flatten=length)


def finetune(
    config: FinetuneConfig,
    model_config: ModelConfig,
    data: dict[str, LabelledTable],
    tokenizer: Tokenizer,
    mesh: Mesh,
    seed: int,
) -> Stage:
    """Builds the fine-tuning stage from the tables of `splits.labelled_splits`."""
    names = metrics.parse(config.metrics, config.task)
    spec = _spec(config, model_config, data, tokenizer)
    examples = _encode(data, spec, tokenizer, model_config.context_length)
    train = examples["train"]
    floors = _floors(names, examples, spec)
    devices, means = mesh_lib.batch_divisor(mesh), config.lm_mean == LmMean.SEQUENCE
    divisor = devices * config.optimizer.accumulation
    packer = Packer(train.lengths, config.batch_size, config.row_length, divisor, means)
    epoch = _epoch_steps(config, len(train))
    total = config.steps or math.ceil(config.epochs * epoch)
    longest = max(each.max_sequence_length for each in examples.values())
    model = make_model(model_config, spec, mesh, max_sequence_length=longest)
    objective = Objective(spec.kind, config.lm_weight, config.task_weight)
    eval_step = score_lib.jit_eval_step(mesh, model, objective)

    def score(name: str) -> Callable[[Params, Callable[[], bool]], Scores | None]:
        lengths = examples[name].lengths
        split_packer = Packer(lengths, config.batch_size, packer.row_length, devices, means)

        def run(params: Params, stop: Callable[[], bool]) -> Scores | None:
            return score_lib.task(
                spec, names, eval_step, params, examples[name], split_packer, mesh, objective, stop
            )

        return run

    local = functools.partial(mesh_lib.local_rows, mesh)
    kind = loader.WholeEpochBatches if config.drop_last else loader.BalancedBatches
    batches = kind(train, packer, config.batch_size, seed, local)
    every = max(1, round(epoch / config.evals_per_epoch))
    notes = [_note(name, each, data[name].ignored, model_config) for name, each in examples.items()]
    notes.append(_what(config, total, packer))
    if "f1" in names:
        notes.append(f"finetune: f1 is that of the label {spec.labels[-1]!r}")
    arrays = [np.concatenate(train.tokens), train.lengths, train.labels]
    return Stage(
        schema.Stage.FINETUNE, model, objective, config.optimizer, total, every, config.save_every,
        batches, score("validation"), score("test") if "test" in examples else None,
        names[metrics.PRIMARY], fingerprints.of_arrays(*arrays), spec, config.transfer, floors,
        tuple(notes),
    )  # fmt: skip
