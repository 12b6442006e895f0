"""Checks a configuration before anything else happens; every error names the wrong field.

The constraint of a single field stands in `schema`, beside the field. Rules about several fields
are here.
"""

import dataclasses
import re
from collections.abc import Collection
from typing import Any

from gptjax.config import constraints
from gptjax.config.schema import (
    AblationConfig,
    Experiment,
    FinetuneConfig,
    Head,
    MeshConfig,
    ModelConfig,
    PretrainConfig,
    ProbeConfig,
    ProbeKind,
    Stage,
    TaskKind,
    TokenizerConfig,
    TokenizerKind,
    Words,
    frozen,
    split_names,
)
from gptjax.errors import UserError, nearest, require


def _check_fields(config: Any, where: str) -> None:
    """Checks the value of each field, and of the parts' fields, against the field's constraint."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{where}.{field.name}" if where else field.name
        if dataclasses.is_dataclass(value):
            _check_fields(value, name)
        elif problem := constraints.problem(field, value):
            raise UserError(f"`{name}`={value}: {problem}")


def validate_model(model: ModelConfig) -> None:
    """Checks sizes and numerics; a wrong field is a `UserError`."""
    _check_fields(model, "model")
    require(
        model.context_length > 1,
        "`model.context_length`=1: a token needs another one to follow it",
    )
    require(
        model.width % model.num_heads == 0,
        f"`model.num_heads`={model.num_heads}: must divide `model.width`={model.width}",
    )
    require(
        model.segment_types in (0, 2, 3),
        f"`model.segment_types`={model.segment_types}: must be 0 (none), 2, or 3 (with one "
        "for padding)",
    )
    require(
        model.tied or not model.one_matrix,
        "`model.one_matrix`: its rows are the LM head; needs `model.tied`=true",
    )


def validate_tokenizer(tokenizer: TokenizerConfig) -> None:
    """Checks kind and size of the tokenizer; a wrong field is a `UserError`."""
    _check_fields(tokenizer, "tokenizer")
    require(
        tokenizer.words == Words.FAST or tokenizer.kind == TokenizerKind.GPT1,
        "`tokenizer.words`=exact: is for `tokenizer.kind`=gpt1",
    )


def _validate_pretrain(pretrain: PretrainConfig, model: ModelConfig, in_memory: bool) -> None:
    require(
        pretrain.steps > 0 or pretrain.epochs > 0,
        "`pretrain.steps`: give the number of steps (or `pretrain.epochs`)",
    )
    require(
        in_memory + bool(pretrain.dataset) + bool(pretrain.train_files) == 1,
        "`pretrain.train_files`: give text files, or `pretrain.dataset`, not both",
    )
    require(
        pretrain.window != 1 and 0 <= pretrain.window <= model.context_length,
        f"`pretrain.window`={pretrain.window}: must be 2 to "
        f"`model.context_length`={model.context_length}",
    )
    require(
        pretrain.dataset != "builtin" or not pretrain.validation_files,
        "`pretrain.validation_files`: the built-in text has a validation part of its own",
    )
    require(
        pretrain.validation_files or pretrain.validation_fraction > 0,
        "`pretrain.validation_fraction`: must be above 0 without validation_files",
    )


def validate_head(finetune: FinetuneConfig, model: ModelConfig) -> None:
    """Checks that the model can have the task's head; a wrong field is a `UserError`."""
    if finetune.head == Head.EXTRACT:
        return
    require(
        TaskKind(finetune.task).is_single_sequence,
        f"`finetune.head`=flatten: reads one sequence; task {finetune.task} has several",
    )
    require(
        model.segment_types == 3,
        "`finetune.head`=flatten: needs `model.segment_types`=3, the third for padding",
    )


