"""The stages of an experiment (pretraining and fine-tuning), built from configuration and data."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax.config import schema
from gptjax.config.schema import FinetuneConfig, ModelConfig, PretrainConfig, TaskSpec
from gptjax.data import loader, splits, tasks
from gptjax.data.packing import Packer
from gptjax.data.tables.labelled import LabelledTable, as_text
from gptjax.data.tables.texts import Texts
from gptjax.data.tasks import Examples
from gptjax.data.tokens import store
from gptjax.errors import require
from gptjax.evaluate import calibration, metrics
from gptjax.evaluate import probes as probes_lib
from gptjax.evaluate.probes import Probe
from gptjax.evaluate.score import Evaluator
from gptjax.mesh import Params
from gptjax.model.gpt import GPT, make_model
from gptjax.model.objective import Objective
from gptjax.train.context import Setup
from gptjax.train.optimizer import Optimizer
from gptjax.train.states import Frozen, Splits

# The number of classes whose weights the user is told.
_SHOWN_CLASSES = 10
# The user is warned if there are more classes than this, and fewer than two rows for each.
_FEW_CLASSES = 20

Scores = dict[str, float]
Scorer = Callable[[Params], Scores]
"""A function that returns the losses and metrics of the given parameters on one split. It raises
`StopRequested` if the run was asked to stop."""
OutputScorer = Callable[[Params], tuple[Scores, np.ndarray]]
"""A scorer of a fine-tuning that also returns the task outputs, `score.Outputs.logits`."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Stage:
    """One stage of a run, with everything that its training needs."""

    name: str
    model: GPT
    objective: Objective
    optimizer: Optimizer
    batches: loader.Batches
    validate: Scorer
    """The function that scores the validation split."""
    final: dict[str, OutputScorer] = dataclasses.field(default_factory=dict)
    """Name of a split (validation, and test if there is one) -> the function that scores it at the
    end. A pretraining has none."""
    metric: str
    """The name of the validation score that selects the best checkpoint."""
    eval_every: int
    """The number of steps between two validations."""
    save_every: int
    """The number of steps between two checkpoints. Each validation saves a checkpoint too."""
    patience: int = 0
    """The number of validations without a better score after which the stage ends. 0 means that it
    never ends early."""
    fingerprint: str
    """The hash of the training data."""
    spec: TaskSpec | None = None
    """The task. None means that the stage is a pretraining."""
    transfer: str = "all"
    """The pretrained weights that the stage starts from: "all", "none", or a number N, which means
    the embeddings and the first N layers."""
    baselines: dict[str, Scores] = dataclasses.field(default_factory=dict)
    """Name of a split -> the scores of the majority-class baseline, which always gives the most
    frequent answer (the mean in a regression)."""
    labels: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Name of a split -> its labels, as `tasks.label_ids` returns them."""
    tables: dict[str, LabelledTable] = dataclasses.field(default_factory=dict)
    """Name of a split -> the rows that the linear model reads. It is empty if there is to be no
    linear model."""
    notes: tuple[str, ...] = ()
    """The lines for the user about the data and the steps."""
    validation_tokens: int = 0
    """The number of tokens that a validation reads."""
    test_tokens: int = 0
    """The number of tokens of the test split. 0 means that there is no test split."""
    step_tokens: float = 0.0
    """The mean number of tokens that a step reads."""
    read_states: Callable[[Params, Callable[[str], None]], "Stage"] | None = None
    """A function that returns this stage with batches and scorers that start above the frozen
    blocks. Its arguments are the parameters of the whole model and a function that gets lines for
    the user. None means that no block is frozen."""

    @property
    def total_steps(self) -> int:
        """The number of steps of the whole stage."""
        return self.optimizer.total_steps

    @property
    def frozen(self) -> int:
        """The number of frozen blocks."""
        return self.optimizer.frozen


def finetune_texts(data: dict[str, LabelledTable], config: FinetuneConfig) -> Iterator[str]:
    """Yields the training texts of a fine-tuning. A new tokenizer learns from them."""
    for values in data["train"].columns(splits.task_spec(config).text_columns).values():
        yield from map(as_text, values)


def pretrain_shape(
    config: PretrainConfig, model_config: ModelConfig, mesh: Mesh
) -> tuple[int, int]:
    """Returns the shape of a pretraining batch: its number of rows, and the row length in tokens.

    Raises:
      UserError: the rows cannot be divided evenly among the devices and micro-batches, or the row
        length is larger than the context.
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
      config: the configuration of the stage.
      data: name of a split -> its texts, from `splits.text_splits`.
      setup: the values that all stages share.
      probes: the probes. A probe is a task that the pretrained model solves without fine-tuning.
        Each validation scores the probes too.
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
    tokens = len(stream["validation"])
    if config.eval_batches:
        tokens = min(tokens, config.eval_batches * rows * window)
    local = functools.partial(mesh_lib.local_rows, mesh)
    batches = loader.TextBatches(stream["train"], window, rows, setup.seed, local)
    total = config.steps or math.ceil(config.epochs * batches.windows / rows)
    model, objective = make_model(setup.model, None, mesh), Objective()
    evaluator = Evaluator(model, mesh, objective, setup.check_stop)

    def validate(params: Params) -> Scores:
        """Returns the validation scores.

        These are "loss" and "perplexity", and for each probe "probe_NAME_METRIC" and
        "probe_NAME_floor", the score of the majority-class baseline.
        """
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
        validation_tokens=tokens,
        step_tokens=rows * window,
    )


