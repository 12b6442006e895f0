"""The experiments that come with gptjax load and are valid; their docstrings' commands parse."""

import ast
import dataclasses
import json
import pathlib
import re
import shlex

import jax
import pytest
import runs

from gptjax.cli import flags
from gptjax.cli.flags import Command
from gptjax.config import experiments, schema, validation
from gptjax.errors import UserError
from gptjax.model import gpt

FOLDER = pathlib.Path(runs.LAUNCH).parent / "experiments"
# The flags that a user must add.
NEEDED = {
    "finetune_file": ["--config.finetune.train_file=rows.csv"],
    "pretrain_file": ["--config.pretrain.train_files=a.txt"],
    "gpt1_pretrain": ["--config.pretrain.train_files=a.txt"],
    "larger": ["--config.pretrain.train_files=a.txt"],
    "ablation": [
        "--config.ablation.only=rte",
        "--config.ablation.tasks.rte.train_file=rte.tsv",
        "--config.pretrain.train_files=a.txt",
    ],
    "probes": ["--config.pretrain.train_files=a.txt"],
    "tutorial": ["--config.finetune.train_file=rows.tsv"],
    "gpt1_finetune": ["--config.init_from=runs/x", "--config.finetune.train_file=rows.tsv"],
}


NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


def parse(*arguments: str) -> Command:
    command = flags.parse(["launch.py", *arguments])
    assert isinstance(command, Command)
    return command


def test_the_folder_s_experiments_are_found_by_their_names():
    assert experiments.names() == NAMES
    for name in NAMES:
        assert experiments.find(name).samefile(FOLDER / f"{name}.py")


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_loads_and_validates(name):
    path = FOLDER / f"{name}.py"
    command = parse(f"--config={path}", *NEEDED.get(name, []))
    assert parse(f"--config={name}", *NEEDED.get(name, [])) == command
    run = {"gpt1_task": "gpt1_sst2", "larger": "gpt_350m"}.get(name, name)
    assert (command.experiment.name, command.workdir) == (run, f"runs/{run}")
    experiment = validation.validate(command.experiment)
    values = json.loads(json.dumps(schema.to_dict(experiment)))
    assert schema.from_dict(schema.Experiment, values, "here") == experiment


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_what_an_experiment_needs_is_named(name):
    with pytest.raises(UserError) as info:
        validation.validate(parse(f"--config={name}").experiment)
    fields = [flag.partition("=")[0].removeprefix("--config.") for flag in NEEDED[name]]
    assert any(f"`{field}`" in str(info.value) for field in fields), info.value


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_a_docstring_are_understood(name):
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    # In the source they are broken by backslashes, which Python takes out of the string.
    commands = re.findall(r"^    (python launch\.py.*)", text, re.MULTILINE)
    assert commands
    for command in commands:
        python, script, *arguments = shlex.split(command)
        assert (python, script) == ("python", "launch.py")
        assert parse(*arguments).experiment


def test_no_flag_is_the_quickstart():
    command = parse()
    assert (command.mode, command.experiment.name) == ("train", "quickstart")
    assert (command.workdir, command.has_config) == ("runs/quickstart", False)
    validation.validate(command.experiment)
    assert command.experiment.pretrain.dataset == "builtin"
    assert command.experiment.finetune.compare_from_scratch


def test_a_stage_is_dropped_and_a_field_is_changed_by_flags():
    command = parse("--config.finetune=none", "--config.pretrain.steps=200", "--workdir=w")
    experiment = validation.validate(command.experiment)
    assert experiment.finetune is None
    assert (experiment.pretrain.steps, command.workdir) == (200, "w")
    assert command.overrides == {"finetune": None, "pretrain.steps": 200}


def test_a_user_s_file_may_change_fields_and_the_flags_are_the_last_to_do_so(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from gptjax.config import Experiment, FinetuneConfig\n"
        "def get_config():\n"
        "    experiment = Experiment(finetune=FinetuneConfig(train_file='a.csv'))\n"
        "    experiment.model.width = 96\n"
        "    experiment.finetune.optimizer.beta1 = 0.5\n"
        "    return experiment\n"
    )
    experiment = parse(f"--config={path}", "--config.model.num_heads=3").experiment
    model, optimizer = experiment.model, experiment.finetune.optimizer
    assert (model.width, model.num_heads, optimizer.beta1) == (96, 3, 0.5)
    for part, field in ((experiment, "seed"), (model, "width"), (optimizer, "beta1")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, field, 1)


def test_the_paper_s_model_has_its_size():
    experiment = parse("--config=gpt1_pretrain", *NEEDED["gpt1_pretrain"]).experiment
    # The four special tokens.
    model = dataclasses.replace(experiment.model, vocab_size=40478 + 4)
    validation.validate(experiment)
    shapes = jax.eval_shape(lambda key: gpt.init_params(gpt.GPT(model), key),
                            jax.random.key(0))  # fmt: skip
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    width = 768
    block = 4 * width * width + 4 * width + 8 * width * width + 5 * width + 4 * width
    assert count == (40482 + 512) * width + 12 * block


@pytest.mark.parametrize(("size", "millions"), [("350m", 346.3), ("1b3", 1296.7), ("6b7", 6620.3)])
def test_the_larger_have_as_many_parameters_as_they_say(size, millions):
    """12 w^2 + 13 w of a block (its biases and gains), and the rows of tokens and positions."""
    experiment = parse(f"--config=larger:{size}", *NEEDED["larger"]).experiment
    model = experiment.model
    rows = experiment.tokenizer.vocab_size + 4 + model.context_length
    count = model.num_layers * (12 * model.width**2 + 13 * model.width) + rows * model.width
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_a_size_that_is_not_there_is_one_line():
    error = runs.main(f"--config={FOLDER / 'larger.py'}:350M").error
    assert "larger.py:350M: the size must be one of 350m, 1b3, 6b7" in error
