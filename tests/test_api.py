"""Training from Python: the same as the command line with the same rows, without its output."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import datasets
import pandas as pd
import pyarrow as pa
import pytest
import runs

import gptjax
from gptjax import api
from gptjax.config import schema
from gptjax.config.schema import Experiment
from gptjax.errors import TrainingDiverged, UserError

ROOT = pathlib.Path(gptjax.__file__).resolve().parents[1]


def fields(flags):
    """The overrides that say the same as flags of the command line."""
    found = {}
    for flag in flags:
        name, _, value = flag.removeprefix("--config.").partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


TINY = fields(runs.TINY)
FINETUNE = {
    "finetune.batch_size": 8, "finetune.steps": 8, "finetune.optimizer.learning_rate": 0.02,
    "finetune.baseline": "none",
}  # fmt: skip
PRETRAIN = {
    "pretrain.batch_size": 8, "pretrain.steps": 6, "pretrain.eval_every": 3,
    "pretrain.optimizer.warmup_fraction": 0.0, "pretrain.optimizer.warmup_steps": 2,
}  # fmt: skip


def flags(overrides):
    return [f"--config.{name}={value}" for name, value in overrides.items()]


def results(workdir):
    """Ledger, losses and scores: everything in metrics.jsonl, and the summary without times."""
    summary = runs.summary(str(workdir))
    for stage in summary.values():
        for name in ("tokens_per_second", "input_wait", "mfu"):
            stage.pop(name, None)
        stage.get("baselines", {}).get("linear", {}).pop("seconds", None)
    return runs.records(str(workdir)), summary


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """The results of the command line, with the rows in files."""
    workdir = tmp_path_factory.mktemp("finetuned") / "run"
    files = runs.files()
    result = runs.main(
        "--config=experiments/finetune_file.py", *runs.TINY, *flags(FINETUNE),
        f"--config.finetune.train_file={files.train}",
        f"--config.finetune.validation_file={files.validation}",
        f"--config.finetune.test_file={files.test}", f"--workdir={workdir}",
    )  # fmt: skip
    assert result.code == 0, result.err
    return results(workdir)


def rows_of(name):
    return pd.read_csv(getattr(runs.files(), name))


FORMS = {
    "path": lambda name: getattr(runs.files(), name),
    "pathlib": lambda name: pathlib.Path(getattr(runs.files(), name)),
    "columns": lambda name: rows_of(name).to_dict("list"),
    "rows": lambda name: rows_of(name).to_dict("records"),
    "pandas": rows_of,
    "arrow": lambda name: pa.Table.from_pandas(rows_of(name)),
    "datasets": lambda name: datasets.Dataset.from_pandas(rows_of(name)),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_any_form_give_what_the_command_line_gives(form, finetuned, tmp_path, capfd):
    table = FORMS[form]
    gpt = gptjax.finetune(
        table("train"), table("validation"), table("test"),
        workdir=tmp_path / "run", overrides=TINY | FINETUNE, progress=False,
    )  # fmt: skip
    assert results(tmp_path / "run") == finetuned
    assert gpt.summary == runs.summary(str(tmp_path / "run"))
    assert gpt.path.startswith(str(tmp_path / "run/checkpoints/finetune"))
    assert capfd.readouterr() == ("", "")


def test_a_path_and_a_table_together(finetuned, tmp_path):
    gptjax.finetune(
        FORMS["path"]("train"), rows_of("validation"), FORMS["pathlib"]("test"),
        workdir=tmp_path, overrides=TINY | FINETUNE, progress=False,
    )  # fmt: skip
    assert results(tmp_path) == finetuned


@pytest.mark.slow
def test_a_held_out_part_is_that_of_the_command_line(tmp_path):
    train = runs.files().train
    result = runs.main(
        "--config=experiments/finetune_file.py", *runs.TINY, *flags(FINETUNE),
        f"--config.finetune.train_file={train}", f"--workdir={tmp_path}/command",
    )  # fmt: skip
    assert result.code == 0, result.err
    gptjax.finetune(
        rows_of("train"), workdir=tmp_path / "python", overrides=TINY | FINETUNE, progress=False
    )
    assert results(tmp_path / "python") == results(tmp_path / "command")


@pytest.mark.slow
def test_text_in_any_form_gives_what_the_command_line_gives(tmp_path, capfd):
    text = runs.files().text
    result = runs.main(
        "--config=experiments/pretrain_file.py", *runs.TINY, *flags(PRETRAIN),
        f"--config.pretrain.train_files={text}", f"--workdir={tmp_path}/command",
    )  # fmt: skip
    assert result.code == 0, result.err
    capfd.readouterr()
    gpt = gptjax.pretrain(
        [text], workdir=tmp_path / "files", overrides=TINY | PRETRAIN, progress=False
    )
    assert results(tmp_path / "files") == results(tmp_path / "command")
    assert gpt.task is None
    # Rows are documents with a blank line between them, in a file and in a table.
    lines = pathlib.Path(text).read_text().splitlines()
    documents = runs.write(tmp_path / "text.jsonl", "".join(f'{{"text": "{x}"}}\n' for x in lines))
    for name, source in (("jsonl", documents), ("table", pd.DataFrame({"text": lines}))):
        gptjax.pretrain(source, workdir=tmp_path / name, overrides=TINY | PRETRAIN, progress=False)
    assert results(tmp_path / "jsonl") == results(tmp_path / "table")
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_model_to_start_from_and_other_columns(tmp_path):
    start = gptjax.pretrain(
        {"words": runs.sentences(60)}, text="words", overrides=TINY | PRETRAIN, progress=False
    )
    frame = rows_of("train").rename(columns={"text": "review", "label": "stars"})
    gpt = gptjax.finetune(
        frame, text="review", label="stars", metrics=["f1", "accuracy"], init_from=start,
        overrides=FINETUNE, progress=False,
    )  # fmt: skip
    assert gpt.config.width == start.config.width
    assert gpt.tokenizer.hash == start.tokenizer.hash
    assert list(gpt.summary["finetune"]["floor"]["validation"]) == ["f1", "accuracy"]
    assert gpt.predict(frame).labels[0] in ("no", "yes")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "columns"),
    [
        ("entailment", {"text_pair": "pair"}),
        ("multiple_choice", {"choices": ["pair", "label_name"]}),
    ],
)
def test_other_tasks(task, columns):
    frame = rows_of("train")
    frame = frame.assign(pair=frame.text.str.upper(), label_name=frame.label)
    frame["label"] = (frame.label == "yes").astype(int)
    gpt = gptjax.finetune(
        frame, task=task, **columns, overrides=TINY | FINETUNE | {"finetune.steps": 2},
        progress=False,
    )  # fmt: skip
    assert gpt.task.kind == task
    assert len(gpt.predict(frame).labels) == len(frame)


def test_a_second_call_with_the_workdir_only_loads(tmp_path):
    def train(**changes):
        return gptjax.finetune(
            rows_of("train"), workdir=tmp_path, overrides=TINY | FINETUNE | changes, progress=False
        )

    first = train()
    before = runs.snapshot(tmp_path / "checkpoints")
    second = train()
    assert second.summary == first.summary
    assert runs.snapshot(tmp_path / "checkpoints") == before
    with pytest.raises(UserError, match=r"^`workdir`=.*: holds another experiment \(finetune"):
        train(**{"finetune.steps": 9})
    with pytest.raises(UserError, match="was made with another training data"):
        gptjax.finetune(
            rows_of("test"), workdir=tmp_path, overrides=TINY | FINETUNE, progress=False
        )


def test_a_temporary_workdir_lives_as_long_as_the_model():
    gpt = gptjax.finetune(rows_of("train"), overrides=TINY | FINETUNE, progress=False)
    folder = pathlib.Path(gpt.path)
    assert folder.is_dir()
    del gpt
    assert not folder.exists()


INTERRUPTED = """
import gptjax, os, pathlib, signal, sys, threading, time
from gptjax.errors import Preempted