def with_labels(spec: TaskSpec, data: dict[str, LabelledTable]) -> TaskSpec:
    """Returns the task with its label names, which are all labels of the training file.

    If the validation split was held out of the training file, the labels of the validation split
    are included.
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
    """Returns the scores of the majority-class baseline on each split except the training split.

    Args:
      metric_names: the names of the scores.
      examples: name of a split -> its examples.
      spec: the task.
    """
    return {
        name: metrics.majority_baseline(metric_names, split.labels, len(spec.labels))
        for name, split in examples.items()
        if name != "train" and split.labels is not None
    }


def _steps_per_epoch(config: FinetuneConfig, examples: int) -> float:
    """Returns the number of steps in an epoch.

    It is an integer if the last, smaller batch of an epoch is dropped. Otherwise batches run across
    epochs, and the number may have a fraction.
    """
    if not config.drop_last:
        return examples / config.batch_size
    require(
        examples >= config.batch_size,
        f"`finetune.batch_size`={config.batch_size}: with drop_last the {examples} examples "
        "make no batch",
    )
    return examples // config.batch_size


def _describe_split(
    name: str, examples: Examples, table: LabelledTable, config: FinetuneConfig, model: ModelConfig
) -> list[str]:
    """Returns the lines for the user about a split.

    The first line has the number of examples, the fraction of unknown tokens, the number of
    examples that are read in windows or were cut to fit the context, the fraction of the tokens
    that are read, the number of examples with an empty text, and the number of rows that were left
    out because of their label. The second line warns if many tokens are unknown.

    Args:
      name: the name of the split.
      examples: the examples of the split.
      table: the rows of the split.
      config: the configuration of the stage.
      model: the configuration of the model, which has the context length.
    """
    text = f"finetune: {len(examples):,} {name} examples, {examples.unknown:.2%} unknown tokens"
    for part in examples.reading.describe(examples.cut, model.context_length):
        text += f", {part}"
    if examples.empty:
        text += f", {examples.empty:,} with an empty text"
    is_held_out = name != "train" and table.part_of
    if config.ignore_label and not is_held_out:
        left_out = f"{table.ignored:,}" if table.ignored else "none"
        text += f", {left_out} left out for the label {config.ignore_label!r}"
    return [text, *tasks.unknown_warning(examples.unknown, name)]


def _warn_of_labels(spec: TaskSpec, rows: int) -> list[str]:
    """Returns a line for the user if the labels are so many that the column may be a wrong one."""
    classes = len(spec.labels) if spec.kind.has_classes else 0
    if classes <= _FEW_CLASSES or 2 * classes <= rows:
        return []
    return [
        f"warning: column {spec.label} has {classes:,} different labels in {rows:,} training rows; "
        "is it the right column? A class needs several rows"
    ]


def _describe_stage(config: FinetuneConfig, total: int, packer: Packer) -> str:
    """Returns a line for the user with the steps, the shape of a batch and the joint loss.

    The joint loss is the weighted sum of the task loss and the LM loss.
    """
    task = "task" if config.task_weight == 1 else f"{config.task_weight:g} * task"
    return (
        f"finetune: {total:,} steps of {config.batch_size} examples packed in {packer.rows} rows "
        f"of {packer.row_length} tokens, {task} + {config.lm_weight:g} * LM"
    )


def _class_weights(labels: np.ndarray, classes: int) -> tuple[float, ...]:
    """Returns the balanced weight of each class, as scikit-learn's `class_weight="balanced"`.

    The weight is n / (k * n_c), where n_c of the n training examples have the class, and k is the
    number of classes that occur in training. The mean of the weights over the training examples is
    1. A class without a training example has the weight 1, which no example uses.

    Args:
      labels: int [n], the classes of the training examples.
      classes: the number of all classes.
    """
    count = np.bincount(labels, minlength=classes)
    present = np.count_nonzero(count)
    balanced = len(labels) / (present * np.maximum(count, 1))
    return tuple(np.where(count > 0, balanced, 1.0).tolist())


def _training_objective(
    config: FinetuneConfig, objective: Objective, spec: TaskSpec, train: Examples
) -> tuple[Objective, list[str]]:
    """Returns the objective of the training, and lines for the user about it.

    It differs from the objective of the evaluations in the class weights and the label smoothing.
    """
    lines: list[str] = []
    weights: tuple[float, ...] = ()
    if config.class_weights == schema.ClassWeights.BALANCED:
        assert train.labels is not None
        weights = _class_weights(train.labels, len(spec.labels))
        shown = [f"{name} {value:.3g}" for name, value in zip(spec.labels, weights, strict=True)]
        more = f" and {len(shown) - _SHOWN_CLASSES} more" if len(shown) > _SHOWN_CLASSES else ""
        lines.append(f"finetune: class weights {', '.join(shown[:_SHOWN_CLASSES])}{more}")
    changed = dataclasses.replace(
        objective, class_weights=weights, label_smoothing=config.label_smoothing
    )
    return changed, lines


def _task_spec(config: FinetuneConfig, setup: Setup, data: dict[str, LabelledTable]) -> TaskSpec:
    """Returns the task with its label names.

    If the task head reads the states of all tokens of a sequence (`Head.FLATTEN`), the task also
    gets the length to which all sequences are padded.
    """
    spec = with_labels(splits.task_spec(config), data)
    if config.head != schema.Head.FLATTEN:
        return spec
    length = tasks.padded_length(spec, data["train"], setup.tokenizer, setup.model.context_length)
    return dataclasses.replace(spec, flatten=length)


def finetune(config: FinetuneConfig, data: dict[str, LabelledTable], setup: Setup) -> Stage:
    """Builds the fine-tuning stage.

    Args:
      config: the configuration of the stage.
      data: name of a split -> its labelled rows, from `splits.labelled_splits`.
      setup: the values that all stages share.
    """
    mesh = setup.mesh
    require(
        not config.transfer.isdecimal() or int(config.transfer) <= setup.model.num_layers,
        f"`finetune.transfer`={config.transfer}: the model has {setup.model.num_layers} layers",
    )
    require(
        config.freeze <= setup.model.num_layers,
        f"`finetune.freeze`={config.freeze}: the model has {setup.model.num_layers} layers; give "
        "at most that number",
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
    packer = Packer(
        train.lengths, size, config.row_length, divisor, sequence_means, train.row_limit
    )
    epoch = _steps_per_epoch(config, len(train))
    total = config.steps or math.ceil(config.epochs * epoch)
    longest = max(split.max_sequence_length for split in examples.values())
    model = make_model(setup.model, spec, mesh, max_sequence_length=longest)
    objective = Objective(spec.kind, config.lm_weight, config.task_weight)
    evaluator = Evaluator(model, mesh, objective, setup.check_stop, config.freeze)
    training_objective, lines = _training_objective(config, objective, spec, train)
    has_probabilities = calibration.is_defined(spec.kind)

    def scorer(split: Examples) -> OutputScorer:
        """Returns the function that scores a split.

        The scores are "loss" (the joint loss), "task_loss", "lm_loss" and the metrics.
        """
        rows = Packer(split.lengths, size, packer.row_length, devices, sequence_means)
        return lambda params: evaluator.task_with_outputs(params, split, rows, spec, metric_names)

    def validate(scorer: OutputScorer, params: Params) -> Scores:
        """Returns the validation scores.

        If the task has probabilities, they have the keys of `calibration.fitted` too.
        """
        scores, logits = scorer(params)
        labels = examples["validation"].labels
        assert labels is not None
        return scores | (calibration.fitted(logits, labels) if has_probabilities else {})

    local = functools.partial(mesh_lib.local_rows, mesh)
    kind = loader.WholeEpochBatches if config.drop_last else loader.BalancedBatches

    def readers(splits: Splits) -> dict[str, Any]:
        """Returns the fields of the stage that read the examples."""
        scorers = {name: scorer(split) for name, split in splits.items() if name != "train"}
        return {
            "batches": kind(splits["train"], packer, size, setup.seed, local),
            "validate": functools.partial(validate, scorers["validation"]),
            "final": scorers,
        }

    notes = [
        line
        for name, split in examples.items()
        for line in _describe_split(name, split, data[name], config, setup.model)
    ]
    notes += [*_warn_of_labels(spec, len(train)), _describe_stage(config, total, packer), *lines]
    if "f1" in metric_names:
        notes.append(f"finetune: f1 is that of the label {spec.labels[-1]!r}")
    tokens = {name: int(split.lengths.sum()) for name, split in examples.items()}
    stage = Stage(
        name=schema.Stage.FINETUNE,
        model=model,
        objective=training_objective,
        optimizer=Optimizer(
            config.optimizer, total, "finetune.optimizer", config.freeze, config.average
        ),
        **readers(examples),
        metric=metric_names[0],
        eval_every=max(1, round(epoch / config.evals_per_epoch)),
        patience=config.patience,
        save_every=config.save_every,
        fingerprint=train.fingerprint,
        spec=spec,
        transfer=config.transfer,
        baselines=baselines,
        labels={name: tasks.label_ids(spec, data[name]) for name in examples if name != "train"},
        tables=data if config.baseline == schema.Baseline.LINEAR else {},
        notes=tuple(notes),
        validation_tokens=tokens["validation"],
        test_tokens=tokens.get("test", 0),
        step_tokens=tokens["train"] / len(train) * size,
    )
    if not config.freeze:
        return stage
    frozen = Frozen(model, config.freeze, mesh, setup.check_stop)

    def read_states(params: Params, say: Callable[[str], None]) -> Stage:
        return dataclasses.replace(
            stage, **readers(frozen.with_states(params, examples, say)), read_states=None
        )

    return dataclasses.replace(stage, read_states=read_states)