def _validate_finetune(finetune: FinetuneConfig, in_memory: bool = False) -> None:
    require(
        finetune.dataset != "builtin",
        "`finetune.dataset`=builtin: write builtin:classification, builtin:entailment, "
        "builtin:similarity or builtin:multiple_choice",
    )
    require(
        finetune.steps > 0 or finetune.epochs > 0,
        f"`finetune.epochs`={finetune.epochs}: must be greater than 0",
    )
    require(
        in_memory + bool(finetune.dataset) + bool(finetune.train_file) == 1,
        "`finetune.train_file`: give a labelled file, or `finetune.dataset`, and not both",
    )
    require(
        not finetune.dataset or not (finetune.validation_file or finetune.test_file),
        "`finetune.validation_file`, `finetune.test_file`: go with train_file, not with dataset",
    )
    pair = TaskKind(finetune.task).is_pair
    require(
        not pair or finetune.text_pair,
        f"`finetune.text_pair`: task {finetune.task} needs the column of the second text",
    )
    require(
        pair or not finetune.text_pair,
        f"`finetune.text_pair`={finetune.text_pair}: task {finetune.task} takes one text; "
        "use `finetune.task`=entailment or similarity for two",
    )
    many = len(split_names(finetune.choices))
    require(
        (many >= 2) == (finetune.task == TaskKind.MULTIPLE_CHOICE),
        "`finetune.choices`: the columns of the answers, two or more, comma-separated, "
        "go with `finetune.task`=multiple_choice",
    )
    require(
        finetune.transfer in ("all", "none") or finetune.transfer.isdecimal(),
        f"`finetune.transfer`={finetune.transfer}: must be all, none, or a number of layers",
    )


def _validate_ablation(ablation: AblationConfig, model: ModelConfig) -> None:
    for name in split_names(ablation.only):
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
        try:
            _check_fields(task, "finetune")
            _validate_finetune(task)
            validate_head(task, model)
        except UserError as error:
            field = f"`ablation.tasks.{name}."
            raise UserError(str(error).replace("`finetune.", field)) from None


def validate_probe(name: str, probe: ProbeConfig) -> None:
    """Checks a probe; a wrong field is a `UserError`."""
    where = f"probes.{name}"
    _check_fields(probe, where)
    require(
        bool(probe.dataset) != bool(probe.file),
        f"`{where}.file`: give a file of rows, or `{where}.dataset`, and not both",
    )
    require(
        (len(split_names(probe.choices)) >= 2) == ProbeKind(probe.kind).has_candidates,
        f"`{where}.choices`: two or more columns, comma-separated, go with the kinds "
        "multiple_choice and substitution",
    )
    require(
        probe.pronoun or not probe.pronoun_start,
        f"`{where}.pronoun_start`: is the place of `{where}.pronoun`, which is empty",
    )


def _validate_mesh(mesh: MeshConfig) -> None:
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    require(
        sizes.count(-1) <= 1 and all(size == -1 or size > 0 for size in sizes),
        f"`mesh`: data, fsdp, tensor = {sizes}: sizes must be positive, at most one -1",
    )


def validate(experiment: Experiment, in_memory: Collection[str] = ()) -> Experiment:
    """Checks every field, and returns a frozen copy of the experiment.

    Args:
      experiment: the configuration.
      in_memory: the stages whose data are tables in memory. Their fields need not name any data.

    Raises:
      UserError: the first wrong field, with what to write instead.
    """
    _check_fields(experiment, "")
    validate_model(experiment.model)
    validate_tokenizer(experiment.tokenizer)
    require(
        experiment.pretrain or experiment.finetune or experiment.ablation,
        "`config`: the experiment has no stage; give it a pretrain or a finetune part",
    )
    if experiment.pretrain:
        _validate_pretrain(experiment.pretrain, experiment.model, Stage.PRETRAIN in in_memory)
    if experiment.finetune:
        _validate_finetune(experiment.finetune, Stage.FINETUNE in in_memory)
        validate_head(experiment.finetune, experiment.model)
        pretrained = bool(experiment.pretrain or experiment.init_from)
        require(
            pretrained or not experiment.finetune.compare_from_scratch,
            "`finetune.compare_from_scratch`: needs pretraining or `init_from`",
        )
        require(
            pretrained or not experiment.finetune.transfer.isdecimal(),
            "`finetune.transfer`: needs pretraining or `init_from`",
        )
    if experiment.ablation:
        _validate_ablation(experiment.ablation, experiment.model)
    for name, probe in experiment.probes.items():
        validate_probe(name, probe)
    _validate_mesh(experiment.mesh)
    return frozen(experiment)