def stop():
    path = pathlib.Path("run/metrics.jsonl")
    while not path.exists() or '"step": 20' not in path.read_text():
        time.sleep(0.01)
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))

threading.Thread(target=stop, daemon=True).start()
words = ["good", "bad"] * 9
rows = {"text": [f"{word} {i}" for i, word in enumerate(words)], "label": words}
try:
    gptjax.finetune(rows, workdir="run", overrides=OVERRIDES, progress=False)
except (KeyboardInterrupt, Preempted) as error:
    print(type(error).__name__, error)
gpt = gptjax.finetune(rows, workdir="run", overrides=OVERRIDES, progress=False)
print(gpt.summary["finetune"]["steps"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "error"), [("SIGINT", "KeyboardInterrupt"), ("SIGTERM", "Preempted")]
)
def test_an_interrupted_run_is_saved_and_continues(name, error, tmp_path):
    # One validation, at the end: each one saves, which takes longer than its steps.
    few = {"finetune.steps": 300, "finetune.batch_size": 4, "finetune.evals_per_epoch": 0.001}
    overrides = TINY | few
    code = INTERRUPTED.replace("OVERRIDES", repr(overrides))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, name]
    done = runs.finish(runs.spawn(command, cwd=tmp_path, env=environment))
    assert done.code == 0, done.err
    stopped, steps = done.out.splitlines()
    assert re.fullmatch(
        rf"{error} finetune: asked to stop; saved at step [\d,]+ of 300; "
        "the same call with workdir=run continues there",
        stopped,
    )
    assert steps == "300"
    ledgers = [
        record["step"] for record in runs.records(str(tmp_path / "run")) if "ledger" in record
    ]
    assert ledgers == sorted(set(ledgers)), "a step was trained twice"


