"""The texts of `--help`."""

import dataclasses
import inspect
import re
import shlex
import sys

import pytest
import runs

from gptjax.cli import usage
from gptjax.cli.flags import FLAGS, MODES
from gptjax.config import experiments, recipes, schema


@pytest.fixture(autouse=True)
def as_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/venv/bin/gptjax"])
    monkeypatch.setenv("COLUMNS", "80")


def commands(text: str) -> list[list[str]]:
    """The commands that a text shows, as a shell splits them."""
    found = re.findall(r"^ *(gptjax [a-z]+ --(?:.*\\\n)*.*)", text, re.MULTILINE)
    return [shlex.split(command.replace("\\\n", "")) for command in found]


@pytest.mark.parametrize(("columns", "width"), [(80, 80), (100, 100), (200, 100), (20, 60)])
def test_lines_fit_the_terminal(monkeypatch, columns, width):
    monkeypatch.setenv("COLUMNS", str(columns))
    texts = [usage.overview(), *(usage.of_mode(mode, "quickstart") for mode in MODES)]
    long = {line for text in texts for line in text.splitlines() if len(line) > width}
    assert not long
    assert max(len(line) for text in texts for line in text.splitlines()) > width - 15


def test_the_overview_has_every_mode_with_an_example_that_runs():
    text = usage.overview()
    plain = " ".join(text.split())
    shown = {command[1]: command for command in commands(text)}
    for name, mode in MODES.items():
        assert f"{name} {mode.summary}" in plain
        assert shown.pop(name) == ["gptjax", name, *shlex.split(mode.example)]
    assert not shown
    assert text.index("--config=") < text.index("--workdir=") < text.index("--helpfull")


@pytest.mark.parametrize("name", MODES)
def test_a_mode_has_its_flags_with_their_defaults_and_no_others(name):
    text = usage.of_mode(name, "quickstart")
    flags_text = text.partition("Flags:\n")[2].partition("Fields of the experiment")[0]
    shown = set(re.findall(r"^  --([\w.]+)", flags_text, re.MULTILINE))
    common = {"config", "config.FIELD"} if MODES[name].parts else set()
    assert shown == MODES[name].names | common
    for flag in MODES[name].names & set(FLAGS):
        (row,) = re.findall(rf"^  --{flag}\b(.*(?:\n    .*)*)", flags_text, re.MULTILINE)
        default = FLAGS[flag].default
        noted = f"(default: {default})" in " ".join(row.split())
        assert noted == (default not in (None, "", False)), row


def fields_shown(text: str) -> list[tuple[str, str]]:
    """(name with its part, value) of the fields that a help text lists, in order."""
    found, prefix = [], ""
    for line in text.partition("Fields of the experiment")[2].splitlines():
        if heading := re.match(r"(?:\S.*)?--config\.(\S*)FIELD", line):
            prefix = heading[1]
        if row := re.match(r"  (\w[\w.]*)=(.*)", line):
            found.append((prefix + row[1], row[2].partition("  ")[0].strip()))
    return found


def test_train_lists_every_field_once_and_those_of_recipes_last():
    text = usage.of_mode("train", "quickstart")
    names = [name for name, _ in fields_shown(text)]
    assert len(set(names)) == len(names)
    parts = {"model", "tokenizer", "pretrain", "finetune", "ablation", "probes", "mesh",
             "checkpoint", "pretrain.optimizer", "finetune.optimizer"}  # fmt: skip
    expected = set(schema.field_names(schema.Experiment)) - parts
    expected = {name for name in expected if not name.startswith("ablation.")}
    assert set(names) <= expected
    # The optimizers have the same fields, which are listed together.
    missing = {name for name in expected - set(names) if ".optimizer." not in name}
    assert missing == set()
    last = names[-len(usage.RECIPE_FIELDS) :]
    assert {name.replace("finetune.opt", "opt") for name in last} == usage.RECIPE_FIELDS


def test_the_fields_of_recipes_are_set_by_recipes():
    changed = set()
    for values in recipes.RECIPES.values():
        for part, fields in values.items():
            changed |= {f"{part}.{name}" for name in fields}
            changed |= {f"optimizer.{name}" for name in fields.get("optimizer", {})}
    assert changed >= usage.RECIPE_FIELDS


def test_fields_have_the_values_of_the_experiment():
    values = dict(fields_shown(usage.of_mode("bench", "larger:1b3")))
    assert values["model.width"] == "2048"
    assert values["pretrain.batch_size"] == "512"
    assert values["mesh.fsdp"] == "8"
    default = schema.FinetuneConfig().epochs
    assert values["finetune.epochs"] == str(default)
    text = usage.of_mode("bench", "larger:1b3")
    assert "(The experiment has no such part. --config.finetune=build" in text
    assert "--config.pretrain=build" not in text


@pytest.mark.parametrize("config", [schema.FinetuneConfig, schema.OptimizerConfig])
def test_every_field_with_a_docstring_shows_it(config):
    plain = " ".join(usage.of_mode("train", "quickstart").split())
    source = inspect.getsource(config)
    texts = re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', source, re.MULTILINE | re.DOTALL)
    assert len(texts) > 5
    for name, text in texts:
        text = " ".join(text.replace("`", "").split())
        assert re.search(rf"\b{name}=.{{0,40}} {re.escape(text)}", plain), name


def test_train_lists_the_experiments():
    text = " ".join(usage.of_mode("train", "quickstart").split())
    for name in experiments.names():
        assert experiments.summary(name).endswith((".", "?"))
        assert f"{name} {experiments.summary(name)}" in text


def test_help_of_an_experiment_that_is_not_there_is_one_line():
    assert "no such file or experiment" in runs.main("train", "--config=zzz", "--help").error


def test_parts_are_parts_of_the_experiment():
    names = set(schema.field_names(schema.Experiment)) | {""}
    for part in usage.PARTS.values():
        for path in part.paths:
            assert path in names or path == "probes.NAME"
        assert dataclasses.is_dataclass(part.config)
