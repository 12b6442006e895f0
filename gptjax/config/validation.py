"""Checks of a configuration, which are made before a run. Every error names the wrong field.

A rule about a single field is the field's constraint, which is written in `schema` beside the
field. Rules about several fields are in this file.
"""

import dataclasses
import re
from collections.abc import Collection
from typing import Any

from gptjax.config import constraints, schema
from gptjax.config.schema import Experiment, FinetuneConfig, ModelConfig, PretrainConfig, TaskKind
from gptjax.errors import UserError, nearest, require


def _check_fields(config: Any, where: str) -> None:
    """Checks the constraints of all fields of a configuration and of its parts.

    Args:
      config: the configuration.
      where: the dotted name of the configuration, for error messages. An empty string means the
        experiment.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{where}.{field.name}" if where else field.name
        if dataclasses.is_dataclass(value):
            _check_fields(value, name)
        elif problem := constraints.problem(field, value):
            raise UserError(f"`{name}`={value}: {problem}")


def validate_model(model: ModelConfig) -> None:
    """Checks sizes and numerics of the model. Raises `UserError` for a wrong field."""
    _check_fields(model, "model")
    if model.context_length == 1:
        raise UserError("`model.context_length`=1: a token needs another one to follow it")
    if model.width % model.num_heads:
        raise UserError(
            f"`model.num_heads`={model.num_heads}: must divide `model.width`={model.width}"
        )
    if model.one_matrix and not model.tied:
        raise UserError("`model.one_matrix`: its rows are the LM head; needs `model.tied`=true")


def validate_tokenizer(tokenizer: schema.TokenizerConfig, from_hub: bool = False) -> None:
    """Checks kind and size of the tokenizer.

    Args:
      tokenizer: the configuration.
      from_hub: whether the tokenizer comes from a model of the hub. `kind` is not used then.

    Raises:
      UserError: a field is wrong.
    """
    _check_fields(tokenizer, "tokenizer")
    gpt1 = from_hub or tokenizer.kind == schema.TokenizerKind.GPT1
    if tokenizer.words == schema.Words.EXACT and not gpt1:
        raise UserError("`tokenizer.words`=exact: is for `tokenizer.kind`=gpt1")


def _validate_pretrain(pretrain: PretrainConfig, model: ModelConfig, in_memory: bool) -> None:
    if not (pretrain.steps or pretrain.epochs):
        raise UserError("`pretrain.steps`: give the number of steps (or `pretrain.epochs`)")
    if in_memory + bool(pretrain.dataset) + bool(pretrain.train_files) != 1:
        raise UserError("`pretrain.train_files`: give text files, or `pretrain.dataset`, not both")
    if pretrain.window == 1 or not 0 <= pretrain.window <= model.context_length:
        raise UserError(
            f"`pretrain.window`={pretrain.window}: must be 2 to "
            f"`model.context_length`={model.context_length}"
        )
    if pretrain.dataset == "builtin" and pretrain.validation_files:
        raise UserError(
            "`pretrain.validation_files`: the built-in text has a validation part of its own"
        )
    if not (pretrain.validation_files or pretrain.validation_fraction):
        raise UserError("`pretrain.validation_fraction`: must be above 0 without validation_files")


def validate_head(finetune: FinetuneConfig, model: ModelConfig, where: str = "finetune") -> None:
    """Checks that the model can have the head of the task. Raises `UserError` for a wrong field."""
    flatten = finetune.head == schema.Head.FLATTEN
    if finetune.long == schema.Long.WINDOWS:
        if finetune.task != TaskKind.CLASSIFICATION:
            raise UserError(
                f"`{where}.long`=windows: is for the task classification; task {finetune.task} has "
                "several texts; write cut"
            )
        if flatten:
            raise UserError(
                f"`{where}.long`=windows: does not go with `{where}.head`=flatten, which reads one "
                "sequence; write cut"
            )
    if flatten and not TaskKind(finetune.task).is_single_sequence:
        raise UserError(
            f"`{where}.head`=flatten: reads one sequence; task {finetune.task} has several"
        )
    if flatten and model.segment_types != 3:
        raise UserError(
            f"`{where}.head`=flatten: needs `model.segment_types`=3, the third for padding"
        )


def _validate_finetune(
    finetune: FinetuneConfig, model: ModelConfig, where: str, in_memory: bool = False
) -> None:
    if finetune.dataset == "builtin":
        raise UserError(
            f"`{where}.dataset`=builtin: write builtin:word_order, builtin:classification, "
            "builtin:entailment, builtin:similarity or builtin:multiple_choice"
        )
    if not (finetune.steps or finetune.epochs):
        raise UserError(f"`{where}.epochs`={finetune.epochs}: must be greater than 0")
    if in_memory + bool(finetune.dataset) + bool(finetune.train_file) != 1:
        raise UserError(
            f"`{where}.train_file`: give a labelled file, or `{where}.dataset`, and not both"
        )
    if finetune.dataset and (finetune.validation_file or finetune.test_file):
        raise UserError(
            f"`{where}.validation_file`, `{where}.test_file`: go with train_file, not with dataset"
        )
    pair = TaskKind(finetune.task).is_pair
    if pair and not finetune.text_pair:
        raise UserError(
            f"`{where}.text_pair`: task {finetune.task} needs the column of the second text"
        )
    if finetune.text_pair and not pair:
        raise UserError(
            f"`{where}.text_pair`={finetune.text_pair}: task {finetune.task} takes one text; "
            f"use `{where}.task`=entailment or similarity for two"
        )
    many = len(schema.split_names(finetune.choices)) > 1
    if many != (finetune.task == TaskKind.MULTIPLE_CHOICE):
        raise UserError(
            f"`{where}.choices`: the columns of the answers, two or more, comma-separated, "
            f"go with `{where}.task`=multiple_choice"
        )
    _validate_task_loss(finetune, where)
    validate_head(finetune, model, where)


def _validate_task_loss(finetune: FinetuneConfig, where: str) -> None:
    """Checks that the task has the classes which the fields of the training loss need."""
    kind = TaskKind(finetune.task)
    require(
        kind.has_classes or finetune.class_weights == schema.ClassWeights.NONE,
        f"`{where}.class_weights`={finetune.class_weights}: task {kind} has no classes; write none",
    )
    require(
        kind != TaskKind.REGRESSION or not finetune.label_smoothing,
        f"`{where}.label_smoothing`={finetune.label_smoothing:g}: task {kind} has no classes to "
        "share a target; write 0",
    )


def _validate_ablation(ablation: schema.AblationConfig, model: ModelConfig) -> None:
    for name in schema.split_names(ablation.only):
        require(
            name in ablation.tasks,
            f"`ablation.only`: no task {name!r}{nearest(name, ablation.tasks)}; the "
            f"experiment has {', '.join(ablation.tasks)}",
        )
    for name, task in ablation.chosen.items():
        require(
            re.fullmatch(r"[\w-]+", name),
            f"`ablation.tasks`: {name!r} names a folder too; use letters, digits, _ and -",
        )
        _check_fields(task, f"ablation.tasks.{name}")
        _validate_finetune(task, model, f"ablation.tasks.{name}")


def validate_probe(name: str, probe: schema.ProbeConfig) -> None:
    """Checks a zero-shot probe. Raises `UserError` for a wrong field."""
    where = f"probes.{name}"
    _check_fields(probe, where)
    if bool(probe.dataset) == bool(probe.file):
        raise UserError(f"`{where}.file`: give a file of rows, or `{where}.dataset`, and not both")
    many = len(schema.split_names(probe.choices)) > 1
    if many != schema.ProbeKind(probe.kind).has_candidates:
        raise UserError(
            f"`{where}.choices`: two or more columns, comma-separated, go with the kinds "
            "multiple_choice and substitution"
        )
    if probe.pronoun_start and not probe.pronoun:
        raise UserError(
            f"`{where}.pronoun_start`: is the place of `{where}.pronoun`, which is empty"
        )


def _validate_choose(experiment: Experiment) -> None:
    names = schema.split_names(experiment.choose)
    for name in names:
        if name not in schema.CHOOSABLE:
            raise UserError(
                f"`choose`: the data cannot choose {name!r}{nearest(name, schema.CHOOSABLE)}; the "
                f"fields are {', '.join(schema.CHOOSABLE)}"
            )
    if names and (experiment.pretrain or not experiment.finetune):
        raise UserError("`choose`: is for an experiment with a finetune part alone; leave it empty")


def _validate_mesh(mesh: schema.MeshConfig) -> None:
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    require(
        sizes.count(-1) <= 1 and all(size == -1 or size > 0 for size in sizes),
        f"`mesh`: data, fsdp, tensor = {sizes}: sizes must be positive, at most one -1",
    )


def validate(experiment: Experiment, in_memory: Collection[str] = ()) -> Experiment:
    """Checks every field, and returns a frozen copy of the experiment.

    Args:
      experiment: the configuration.
      in_memory: the stages whose data are tables in memory. The fields of these stages need not
        name any data.

    Raises:
      UserError: a field is wrong. The message names the first wrong field and a correction.
    """
    model, pretrain, finetune = experiment.model, experiment.pretrain, experiment.finetune
    _check_fields(experiment, "")
    validate_model(model)
    from_hub = bool(schema.hub_address(experiment.init_from))
    validate_tokenizer(experiment.tokenizer, from_hub)
    require(
        from_hub or not experiment.init_from_commit,
        f"`init_from_commit`={experiment.init_from_commit}: is for a model of the hub, and "
        f"`init_from` is {experiment.init_from or 'empty'}; leave it out",
    )
    require(
        pretrain or finetune or experiment.ablation,
        "`config`: the experiment has no stage; give it a pretrain or a finetune part",
    )
    if pretrain:
        _validate_pretrain(pretrain, model, schema.Stage.PRETRAIN in in_memory)
    if finetune:
        _validate_finetune(finetune, model, "finetune", schema.Stage.FINETUNE in in_memory)
    if finetune and not (pretrain or experiment.init_from):
        if finetune.compare_from_scratch:
            raise UserError("`finetune.compare_from_scratch`: needs pretraining or `init_from`")
        if finetune.transfer.isdecimal():
            raise UserError("`finetune.transfer`: needs pretraining or `init_from`")
    experiment = dataclasses.replace(experiment, choose=experiment.not_set())
    _validate_choose(experiment)
    if experiment.ablation:
        _validate_ablation(experiment.ablation, model)
    for name, probe in experiment.probes.items():
        validate_probe(name, probe)
    _validate_mesh(experiment.mesh)
    return schema.frozen(experiment)