def test_a_call_in_another_thread_leaves_the_signals_alone():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    found = []

    def call():
        overrides = TINY | FINETUNE | {"finetune.steps": 2}
        found.append(gptjax.finetune(rows_of("train"), overrides=overrides, progress=False))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert len(found[0].predict({"text": ["a cat"]}).labels) == 1


def test_a_diverged_run_keeps_its_temporary_workdir():
    overrides = TINY | FINETUNE | {"finetune.optimizer.max_bad_steps": 1, "model.init_std": 1e30}
    with pytest.raises(TrainingDiverged, match=r"checkpoints are kept in /"):
        gptjax.finetune(rows_of("train"), overrides=overrides, progress=False)


def test_progress_is_shown_as_lines_where_no_one_watches(capsys):
    overrides = TINY | FINETUNE
    gptjax.finetune(rows_of("train"), overrides=overrides)
    out, err = capsys.readouterr()
    assert re.search(
        r"^finetune: [0-9]+ train examples, [0-9.]+% unknown tokens$", out, re.MULTILINE
    )
    assert "finetune 8/8 loss" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "txt"}, "`train`: no column 'txt'; did you mean 'text'?"),
        ({"train": "none.csv"}, "none.csv: no such file"),
        ({"train": []}, "`train`"),
        ({"train": 5}, "`train`: is a int; give a mapping of column names to lists"),
        ({"validation": {"text": ["a"]}}, "`validation`: no column 'label'"),
        ({"train": {"text": ["a"], "label": ["x", "y"]}}, "`train`: columns of different lengths"),
        ({"train": {"text": ["a", "b"], "label": ["x", None]}, "validation": {"text": ["a"],
          "label": ["x"]}}, "`train`: row 2, column label: the label is empty"),
        ({"task": "clasification"}, "`task`=clasification: must be one of"),
        ({"task": "entailment"}, "`text_pair`"),
        ({"metrics": "acuracy"}, "`metrics`: no metric 'acuracy'; did you mean 'accuracy'?"),
        ({"init_from": "nothing"}, "`init_from`=nothing: no checkpoint there"),
        ({"config": "finetune"}, "`config`=finetune: no such file or experiment; did you mean"),
        ({"overrides": {"finetune.epoch": 3}}, "`overrides`: no field 'finetune.epoch'; did you"),
        ({"overrides": {"finetune.epochs": "3"}}, "`finetune.epochs`='3': must be a number"),
        ({"overrides": {"model.width": 1.5}}, "`model.width`=1.5: must be an integer"),
        ({"overrides": {"model.width": 0}}, "`model.width`=0: must be greater than 0"),
        (
            {"overrides": {"pretrain.steps": 3}},
            "`overrides`: 'pretrain.steps': the experiment has no pretrain part",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_argument(arguments, message):
    train = {"text": runs.sentences(40), "label": ["no", "yes"] * 20}
    with pytest.raises(UserError) as error:
        gptjax.finetune(**{"train": train, "progress": False} | arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"files": "none.txt"}, "none.txt: no such file"),
        ({"files": {"txt": ["a"]}}, "`files`: no column 'text'; did you mean 'txt'?"),
        (
            {"files": __file__, "validation": {"text": ["a"]}},
            "`validation`: is a table, and `files` is not",
        ),
        ({"files": {"text": []}}, "`files`: has no rows"),
    ],
)
def test_errors_of_a_pretraining_name_the_argument(arguments, message):
    with pytest.raises(UserError) as error:
        gptjax.pretrain(**arguments, progress=False)
    assert str(error.value).startswith(message)


