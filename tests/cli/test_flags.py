"""Command lines: the mode, the experiment, the flags of each mode."""

import os
import shlex
import subprocess
import sys

import pytest
import runs

from gptjax.cli import flags, modes
from gptjax.cli.flags import COMMON, FLAGS, MODES, Command, HelpRequest
from gptjax.errors import UserError


def parse(*arguments: str) -> Command:
    command = flags.parse(["gptjax", *arguments])
    assert isinstance(command, Command)
    return command


ROOT = os.path.dirname(runs.LAUNCH)


# The mode


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "--checkpoint=w"],
        ["--checkpoint=w", "--mode=predict"],
        ["--mode", "predict", "--checkpoint", "w"],
        ["-mode=predict", "-checkpoint=w"],
        ["predict", "--mode=predict", "--checkpoint=w"],
        ["--mode=predict", "--mode=predict", "--checkpoint=w"],
    ],
)
def test_the_mode_is_the_first_word_or_a_flag(arguments):
    assert parse(*arguments).mode == "predict"
    assert flags.CHECKPOINT.value == "w"


def test_train_is_the_default():
    assert parse().mode == parse("--workdir=w").mode == "train"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "--mode=evaluate"], "--mode=evaluate: there is another mode, predict"),
        (["--mode=train", "--mode=bench"], "--mode=bench: there is another mode, train"),
        (["perdict"], "perdict: no such mode; did you mean 'predict'?"),
        (["--mode=perdict"], "--mode=perdict: no such mode; did you mean 'predict'?"),
        (["train.csv"], "train.csv: no such mode"),
        (["zzz"], "zzz: no such mode; the modes are train, evaluate, predict, generate"),
        (["--workdir=w", "predict"], "predict: unexpected argument; the mode comes first"),
        (["predict", "more"], "more: unexpected argument"),
    ],
)
def test_a_wrong_mode_is_one_line(arguments, message):
    assert runs.main(*arguments).error.startswith(f"error: {message}")


# The table


def test_every_mode_of_the_table_can_run_and_every_flag_is_in_the_table():
    found = {name.removeprefix("run_") for name in vars(modes) if name.startswith("run_")}
    assert found == MODES.keys()
    defined = {
        flag.name for flag in FLAGS.flags_by_module_dict()["gptjax.cli.flags"]
    } - {"mode", "config"}  # fmt: skip
    listed = frozenset[str]().union(*(mode.names for mode in MODES.values()))
    assert defined == {name for name in listed if not name.startswith("config.")}


@pytest.mark.parametrize("name", MODES)
def test_the_example_of_a_mode_is_understood_and_uses_its_flags(name):
    arguments = shlex.split(MODES[name].example)
    assert parse(name, *arguments).mode == name
    for argument in arguments:
        flag = argument.removeprefix("--").partition("=")[0]
        assert flag in MODES[name].names | {"config"} or flag.startswith("config.")


def test_placeholders_tell_switches_from_flags_with_a_value():
    for mode in MODES.values():
        for flag in mode.flags:
            name, equals, _ = flag.partition("=")
            if name in FLAGS:
                assert FLAGS[name].boolean == (not equals), flag
    assert all("=" in flag for flag in COMMON)


# The experiment


def test_the_experiment_is_a_name_or_a_path(tmp_path, monkeypatch):
    own = runs.write(
        tmp_path / "mine.py",
        "from gptjax.config import Experiment\n"
        "def get_config(name='alone'): return Experiment(name=name)\n",
    )
    assert parse("--config=shakespeare_char").experiment.name == "shakespeare_char"
    assert parse("--config", "larger:1b3").experiment.name == "gpt_1b3"
    assert parse("--config=gpt1_task:rte,original").experiment.model.one_matrix
    assert parse(f"--config={own}").experiment.name == "alone"
    assert parse(f"--config={own}:a:b").experiment.name == "a:b"
    monkeypatch.chdir(tmp_path)
    assert parse("--config=mine.py").experiment.name == "alone"
    # A file of the user comes before an experiment of that name.
    (tmp_path / "larger").write_bytes((tmp_path / "mine.py").read_bytes())
    assert parse("--config=larger").experiment.name == "alone"


def test_an_installed_package_has_the_experiments_inside(tmp_path, monkeypatch):
    """They are found from any folder; a folder `experiments` beside the package is not used."""
    package = tmp_path / "site-packages" / "gptjax"
    (package / "experiments").mkdir(parents=True)
    (tmp_path / "site-packages" / "experiments").mkdir()
    code = "from gptjax.config import Experiment\ndef get_config(): return Experiment(name='in')\n"
    for name in ("quickstart", "other"):
        runs.write(package / "experiments" / f"{name}.py", code)
    with monkeypatch.context() as patch:
        patch.setattr("gptjax.__file__", str(package / "__init__.py"))
        patch.chdir(tmp_path)
        assert parse().experiment.name == parse("--config=other").experiment.name == "in"
        with pytest.raises(UserError, match=r"the experiments are other, quickstart$"):
            parse("--config=zzz")


