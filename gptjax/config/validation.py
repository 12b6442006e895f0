"""Checks a configuration once, before anything else happens: every error names its flag."""

import dataclasses
import enum
import math
import re
from typing import Any

from gptjax.config.schema import (
    AblationConfig,
    Activation,
    Algorithm,
    AttentionKind,
    Cut,
    Dtype,
    Experiment,
    FinetuneConfig,
    Head,
    LineBreaks,
    LmMean,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    ProbeConfig,
    ProbeKind,
    Remat,
    Schedule,
    TaskKind,
    TokenizerKind,
    Words,
    split_names,
)
from gptjax.errors import UserError, nearest, require


def _freeze(config: Any) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for part in value.values() if isinstance(value, dict) else [value]:
            if dataclasses.is_dataclass(part):
                _freeze(part)
    object.__setattr__(config, "_frozen", True)


def _positive(config: Any, where: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"`{where}.{name}`={value}: must be greater than 0")
        require(value < math.inf, f"`{where}.{name}`={value}: must be finite")


def _not_negative(config: Any, where: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"`{where}.{name}`={value}: must not be negative")
        require(value < math.inf, f"`{where}.{name}`={value}: must be finite")


def _choice(config: Any, where: str, name: str, allowed: type[enum.StrEnum]) -> None:
    value = getattr(config, name)
    require(
        value in tuple(allowed),
        f"`{where}.{name}`={value}: must be one of {', '.join(allowed)}{nearest(value, allowed)}",
    )


def _fraction(config: Any, where: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 <= value < 1, f"`{where}.{name}`={value}: must be at least 0 and below 1")


def validate_model(model: ModelConfig) -> None:
    """Checks sizes and numerics; a wrong one is a `UserError`."""
    _positive(model, "model", "context_length", "num_layers", "width", "num_heads", "init_std")
    _positive(model, "model", "layer_norm_epsilon")
    require(
        model.context_length > 1,
        "`model.context_length`=1: a token needs another one to follow it",
    )
    _choice(model, "model", "activation", Activation)
    _choice(model, "model", "dtype", Dtype)
    _choice(model, "model", "remat", Remat)
    _fraction(model, "model", "embedding_dropout", "attention_dropout")
    _fraction(model, "model", "residual_dropout", "head_dropout")
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
    _choice(model, "model", "attention", AttentionKind)
    _not_negative(model, "model", "vocab_size", "ffn_width", "unroll")


def _validate_optimizer(optimizer: OptimizerConfig, where: str) -> None:
    where = f"{where}.optimizer"
    _positive(optimizer, where, "learning_rate", "epsilon", "accumulation", "max_bad_steps")
    _fraction(optimizer, where, "beta1", "beta2", "warmup_fraction")
    _choice(optimizer, where, "schedule", Schedule)
    _choice(optimizer, where, "algorithm", Algorithm)
    _not_negative(optimizer, where, "weight_decay", "clip_norm", "warmup_steps")


def _validate_pretrain(pretrain: PretrainConfig, model: ModelConfig) -> None:
    _positive(pretrain, "pretrain", "batch_size", "save_every")
    _not_negative(pretrain, "pretrain", "steps", "epochs", "eval_every", "eval_batches")
    _choice(pretrain, "pretrain", "line_breaks", LineBreaks)
    require(
        pretrain.steps > 0 or pretrain.epochs > 0,
        "`pretrain.steps`: give the number of steps (or `pretrain.epochs`)",
    )
    require(
        bool(pretrain.dataset) != bool(pretrain.train_files),
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
    _fraction(pretrain, "pretrain", "validation_fraction")
    require(
        pretrain.validation_files or pretrain.validation_fraction > 0,
        "`pretrain.validation_fraction`: must be above 0 without validation_files",
    )
    _validate_optimizer(pretrain.optimizer, "pretrain")


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


def _validate_finetune(finetune: FinetuneConfig) -> None:
    _positive(finetune, "finetune", "batch_size", "save_every", "evals_per_epoch")
    _not_negative(finetune, "finetune", "steps", "epochs", "row_length", "lm_weight")
    _not_negative(finetune, "finetune", "task_weight")
    _choice(finetune, "finetune", "task", TaskKind)
    _choice(finetune, "finetune", "lm_mean", LmMean)
    _choice(finetune, "finetune", "cut", Cut)
    _choice(finetune, "finetune", "head", Head)
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
        bool(finetune.dataset) != bool(finetune.train_file),
        "`finetune.train_file`: give a labelled file, or `finetune.dataset`, and not both",
    )
    _fraction(finetune, "finetune", "validation_fraction")
    pair = TaskKind(finetune.task).is_pair
    require(
        not finetune.dataset or not (finetune.validation_file or finetune.test_file),
        "`finetune.validation_file`, `finetune.test_file`: go with train_file, not with dataset",
    )
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
    _validate_optimizer(finetune.optimizer, "finetune")


def _validate_ablation(ablation: AblationConfig, model: ModelConfig) -> None:
    _not_negative(ablation, "ablation", "parallel")
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
            _validate_finetune(task)
            validate_head(task, model)
        except UserError as error:
            field = f"`ablation.tasks.{name}."
            raise UserError(str(error).replace("`finetune.", field)) from None


def validate_probe(name: str, probe: ProbeConfig) -> None:
    """Checks a probe; a wrong field is a `UserError`."""
    where = f"probes.{name}"
    _choice(probe, where, "kind", ProbeKind)
    _not_negative(probe, where, "limit")
    require(
        bool(probe.dataset) != bool(probe.file),
        f"`{where}.file`: give a file of rows, or `{where}.dataset`, and not both",
    )
    chosen = ProbeKind(probe.kind).has_candidates
    require(
        (len(split_names(probe.choices)) >= 2) == chosen,
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


def validate(experiment: Experiment) -> Experiment:
    """Checks every field, then freezes and returns the experiment.

    Raises:
      UserError: the first wrong field, with its flag and what to write instead.
    """
    require(
        0 <= experiment.seed < 2**32,
        f"`seed`={experiment.seed}: must be 0 to {2**32 - 1}",
    )
    validate_model(experiment.model)
    _choice(experiment.tokenizer, "tokenizer", "kind", TokenizerKind)
    _choice(experiment.tokenizer, "tokenizer", "words", Words)
    require(
        experiment.tokenizer.words == Words.FAST or experiment.tokenizer.kind == TokenizerKind.GPT1,
        "`tokenizer.words`=exact: is for `tokenizer.kind`=gpt1",
    )
    _positive(experiment.tokenizer, "tokenizer", "vocab_size")
    require(
        experiment.pretrain or experiment.finetune or experiment.ablation,
        "`config`: the experiment has no stage; give it a pretrain or a finetune part",
    )
    if experiment.pretrain:
        _validate_pretrain(experiment.pretrain, experiment.model)
    if experiment.finetune:
        _validate_finetune(experiment.finetune)
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
    _positive(experiment.checkpoint, "checkpoint", "keep_newest")
    _not_negative(experiment.checkpoint, "checkpoint", "keep_best")
    _freeze(experiment)
    return experiment
