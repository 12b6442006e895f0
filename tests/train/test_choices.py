"""Values that the data chooses: by which rules, for which fields, and in which runs."""

import dataclasses

import numpy as np
import pytest
import runs

import gptjax
from gptjax.config import experiments, schema, validation
from gptjax.config.schema import Experiment, FinetuneConfig, TaskKind
from gptjax.errors import UserError
from gptjax.io import files
from gptjax.train import choices
from gptjax.train.choices import Facts

ALL = ",".join(schema.CHOOSABLE)


def facts(lengths, kind="classification", **changes):
    values = {"pretrained": False, "width": 128} | changes
    return Facts(TaskKind(kind), len(lengths), np.array(lengths), **values)


def test_each_field_that_can_be_chosen_has_a_rule():
    assert set(choices.RULES) == set(schema.CHOOSABLE)
    assert set(schema.CHOOSABLE) <= set(schema.field_names(Experiment))


@pytest.mark.parametrize("kind", TaskKind)
@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize(("rows", "longest"), [(2, 3), (200, 600), (5000, 60), (500_000, 200)])
def test_every_choice_is_a_valid_configuration(kind, pretrained, longest, rows):
    lengths = np.linspace(1, longest, rows).astype(int)
    seen = facts(lengths, kind, pretrained=pretrained)
    columns = {"text_pair": "b"} if kind.is_pair else {}
    if kind == TaskKind.MULTIPLE_CHOICE:
        columns = {"choices": "b,c"}
    config = FinetuneConfig(train_file="rows.csv", task=kind.value, **columns)
    experiment = Experiment(finetune=config)
    for name, rule in choices.RULES.items():
        experiment = schema.with_value(experiment, name, rule(seen, experiment.finetune))
    checked = validation.validate(experiment)
    again = schema.from_dict(Experiment, schema.to_dict(checked), "here")
    assert again == checked, "a value has another type than its field"


@pytest.mark.parametrize(
    ("lengths", "kind", "context", "long"),
    [
        ([10] * 100, "classification", 64, "cut"),
        ([10] * 99 + [100], "classification", 64, "cut"),  # 1% is cut
        ([10] * 95 + [100] * 5, "classification", 128, "cut"),
        ([10] * 91 + [200] * 9, "classification", 256, "cut"),
        ([10] * 90 + [200] * 10, "classification", 128, "windows"),
        ([200] * 100, "similarity", 256, "cut"),  # pairs are not read in windows
        ([3000] * 100, "multiple_choice", 512, "cut"),
    ],
)
def test_the_context_fits_the_lengths(lengths, kind, context, long):
    seen = facts(lengths, kind)
    assert choices.RULES["model.context_length"](seen, FinetuneConfig()) == context
    assert choices.RULES["finetune.long"](seen, FinetuneConfig()) == long


def test_a_flattened_head_reads_no_windows():
    seen = facts([500] * 10, flattened=True)
    assert choices.RULES["finetune.long"](seen, FinetuneConfig()) == "cut"
    assert choices.RULES["model.context_length"](seen, FinetuneConfig()) == 512


@pytest.mark.parametrize(("context", "long"), [(128, "windows"), (256, "cut")])
def test_a_context_that_was_set_decides_what_is_long(context, long):
    seen = facts([10] * 80 + [200] * 20, context_length=context)
    assert choices.RULES["finetune.long"](seen, FinetuneConfig()) == long


def test_later_rules_see_what_the_user_has_set():
    rate, epochs = (choices.RULES[f"finetune.{n}"] for n in ("optimizer.learning_rate", "epochs"))
    seen = facts([10] * 100)
    rates = [rate(seen, FinetuneConfig(batch_size=size)) for size in (8, 32, 128)]
    assert rates == pytest.approx([5e-4, 1e-3, 2e-3])
    assert [epochs(seen, FinetuneConfig(batch_size=size)) for size in (1, 2, 32)] == [6, 8, 30]
    head = choices.RULES["finetune.head"]
    assert head(seen, FinetuneConfig(long="windows")) == "mean"
    gpt1 = facts([10] * 100, pretrained=True, width=768)
    assert rate(gpt1, FinetuneConfig(batch_size=32)) == pytest.approx(6.25e-5)
    assert head(gpt1, FinetuneConfig(long="windows")) == "extract"


