"""Configurations: JSON round trip, frozen copies, and errors that name the field."""

import copy
import dataclasses
import importlib.util
import json
import math
import pathlib
import typing

import jax
import pytest

from gptjax import errors
from gptjax.config import schema, validation
from gptjax.config.constraints import problem
from gptjax.config.schema import (
    AblationConfig,
    CheckpointConfig,
    Experiment,
    FinetuneConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    ProbeConfig,
    TokenizerConfig,
)
from gptjax.errors import UserError
from gptjax.model import gpt
from gptjax.model.gpt import GPT

EXPERIMENTS = sorted((pathlib.Path(__file__).parents[2] / "experiments").glob("*.py"))


def load(path):
    """Returns the experiment of a file, as `--config=FILE` reads it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def whole() -> Experiment:
    """Returns an experiment with both stages, an ablation and a probe."""
    return Experiment(
        probes={"NAME": ProbeConfig(kind="acceptability", dataset="owner/name")},
        ablation=AblationConfig(tasks={"NAME": FinetuneConfig(dataset="builtin:classification")}),
        pretrain=PretrainConfig(dataset="builtin", steps=3000),
        finetune=FinetuneConfig(dataset="builtin:classification"),
    )


def set_field(experiment, name, value):
    *parts, last = name.split(".")
    for part in parts:
        is_dict = isinstance(experiment, dict)
        experiment = experiment[part] if is_dict else getattr(experiment, part)
    setattr(experiment, last, value)


def leaves(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_there_are_experiments():
    assert "quickstart" in [path.stem for path in EXPERIMENTS]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_loads_builds_and_survives_json(path):
    experiment = load(path)
    values = json.loads(json.dumps(schema.to_dict(experiment)))
    again = schema.from_dict(Experiment, values, "config.json")
    assert again == experiment
    assert schema.differences(values, schema.to_dict(again)) == []
    # Experiments for the user's own data lack only the names of the files.
    if experiment.pretrain and not experiment.pretrain.dataset:
        experiment.pretrain.train_files = "text.txt"
    if experiment.finetune and not experiment.finetune.dataset:
        experiment.finetune.train_file = "rows.csv"
    for task in experiment.ablation.tasks.values() if experiment.ablation else ():
        task.train_file = "rows.csv"
    validation.validate(experiment)
    model = dataclasses.replace(
        experiment.model,
        vocab_size=experiment.model.vocab_size or experiment.tokenizer.vocab_size + 4,
    )
    shapes = jax.eval_shape(
        lambda key: gpt.init_params(GPT(model, num_outputs=2), key), jax.random.key(0)
    )
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(shapes))
    tokens = jax.ShapeDtypeStruct((2, model.context_length), "int32")
    states = jax.eval_shape(
        lambda params, x: gpt.run(GPT(model), params, x, x, x, x, method="hidden"),
        shapes, tokens,
    )  # fmt: skip
    assert states.shape == (2, model.context_length, model.width)


def test_round_trip_keeps_every_field():
    """Here every field has a value that is not its default."""
    experiment = whole()
    changed = 0
    for name, value in leaves(schema.to_dict(experiment)):
        new = {bool: not value, int: 7, float: 0.123, str: "other"}[type(value)]
        set_field(experiment, name, new)
        changed += 1
    values = json.loads(json.dumps(schema.to_dict(experiment)))
    assert all(value in (7, 0.123, "other", True, False) for _, value in leaves(values))
    assert changed > 70
    again = schema.from_dict(Experiment, values, "x")
    assert again == experiment
    assert again.finetune.optimizer == experiment.finetune.optimizer
    assert isinstance(again.finetune.optimizer, OptimizerConfig)
    assert schema.from_dict(Experiment, {}, "x") == Experiment()
    assert schema.from_dict(Experiment, {"pretrain": None}, "x") == Experiment()


def test_unknown_fields_are_named():
    with pytest.raises(UserError) as info:
        schema.from_dict(Experiment, {"model": {"widht": 3}}, "run/config.json")
    assert str(info.value) == "run/config.json: unknown field widht; did you mean 'width'?"


def test_differences_lists_what_may_not_change():
    old, new = whole(), whole()
    new.mesh = MeshConfig(data=1, fsdp=4, tensor=2)
    new.checkpoint = CheckpointConfig(keep_newest=9, keep_best=0)
    new.model.remat, new.model.unroll = "full", 4
    to_dict = schema.to_dict
    assert schema.differences(to_dict(old), to_dict(new)) == []
    new.model.width, new.pretrain.optimizer.beta1, new.name = 64, 0.5, "other"
    assert schema.differences(to_dict(old), to_dict(new)) == [
        "model.width: 768 -> 64",
        'name: "experiment" -> "other"',
        "pretrain.optimizer.beta1: 0.9 -> 0.5",
    ]
    new = whole()
    new.finetune = None
    (line,) = schema.differences(to_dict(old), to_dict(new))
    assert line.startswith("finetune: {")
    assert line.endswith("-> null")
    free = (
        "mesh.", "checkpoint.", "model.remat", "model.unroll", "ablation.variants",
        "ablation.only", "ablation.parallel", "finetune.baseline",
    )  # fmt: skip
    for name, value in leaves(to_dict(old)):
        new = whole()
        other = {bool: not value, int: 7, float: 0.123, str: "other"}[type(value)]
        set_field(new, name, other)
        found = schema.differences(to_dict(old), to_dict(new))
        may = name == "model.attention" or name.startswith(free)
        assert [line.split(":")[0] for line in found] == [name] * (not may)


def test_field_names_are_all_fields():
    names = list(schema.field_names(Experiment))
    assert len(names) == len(set(names))
    assert {name for name, _ in leaves(schema.to_dict(whole()))} < set(names)
    assert {"model", "pretrain", "finetune.optimizer.schedule"} < set(names)
    assert "pretrain.optimizer.learning_rate" in names


def test_validation_returns_a_copy_with_every_part_frozen():
    given = whole()
    given.model.width = 96
    experiment = validation.validate(given)
    assert experiment == given
    for name in schema.field_names(Experiment):
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
            set_field(experiment, name, None)
    for frozen in (copy.deepcopy(experiment), experiment):
        with pytest.raises(dataclasses.FrozenInstanceError):
            frozen.model.width = 3
    fresh = dataclasses.replace(experiment.model, width=48)
    fresh.num_heads = 4
    assert (fresh.width, experiment.model.width) == (48, 96)
    assert validation.validate(experiment) == experiment


def test_what_the_user_does_to_his_experiment_does_not_reach_the_run():
    given = whole()
    experiment = validation.validate(given)
    given.model.width = 12
    given.finetune.optimizer.beta1 = 0.5
    given.ablation.tasks["NAME"].epochs = 9
    given.probes["other"] = ProbeConfig(dataset="a")
    assert experiment == validation.validate(whole())


def test_a_stored_configuration_is_frozen():
    again = schema.from_dict(Experiment, schema.to_dict(whole()), "x")
    for name in schema.field_names(Experiment):
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
            set_field(again, name, None)


def test_equal_configurations_hash_equal():
    one, two = whole(), validation.validate(whole())
    assert one == two
    assert hash(one) == hash(two)
    for name in ("model", "tokenizer", "pretrain", "finetune", "mesh", "checkpoint"):
        assert hash(getattr(one, name)) == hash(getattr(two, name))
    assert len({ModelConfig(), ModelConfig(), ModelConfig(width=96)}) == 2
    assert TokenizerConfig() != ModelConfig()


def test_defaults_are_gpt1():
    model, pretrain, finetune = ModelConfig(), PretrainConfig(), FinetuneConfig()
    sizes = (model.num_layers, model.width, model.num_heads, model.context_length)
    assert sizes == (12, 768, 12, 512)
    assert (model.hidden_ffn_width, model.head_width) == (3072, 64)
    assert ModelConfig(ffn_width=100).hidden_ffn_width == 100
    assert {model.embedding_dropout, model.attention_dropout, model.residual_dropout} == {0.1}
    assert (model.init_std, model.layer_norm_epsilon, model.activation) == (0.02, 1e-5, "gelu_tanh")
    adam = pretrain.optimizer
    assert (adam.learning_rate, adam.warmup_steps, adam.schedule) == (2.5e-4, 2000, "cosine")
    assert (adam.weight_decay, pretrain.batch_size) == (0.01, 64)
    adam = finetune.optimizer
    assert (adam.learning_rate, adam.warmup_fraction, adam.schedule) == (6.25e-5, 0.002, "linear")
    assert (finetune.batch_size, finetune.epochs, finetune.lm_weight) == (32, 3, 0.5)


_POSITIVE = (
    *("model.context_length", "model.num_layers", "model.width", "model.num_heads"),
    *("model.init_std", "model.layer_norm_epsilon", "tokenizer.vocab_size"),
    *("pretrain.batch_size", "pretrain.save_every", "finetune.batch_size", "finetune.save_every"),
    *("finetune.evals_per_epoch", "pretrain.optimizer.learning_rate", "finetune.optimizer.epsilon"),
    *("pretrain.optimizer.accumulation", "finetune.optimizer.max_bad_steps"),
    "checkpoint.keep_newest",
)
_NOT_NEGATIVE = (
    *("model.vocab_size", "model.ffn_width", "pretrain.steps", "pretrain.epochs"),
    *("pretrain.eval_every", "pretrain.eval_batches", "finetune.steps", "finetune.epochs"),
    *("finetune.row_length", "finetune.lm_weight", "pretrain.optimizer.weight_decay"),
    *("pretrain.optimizer.clip_norm", "finetune.optimizer.warmup_steps", "checkpoint.keep_best"),
    "finetune.patience",
)
_FRACTIONS = (
    *("model.embedding_dropout", "model.attention_dropout", "model.residual_dropout"),
    *("model.head_dropout", "pretrain.validation_fraction", "finetune.validation_fraction"),
    *("pretrain.optimizer.beta1", "finetune.optimizer.beta2"),
    *("finetune.optimizer.warmup_fraction", "finetune.label_smoothing", "finetune.average"),
)
_CHOICES = {
    "model.activation": "gelu", "model.dtype": "float16", "model.remat": "some",
    "tokenizer.kind": "bpee", "pretrain.line_breaks": "joined", "finetune.task": "classify",
    "pretrain.optimizer.schedule": "cosin", "finetune.class_weights": "balance",
}  # fmt: skip
WRONG = [
    *((name, value, "greater than 0") for name in _POSITIVE for value in (0, -1)),
    *((name, -1, "must not be negative") for name in _NOT_NEGATIVE),
    *((name, math.inf, "must be finite") for name in ("model.init_std", "pretrain.epochs")),
    *((name, value, "at least 0 and below 1") for name in _FRACTIONS for value in (-0.1, 1.0)),
    *((name, value, "must be one of") for name, value in _CHOICES.items()),
    *((name, math.nan, "") for name in ("model.head_dropout", "finetune.optimizer.learning_rate")),
    *(("finetune.optimizer.layer_decay", value, "at most 1") for value in (0.0, 1.1, math.nan)),
    ("model.num_heads", 7, "must divide `model.width`=768"),
    ("model.segment_types", 1, "0 (none), 2, or 3"),
    ("pretrain.window", 513, "2 to `model.context_length`=512"),
    ("pretrain.window", 1, "2 to `model.context_length`=512"),
    ("pretrain.window", -1, "2 to `model.context_length`=512"),
    ("finetune.text_pair", "b", "`finetune.task`=entailment or similarity"),
    ("finetune.choices", "a,b", "`finetune.task`=multiple_choice"),
]


@pytest.mark.parametrize(("name", "value", "advice"), WRONG)
def test_a_wrong_value_is_named_with_its_flag(name, value, advice):
    experiment = whole()
    set_field(experiment, name, value)
    with pytest.raises(UserError) as info:
        validation.validate(experiment)
    message = str(info.value)
    assert "\n" not in message
    assert message.startswith(f"`{name}`")
    assert advice in message


@pytest.mark.parametrize(
    ("changes", "field", "advice"),
    [
        ({"pretrain": None, "finetune": None, "ablation": None}, "config", "no stage"),
        ({"pretrain.steps": 0}, "pretrain.steps", "number of steps (or `pretrain.epochs`)"),
        ({"pretrain.dataset": ""}, "pretrain.train_files", "or `pretrain.dataset`"),
        ({"pretrain.train_files": "a.txt"}, "pretrain.train_files", "not both"),
        ({"pretrain.validation_fraction": 0.0}, "pretrain.validation_fraction", "above 0"),
        ({"finetune.epochs": 0.0}, "finetune.epochs", "greater than 0"),
        ({"finetune.dataset": ""}, "finetune.train_file", "or `finetune.dataset`"),
        ({"finetune.train_file": "a.csv"}, "finetune.train_file", "not both"),
        ({"finetune.task": "similarity"}, "finetune.text_pair", "column of the second text"),
        ({"finetune.task": "regression"}, "finetune.text_pair", "column of the second text"),
        ({"finetune.task": "multiple_choice"}, "finetune.choices", "two or more"),
        (
            {
                "finetune.task": "multiple_choice", "finetune.choices": "a,b",
                "finetune.class_weights": "balanced",
            },
            "finetune.class_weights", "write none",
        ),
        (
            {
                "finetune.task": "regression", "finetune.text_pair": "b",
                "finetune.label_smoothing": 0.1,
            },
            "finetune.label_smoothing", "write 0",
        ),
        (
            {"finetune.task": "multiple_choice", "finetune.choices": "a,"},
            "finetune.choices", "two or more",
        ),
        (
            {"pretrain": None, "finetune.compare_from_scratch": True},
            "finetune.compare_from_scratch", "`init_from`",
        ),
        (
            {"finetune.task": "entailment", "finetune.text_pair": "b", "finetune.long": "windows"},
            "finetune.long", "write cut",
        ),
        (
            {"finetune.head": "flatten", "finetune.long": "windows"},
            "finetune.long", "`finetune.head`=flatten",
        ),
        ({"pretrain.validation_files": "v.txt"}, "pretrain.validation_files", "of its own"),
        ({"finetune.test_file": "t.csv"}, "finetune.validation_file", "with train_file"),
        ({"model.context_length": 1}, "model.context_length", "another one to follow"),
        ({"mesh.data": -1, "mesh.fsdp": -1}, "mesh", "at most one -1"),
        ({"mesh.tensor": 0}, "mesh", "positive"),
    ],
)  # fmt: skip
def test_fields_that_do_not_go_together(changes, field, advice):
    experiment = whole()
    for name, value in changes.items():
        set_field(experiment, name, value)
    with pytest.raises(UserError) as info:
        validation.validate(experiment)
    assert str(info.value).startswith(f"`{field}`")
    assert advice in str(info.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"pretrain": None},
        {"finetune": None},
        {"pretrain.steps": 0, "pretrain.epochs": 0.5},
        {"finetune.epochs": 0.0, "finetune.steps": 5},
        {
            "pretrain.dataset": "", "pretrain.train_files": "*.txt",
            "pretrain.validation_fraction": 0.0, "pretrain.validation_files": "v.txt",
        },
        {"pretrain.dataset": "", "pretrain.train_files": "*.txt"},
        {"pretrain.window": 512},
        {"pretrain.window": 2},
        {"finetune.task": "multiple_choice", "finetune.choices": "a, b"},
        {"finetune.task": "regression", "finetune.text_pair": "b"},
        {"finetune.compare_from_scratch": True},
        {"pretrain": None, "init_from": "runs/x", "finetune.compare_from_scratch": True},
        {"mesh.data": 2, "mesh.fsdp": -1},
    ],
)  # fmt: skip
def test_what_is_allowed(changes):
    experiment = whole()
    for name, value in changes.items():
        set_field(experiment, name, value)
    assert validation.validate(experiment) == experiment


def test_every_number_has_a_constraint():
    """The fields in `free` have none: rules in `validation` check them."""
    free = {"window", "data", "fsdp", "tensor"}
    classes = (
        ModelConfig, TokenizerConfig, OptimizerConfig, PretrainConfig, FinetuneConfig, ProbeConfig,
        MeshConfig, CheckpointConfig, AblationConfig, Experiment,
    )  # fmt: skip
    fields = [field for cls in classes for field in dataclasses.fields(cls)]
    numbers = [field for field in fields if field.type in (int, float)]
    assert {field.name for field in numbers if not field.metadata} == free
    wrong = [field.name for field in numbers if field.metadata and not problem(field, -1)]
    assert not wrong


def test_small_helpers():
    assert schema.split_names(" a, b,,c ,") == ("a", "b", "c")
    assert schema.split_names("") == ()
    assert errors.nearest("widht", ["width", "height"]) == "; did you mean 'width'?"
    assert errors.nearest("zzz", ["width"]) == ""


def test_every_field_is_typed_so_that_flags_can_be_checked():
    for cls in (Experiment, ModelConfig, PretrainConfig, FinetuneConfig, OptimizerConfig):
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            wanted = hints[field.name]
            if typing.get_origin(wanted) is dict:
                assert typing.get_args(wanted)[0] is str
            assert wanted in (bool, int, float, str) or schema.part_class(wanted)