WRONG_FILES = {
    "no function": ("x = 1\n", "AttributeError: module .* has no attribute 'get_config'"),
    "an error": ("def get_config():\n  x = {}\n  return x['a']\n", "line 3: KeyError: 'a'"),
    "an import": ("import nowhere\n", "line 1: ModuleNotFoundError"),
    "not Python": ("def get_config(:\n", "SyntaxError: .*line 1"),
    "no experiment": ("def get_config(): return {}\n", "must return a .*Experiment, not dict"),
    "an argument": ("def get_config(): pass\n", "TypeError"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_wrong_experiment_file_is_one_line(tmp_path, case):
    text, message = WRONG_FILES[case]
    config = runs.write(tmp_path / "mine.py", text) + (":x" if case == "an argument" else "")
    with pytest.raises(UserError, match=message) as info:
        parse(f"--config={config}")
    assert str(info.value).startswith(f"`config`={config}: ")


# Fields


def test_fields_are_changed_wherever_the_experiment_is_named():
    for order in (("--config=quickstart", "--config.seed=3"), ("--config.seed=3",)):
        command = parse(*order, "--config.pretrain.steps", "7", "--config.mesh.data", "-1")
        assert command.overrides == {"seed": 3, "pretrain.steps": 7, "mesh.data": -1}
        assert (command.experiment.seed, command.experiment.pretrain.steps) == (3, 7)
    assert parse().experiment.seed == 0, "a command line changes nothing for the next one"


def test_a_missing_part_can_be_built():
    command = parse(
        "--config=finetune_file", "--config.pretrain=build", "--config.pretrain.steps=3"
    )
    assert command.experiment.pretrain.steps == 3


WRONG_FIELDS = {
    "unknown": (["--config.pretrain.stepz=3"], "no such field; did you mean 'pretrain.steps'?"),
    "entry of a new part": (
        ["--config.ablation=build", "--config.ablation.tasks.x.epochs=2"],
        "--config.ablation.tasks.x.epochs: the experiment has no entry 'x'; its entries are none",
    ),
    "part that a flag removes": (
        ["--config.finetune=none", "--config.finetune.epochs=2"],
        "--config.finetune.epochs: the experiment has no finetune part",
    ),
    "after --": (
        ["--config.name=x", "--", "--config.nam=2"], "--config.nam=2: unexpected argument",
    ),
    "no part": (
        ["--config=finetune_file", "--config.pretrain.steps=3"],
        "the experiment has no pretrain part; --config.pretrain=build before it",
    ),
    "dropped": (
        ["--config.pretrain.steps=3", "--config.pretrain=none"], "config.pretrain is provided after"
    ),
    "no entry": (
        ["--config=probes", "--config.probes.colla.limit=3"],
        "the experiment has no entry 'colla'; did you mean 'cola'?",
    ),
    "no entries": (["--config.probes.cola.limit=3"], "its entries are none"),
    "after the field": (["--config.seed=3", "--config=probes"], "before a value for --config"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_FIELDS)
def test_a_wrong_field_is_one_line(case):
    arguments, message = WRONG_FIELDS[case]
    assert message in runs.main(*arguments).error


def test_a_file_of_flags(tmp_path):
    path = runs.write(tmp_path / "flags", "--config=probes\n--config.seed=3\n--workdir=w\n")
    command = parse("train", f"--flagfile={path}", "--config.pretrain.steps=5")
    assert (command.experiment.name, command.experiment.seed) == ("probes", 3)
    assert (command.experiment.pretrain.steps, command.workdir) == (5, "w")
    assert "nowhere" in runs.main("--flagfile=nowhere").error


# Help


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], HelpRequest("help", "", "quickstart")),
        (["-h", "--mode=bench"], HelpRequest("h", "bench", "quickstart")),
        (["predict", "-?"], HelpRequest("?", "predict", "quickstart")),
        (["--config", "larger", "--helpshort"], HelpRequest("helpshort", "", "larger")),
        (["train", "--helpfull"], HelpRequest("helpfull", "train", "quickstart")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_comes_before_everything_but_a_wrong_mode(arguments, expected):
    assert flags.parse(["gptjax", *arguments]) == expected
    assert flags.parse(["gptjax", *arguments, "--wrokdir=x", "--config.x=y"]) == expected
    with pytest.raises(UserError, match="no such mode"):
        flags.parse(["gptjax", "perdict", "--help"])


def test_a_value_is_not_a_request_for_help():
    parse("generate", "--prompt=--help")
    assert flags.PROMPT.value == "--help"


@pytest.mark.parametrize("start", [[runs.LAUNCH], ["-m", "gptjax"]])
def test_both_programs_are_one(start, tmp_path):
    """The command `gptjax` is the same function; .ci/run starts it."""
    arguments = ["--config=finetune_file", "--config.finetune.train_file=none.csv"]
    process = runs.spawn([sys.executable, *start, *arguments], cwd=ROOT)
    result = runs.finish(process)
    assert result.code == 2
    assert "none.csv: no such file" in result.err
    command = [sys.executable, *start, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    name = "python -m gptjax" if start[0] == "-m" else f"python {runs.LAUNCH}"
    assert f"{name} [MODE]" in " ".join(done.stdout.split())