def experiment(choose=ALL):
    return Experiment(choose=choose, finetune=FinetuneConfig(train_file="rows.csv"))


def test_what_was_set_is_not_chosen():
    """By a flag, even to the value that the field had, or by Python."""
    names = set(schema.CHOOSABLE)
    made = experiment()
    assert set(made.not_set().split(",")) == names
    made.finetune.epochs = 9.0
    assert set(made.not_set(["finetune.long"]).split(",")) == names - {
        "finetune.epochs", "finetune.long"
    }  # fmt: skip
    checked = validation.validate(made)
    assert set(checked.choose.split(",")) == names - {"finetune.epochs"}
    assert checked.finetune.epochs == 9.0
    assert validation.validate(checked) == checked


def test_wrong_names_are_one_line():
    with pytest.raises(UserError, match=r"cannot choose 'finetune\.epoch'; did you mean"):
        validation.validate(experiment("finetune.epoch"))
    both = dataclasses.replace(
        experiment(), pretrain=schema.PretrainConfig(dataset="builtin", steps=1)
    )
    with pytest.raises(UserError, match="`choose`: is for an experiment with a finetune part"):
        validation.validate(both)


def train(path, workdir, *flags):
    tiny = ("--config.model.width=16", "--config.tokenizer.vocab_size=120")
    return runs.main(
        "--config=finetune_file", *tiny, f"--config.finetune.train_file={path}",
        "--config.finetune.baseline=none", "--config.finetune.steps=4",
        f"--workdir={workdir}", *flags,
    )  # fmt: skip


def test_a_run_prints_keeps_and_goes_on_with_its_choices(tmp_path):
    """More rows of another length do not change what a started run has chosen."""
    table = runs.rows(40, 3)
    path, workdir = runs.write(tmp_path / "rows.csv", table), tmp_path / "w"
    trained = train(path, workdir)
    assert trained.code == 0, trained.err
    before, _, after = trained.out.partition("finetune: chosen for 36 rows of at most ")
    assert before
    assert "random weights (a flag sets another value):" in after
    chosen = after.replace("\n", " ")
    config = files.read_json(str(workdir / "config.json"))
    assert config["choose"] == ""
    names = set(schema.split_names(experiments.load("finetune_file").choose))
    for name in names - {"finetune.epochs"}:  # the number of steps was set
        assert f"{name}={schema.value_at(config, name)}" in chosen
    assert gptjax.load(workdir).model.config.context_length == 64
    assert config["model"]["context_length"] == 64
    again = train(path, workdir)
    assert again.code == 0, again.err
    assert "chosen for" not in again.out
    assert files.read_json(str(workdir / "config.json")) == config
    other = train(path, workdir, "--config.model.context_length=32")
    assert other.code == 2
    assert "holds another experiment (model.context_length: 64 -> 32)" in other.err


@pytest.mark.slow
def test_a_flag_and_a_checkpoint_decide_before_the_data(tmp_path):
    path = runs.write(tmp_path / "rows.csv", runs.rows(40, 3))
    first = train(path, tmp_path / "a", "--config.model.context_length=32")
    assert first.code == 0, first.err
    assert "model.context_length=" not in first.out
    small_one = gptjax.load(tmp_path / "a").model.config
    assert small_one.context_length == 32
    flags = ("--config.model.context_length=32", f"--config.init_from={tmp_path}/a")
    tiny = ("--config.finetune.steps=2", "--config.finetune.baseline=none")
    second = runs.main(
        "--config=finetune_file", f"--config.finetune.train_file={path}", *tiny, *flags[1:],
        f"--workdir={tmp_path}/b",
    )  # fmt: skip
    assert second.code == 0, second.err
    assert "and pretrained weights" in second.out
    assert gptjax.load(tmp_path / "b").model.config.context_length == 32
    assert files.read_json(f"{tmp_path}/b/config.json")["model"]["context_length"] == 128


def test_the_same_from_python(tmp_path):
    """An attribute that was set on the experiment is kept."""
    config = experiments.load("finetune_file")
    config.model.context_length = 48
    tiny = {"model.width": 16, "tokenizer.vocab_size": 120, "finetune.steps": 2}
    rows = runs.rows(30, 3)
    gpt = gptjax.finetune(
        rows, config=config, overrides={**tiny, "finetune.baseline": "none"}, progress=False
    )
    assert gpt.model.config.context_length == 48
