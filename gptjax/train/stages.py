"""The stages of an experiment, built from its configuration and its data."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax.config import schema
from gptjax.config.schema import FinetuneConfig, ModelConfig, PretrainConfig, TaskSpec
from gptjax.data import fingerprints, loader, splits, tasks
from gptjax.data.packing import Packer
from gptjax.data.tables.labelled import LabelledTable, as_text
from gptjax.data.tables.texts import Texts
from gptjax.data.tasks import Examples
from gptjax.data.tokens import store
from gptjax.errors import require
from gptjax.evaluate import metrics
from gptjax.evaluate import probes as probes_lib
from gptjax.evaluate.probes import Probe
from gptjax.evaluate.score import Evaluator
from gptjax.mesh import Params
from gptjax.model.gpt import GPT, make_model
from gptjax.model.objective import Objective
from gptjax.train.context import Setup
from gptjax.train.optimizer import Optimizer

Scores = dict[str, float]
Scorer = Callable[[Params], Scores]
"""Returns the losses and metrics of parameters on one split; raises `StopRequested` if the run was
asked to stop."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Stage:
    """One stage, ready to be trained."""

    name: str
    model: GPT
    objective: Objective
    optimizer: Optimizer
    batches: loader.Batches
    validate: Scorer
    """Scores the validation split."""
    test: Scorer | None = None
    """Scores the test split; None if there is none."""
    metric: str
    """The validation score that selects the best checkpoint."""
    eval_every: int
    """Steps between two validations."""
    save_every: int
    """Steps between two checkpoints. Each validation saves a checkpoint too."""
    fingerprint: str
    """Hash of the training data."""
    spec: TaskSpec | None = None
    """The task; None in pretraining."""
    transfer: str = "all"
    """The part of the pretrained weights that is used, as in `FinetuneConfig.transfer`."""
    baselines: dict[str, Scores] = dataclasses.field(default_factory=dict)
    """Split -> scores of always giving the most frequent answer."""
    notes: tuple[str, ...] = ()
    """Lines about the data and the steps, for the user."""

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole stage."""
        return self.optimizer.total_steps


def finetune_texts(data: dict[str, LabelledTable], config: FinetuneConfig) -> Iterator[str]:
    """Yields the training texts of fine-tuning, for the tokenizer to learn from."""
    for values in data["train"].columns(splits.task_spec(config).text_columns).values():
        yield from map(as_text, values)


def pretrain_shape(
    config: PretrainConfig, model_config: ModelConfig, mesh: Mesh
) -> tuple[int, int]:
    """Returns the shape of a pretraining batch: rows, and tokens of a row.

    Raises:
      UserError: the rows cannot be divided among the devices, or are longer than the context.
    """
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
    config: PretrainConfig, data: dict[str, Texts], setup: Setup, probes: Sequence[Probe] = ()
) -> Stage:
    """Builds the pretraining stage.

    Args:
      config: the stage's configuration.
      data: the tables of `splits.text_splits`.
      setup: the inputs that all stages share.
      probes: the probes that each validation scores.
    """
    mesh, tokenizer = setup.mesh, setup.tokenizer
    stream = {
        name: store.token_stream(texts, tokenizer, texts.fingerprint)
        for name, texts in data.items()
    }
    statistics = store.statistics(stream["train"], tokenizer, data["train"].fingerprint)
    rows, window = pretrain_shape(config, setup.model, mesh)
    require(
        len(stream["validation"]) > 1,
        "`pretrain`: the validation text is empty; give validation_files or more text",
    )
    local = functools.partial(mesh_lib.local_rows, mesh)
    batches = loader.TextBatches(stream["train"], window, rows, setup.seed, local)
    total = config.steps or math.ceil(config.epochs * batches.windows / rows)
    model, objective = make_model(setup.model, None, mesh), Objective()
    evaluator = Evaluator(model, mesh, objective, setup.check_stop)

    def validate(params: Params) -> Scores:
        """Returns "loss" and "perplexity", and "probe_NAME_METRIC" and "probe_NAME_floor"."""
        scores = evaluator.language_model(
            params, stream["validation"], window, rows, config.eval_batches
        )
        results = probes_lib.run(evaluator, params, probes)
        for probe in probes:
            for name in (probe.metric, "floor"):
                scores[f"probe_{probe.name}_{name}"] = results[probe.name][name]
        return scores

    unknown = statistics.unknown / len(stream["train"])
    epochs = total * rows / batches.windows
    notes = (
        f"pretrain: {len(stream['train']):,} training tokens ({unknown:.2%} unknown), "
        f"{len(stream['validation']):,} for validation",
        f"pretrain: {total:,} steps of {rows} x {window} tokens, {epochs:.1f} epochs",
    )
    return Stage(
        name=schema.Stage.PRETRAIN,
        model=model,
        objective=objective,
        optimizer=Optimizer(config.optimizer, total, "pretrain.optimizer"),
        batches=batches,
        validate=validate,
        metric="loss",
        eval_every=config.eval_every or total,
        save_every=config.save_every,
        fingerprint=statistics.fingerprint,
        notes=notes,
    )


def _with_labels(spec: TaskSpec, data: dict[str, LabelledTable]) -> TaskSpec:
    """Returns the task with its label names, which are those of the whole training file.

    Where the validation split was held out of this file, its labels count too.
    """
    train = data["train"]
    tables = [table for table in data.values() if table is train or table.part_of == train.source]
    values = [value for table in tables for value in table.columns((spec.label,))[spec.label]]
    numbers = None
    if train.numbers is not None:
        numbers = [number for table in tables for number in table.numbers or ()]
    labels = LabelledTable({spec.label: values}, train.source, numbers=numbers)
    return tasks.find_labels(spec, labels)


def _baselines(
    metric_names: tuple[str, ...], examples: dict[str, Examples], spec: TaskSpec
) -> dict[str, Scores]:
    """Returns the scores of the most frequent answer on each split but the training split."""
    return {
        name: metrics.majority_baseline(metric_names, split.labels, len(spec.labels))
        for name, split in examples.items()
        if name != "train" and split.labels is not None
    }


def _steps_per_epoch(config: FinetuneConfig, examples: int) -> float:
    """Returns the number of steps in an epoch: a fraction, unless the last batch is dropped."""
    if not config.drop_last:
        return examples / config.batch_size
    require(
        examples >= config.batch_size,
        f"`finetune.batch_size`={config.batch_size}: with drop_last the {examples} examples "
        "make no batch",
    )
    return examples // config.batch_size


def _describe_split(name: str, examples: Examples, ignored: int, model: ModelConfig) -> str:
    """Returns a line with the number of examples, and how many of them were cut or are empty.

    `ignored` is the number of rows that were left out for their label.
    """
    text = f"finetune: {len(examples):,} {name} examples"
    if examples.cut:
        text += f", {examples.cut:,} cut to fit {model.context_length} tokens"
    if examples.empty:
        text += f", {examples.empty:,} with an empty text"
    if ignored:
        text += f", {ignored:,} left out for their label"
    return text


def _describe_stage(config: FinetuneConfig, total: int, packer: Packer) -> str:
    """Returns a line with the steps, the shape of a batch and the joint loss."""
    task = "task" if config.task_weight == 1 else f"{config.task_weight:g} * task"
    return (
        f"finetune: {total:,} steps of {config.batch_size} examples packed in {packer.rows} rows "
        f"of {packer.row_length} tokens, {task} + {config.lm_weight:g} * LM"
    )


def _task_spec(config: FinetuneConfig, setup: Setup, data: dict[str, LabelledTable]) -> TaskSpec:
    """Returns the task with its label names and, for a flattened head, its length."""
    spec = _with_labels(splits.task_spec(config), data)
    if config.head != schema.Head.FLATTEN:
        return spec
    length = tasks.padded_length(spec, data["train"], setup.tokenizer, setup.model.context_length)
    return dataclasses.replace(spec, flatten=length)


def finetune(config: FinetuneConfig, data: dict[str, LabelledTable], setup: Setup) -> Stage:
    """Builds the fine-tuning stage.

    Args:
      config: the stage's configuration.
      data: the tables of `splits.labelled_splits`.
      setup: the inputs that all stages share.
    """
    mesh = setup.mesh
    require(
        not config.transfer.isdecimal() or int(config.transfer) <= setup.model.num_layers,
        f"`finetune.transfer`={config.transfer}: the model has {setup.model.num_layers} layers",
    )
    metric_names = metrics.parse(config.metrics, config.task)
    spec = _task_spec(config, setup, data)
    examples = {
        name: tasks.encode(spec, table, setup.tokenizer, setup.model.context_length, use_cache=True)
        for name, table in data.items()
    }
    train = examples["train"]
    baselines = _baselines(metric_names, examples, spec)
    devices, sequence_means = mesh_lib.batch_divisor(mesh), config.lm_mean == schema.LmMean.SEQUENCE
    divisor = devices * config.optimizer.accumulation
    size = config.batch_size
    packer = Packer(train.lengths, size, config.row_length, divisor, sequence_means)
    epoch = _steps_per_epoch(config, len(train))
    total = config.steps or math.ceil(config.epochs * epoch)
    longest = max(split.max_sequence_length for split in examples.values())
    model = make_model(setup.model, spec, mesh, max_sequence_length=longest)
    objective = Objective(spec.kind, config.lm_weight, config.task_weight)
    evaluator = Evaluator(model, mesh, objective, setup.check_stop)

    def scorer(split: Examples) -> Scorer:
        """Returns the function that scores a split: the joint "loss", "task_loss", "lm_loss" and
        the metrics."""
        rows = Packer(split.lengths, size, packer.row_length, devices, sequence_means)
        return lambda params: evaluator.task(params, split, rows, spec, metric_names)

    scorers = {name: scorer(split) for name, split in examples.items() if name != "train"}
    local = functools.partial(mesh_lib.local_rows, mesh)
    kind = loader.WholeEpochBatches if config.drop_last else loader.BalancedBatches
    notes = [
        _describe_split(name, split, data[name].ignored, setup.model)
        for name, split in examples.items()
    ]
    notes.append(_describe_stage(config, total, packer))
    if "f1" in metric_names:
        notes.append(f"finetune: f1 is that of the label {spec.labels[-1]!r}")
    return Stage(
        name=schema.Stage.FINETUNE,
        model=model,
        objective=objective,
        optimizer=Optimizer(config.optimizer, total, "finetune.optimizer"),
        batches=kind(train, packer, size, setup.seed, local),
        validate=scorers["validation"],
        test=scorers.get("test"),
        metric=metric_names[0],
        eval_every=max(1, round(epoch / config.evals_per_epoch)),
        save_every=config.save_every,
        fingerprint=fingerprints.of_arrays(
            np.concatenate(train.tokens), train.lengths, train.labels
        ),
        spec=spec,
        transfer=config.transfer,
        baselines=baselines,
        notes=tuple(notes),
    )
