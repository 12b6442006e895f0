"""Checks a configuration before anything else happens; every error names the wrong field.

The constraint of a single field stands in `schema`, beside the field. Rules about several fields
are here.
"""

import dataclasses
import re
from collections.abc import Collection
from typing import Any

from gptjax.config import constraints, schema
from gptjax.config.schema import Experiment, FinetuneConfig, ModelConfig, PretrainConfig, TaskKind
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
        model.tied or not model.one_matrix,
        "`model.one_matrix`: its rows are the LM head; needs `model.tied`=true",
    )


def validate_tokenizer(tokenizer: schema.TokenizerConfig) -> None:
    """Checks kind and size of the tokenizer; a wrong field is a `UserError`."""
    _check_fields(tokenizer, "tokenizer")
    require(
        tokenizer.words == schema.Words.FAST or tokenizer.kind == schema.TokenizerKind.GPT1,
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


def validate_head(finetune: FinetuneConfig, model: ModelConfig, where: str = "finetune") -> None:
    """Checks that the model can have the task's head; a wrong field is a `UserError`."""
    if finetune.head == schema.Head.EXTRACT:
        return
    require(
        TaskKind(finetune.task).is_single_sequence,
        f"`{where}.head`=flatten: reads one sequence; task {finetune.task} has several",
    )
    require(
        model.segment_types == 3,
        f"`{where}.head`=flatten: needs `model.segment_types`=3, the third for padding",
    )


def _validate_finetune(
    finetune: FinetuneConfig, model: ModelConfig, where: str, in_memory: bool = False
) -> None:
    require(
        finetune.dataset != "builtin",
        f"`{where}.dataset`=builtin: write builtin:classification, builtin:entailment, "
        "builtin:similarity or builtin:multiple_choice",
    )
    require(
        finetune.steps > 0 or finetune.epochs > 0,
        f"`{where}.epochs`={finetune.epochs}: must be greater than 0",
    )
    require(
        in_memory + bool(finetune.dataset) + bool(finetune.train_file) == 1,
        f"`{where}.train_file`: give a labelled file, or `{where}.dataset`, and not both",
    )
    require(
        not finetune.dataset or not (finetune.validation_file or finetune.test_file),
        f"`{where}.validation_file`, `{where}.test_file`: go with train_file, not with dataset",
    )
    pair = TaskKind(finetune.task).is_pair
    require(
        not pair or finetune.text_pair,
        f"`{where}.text_pair`: task {finetune.task} needs the column of the second text",
    )
    require(
        pair or not finetune.text_pair,
        f"`{where}.text_pair`={finetune.text_pair}: task {finetune.task} takes one text; "
        f"use `{where}.task`=entailment or similarity for two",
    )
    many = len(schema.split_names(finetune.choices))
    require(
        (many >= 2) == (finetune.task == TaskKind.MULTIPLE_CHOICE),
        f"`{where}.choices`: the columns of the answers, two or more, comma-separated, "
        f"go with `{where}.task`=multiple_choice",
    )
    validate_head(finetune, model, where)


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
    """Checks a probe; a wrong field is a `UserError`."""
    where = f"probes.{name}"
    _check_fields(probe, where)
    require(
        bool(probe.dataset) != bool(probe.file),
        f"`{where}.file`: give a file of rows, or `{where}.dataset`, and not both",
    )
    require(
        (len(schema.split_names(probe.choices)) >= 2)
        == schema.ProbeKind(probe.kind).has_candidates,
        f"`{where}.choices`: two or more columns, comma-separated, go with the kinds "
        "multiple_choice and substitution",
    )
    require(
        probe.pronoun or not probe.pronoun_start,
        f"`{where}.pronoun_start`: is the place of `{where}.pronoun`, which is empty",
    )


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
      in_memory: the stages whose data are tables in memory. Their fields need not name any data.

    Raises:
      UserError: the first wrong field, with what to write instead.
    """
    model, pretrain, finetune = experiment.model, experiment.pretrain, experiment.finetune
    _check_fields(experiment, "")
    validate_model(model)
    validate_tokenizer(experiment.tokenizer)
    require(
        pretrain or finetune or experiment.ablation,
        "`config`: the experiment has no stage; give it a pretrain or a finetune part",
    )
    if pretrain:
        _validate_pretrain(pretrain, model, schema.Stage.PRETRAIN in in_memory)
    if finetune:
        _validate_finetune(finetune, model, "finetune", schema.Stage.FINETUNE in in_memory)
        pretrained = pretrain or experiment.init_from
        require(
            pretrained or not finetune.compare_from_scratch,
            "`finetune.compare_from_scratch`: needs pretraining or `init_from`",
        )
        require(
            pretrained or not finetune.transfer.isdecimal(),
            "`finetune.transfer`: needs pretraining or `init_from`",
        )
    if experiment.ablation:
        _validate_ablation(experiment.ablation, model)
    for name, probe in experiment.probes.items():
        validate_probe(name, probe)
    _validate_mesh(experiment.mesh)
    return schema.frozen(experiment)