@pytest.mark.slow
def test_an_experiment_is_the_starting_point_and_is_not_changed():
    experiment = Experiment(
        seed=3, finetune=schema.FinetuneConfig(text="review", train_file="of another run.csv")
    )
    before = schema.to_dict(experiment)
    frame = rows_of("train").rename(columns={"text": "review"})
    overrides = TINY | FINETUNE | {"finetune.steps": 1}
    gpt = gptjax.finetune(frame, config=experiment, overrides=overrides, progress=False)
    assert schema.to_dict(experiment) == before
    assert (gpt.experiment.seed, gpt.experiment.finetune.text) == (3, "review")
    assert gpt.experiment.finetune.train_file == ""


def test_a_whole_part_and_then_its_field_can_be_overridden(monkeypatch):
    @dataclasses.dataclass
    class Own(schema.FinetuneConfig):
        """A user's configuration class."""

    class StartedError(Exception):
        """Carries the experiment that would be trained."""

    def run(experiment, *_):
        raise StartedError(experiment)

    monkeypatch.setattr(api.run_lib, "run", run)
    overrides = {"finetune": Own(), "finetune.epochs": 7, "finetune.validation_file": "v.csv"}
    with pytest.raises(StartedError) as caught:
        gptjax.finetune("train.csv", overrides=overrides, progress=False)
    (experiment,) = caught.value.args
    assert (experiment.finetune.epochs, experiment.finetune.validation_file) == (7, "v.csv")


def test_progress_bars_of_datasets_stay_as_the_user_had_them():
    datasets.enable_progress_bars()
    overrides = TINY | PRETRAIN | {"pretrain.steps": 1, "pretrain.optimizer.warmup_steps": 0}
    gptjax.pretrain({"text": runs.sentences(40)}, overrides=overrides, progress=False)
    assert not datasets.are_progress_bars_disabled()


def test_help_shows_the_public_names_and_import_is_light():
    code = "import gptjax, sys; assert 'jax' not in sys.modules; help(gptjax)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stderr == ""
    names = ("class GPT", "predict(self, rows", "finetune(train", "pretrain(files", "load(path")
    assert [name for name in names if name not in done.stdout] == []
