"""Training from Python: `finetune` and `pretrain`, for notebooks, scripts and services.

They do the same as mode `train` of the command line: the same configuration gives the same model.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import sys
import tempfile
import typing
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from gptjax.config import experiments, schema
from gptjax.config import validation as validation_lib
from gptjax.config.schema import Experiment, FinetuneConfig, PretrainConfig, Stage
from gptjax.data import splits
from gptjax.data.tables import files as files_lib
from gptjax.data.tables import memory
from gptjax.data.tables.memory import Table
from gptjax.errors import Preempted, TrainingDiverged, UserError, nearest, require
from gptjax.infer import predictor
from gptjax.infer.predictor import GPT
from gptjax.train import run as run_lib
from gptjax.train.progress import Reporter, TerminalReporter

Path = str | os.PathLike[str]

# Stage -> field or split -> the argument that sets it, for error messages.
_ARGUMENTS: dict[Stage, dict[str, str]] = {
    Stage.FINETUNE: {
        "finetune.train_file": "train",
        "finetune.validation_file": "validation",
        "finetune.test_file": "test",
        "finetune.task": "task",
        "finetune.text": "text",
        "finetune.text_pair": "text_pair",
        "finetune.choices": "choices",
        "finetune.label": "label",
        "finetune.metrics": "metrics",
    },
    Stage.PRETRAIN: {
        "pretrain.train_files": "files",
        "train": "files",
        "pretrain.validation_files": "validation",
        "pretrain.text": "text",
    },
}


def finetune(
    train: Path | Table,
    validation: Path | Table | None = None,
    test: Path | Table | None = None,
    *,
    task: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    choices: str | Sequence[str] | None = None,
    label: str | None = None,
    metrics: str | Sequence[str] | None = None,
    init_from: "Path | GPT | None" = None,
    workdir: Path | None = None,
    config: Experiment | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> GPT:
    """Trains a model on labelled rows, with the joint loss of the task and of language modelling.

    >>> import gptjax
    >>> rows = {
    ...     "text": [f"a {word} film {i}" for i in range(20) for word in ("good", "bad")],
    ...     "label": ["yes", "no"] * 20,
    ... }
    >>> tiny = {
    ...     "model.width": 16, "model.context_length": 32, "model.init_std": 0.2,
    ...     "model.embedding_dropout": 0.0, "tokenizer.vocab_size": 80,
    ...     "finetune.epochs": 20.0, "finetune.optimizer.learning_rate": 0.02,
    ... }
    >>> gpt = gptjax.finetune(rows, overrides=tiny, progress=False)
    >>> gpt.predict([{"text": "a good film 7"}, {"text": "a bad film 7"}]).labels
    ['yes', 'no']
    >>> sorted(gpt.summary["finetune"]["validation"])
    ['accuracy', 'lm_loss', 'loss', 'task_loss']

    Rows are read from a file (CSV, TSV, JSON lines, Parquet) or from a table in memory: a mapping
    of column names to lists, a list of mappings, a pandas DataFrame, a pyarrow Table or a
    `datasets.Dataset`. The same rows give the same model in each form.

    A run is stopped by an interrupt (Ctrl-C, or the stop button of a notebook): the current step is
    finished and saved, then `KeyboardInterrupt` is raised. SIGTERM saves too and raises
    `gptjax.errors.Preempted`. The same call with the same `workdir` continues. Signals are handled
    only if the call is made in the main thread, as Python requires.

    Args:
      train: rows with the columns of the task.
      validation: rows that choose the best checkpoint; None: a tenth of `train` is held out.
      test: rows for the final score; None: no test.
      task: classification, entailment, similarity, multiple_choice or regression.
      text: column of the text; `"a+b"` joins two columns, `"c[0]"` reads the first element of a
        column of lists.
      text_pair: column of the second text, in entailment, similarity and regression.
      choices: columns of the answers, in multiple_choice.
      label: column of the label.
      metrics: names of scores; the first one chooses the best checkpoint.
      init_from: a workdir, checkpoint or `GPT` to start from, with its tokenizer and sizes; None:
        random weights.
      workdir: the folder of the run, as of the command line: checkpoints, metrics.jsonl,
        summary.json. A run that was interrupted there continues, and one that is complete is only
        loaded. None: a temporary folder, which is deleted with the returned `GPT` (copy it to keep
        the model), but kept and named by the exception if the run is stopped.
      config: the experiment to start from, or the name of one; None: "finetune_file". Only its
        fine-tuning stage is trained.
      overrides: values of other fields of the experiment by their dotted names, such as
        {"finetune.epochs": 3.0, "model.width": 256, "seed": 1}.
      progress: whether to show messages and the progress. A notebook shows a bar, a terminal too,
        and other programs get plain lines.

    Arguments that are None keep the value of the experiment.

    Returns:
      The model of the best checkpoint. Its `summary["finetune"]` holds the scores.

    Raises:
      UserError: wrong arguments, fields or rows. The message names the argument and the row.
      TrainingDiverged: several updates in a row were not finite.
      KeyboardInterrupt, Preempted: the run was stopped; its state is saved.
    """
    experiment = _experiment(config, "finetune_file")
    part = experiment.finetune or FinetuneConfig()
    part = dataclasses.replace(part, dataset="", train_file="", validation_file="", test_file="")
    experiment = dataclasses.replace(experiment, pretrain=None, finetune=part, ablation=None)
    tables = {"train": train, "validation": validation, "test": test}
    tables = {name: table for name, table in tables.items() if table is not None}
    fields = {
        "finetune.task": task,
        "finetune.text": text,
        "finetune.text_pair": text_pair,
        "finetune.choices": _comma_separated(choices),
        "finetune.label": label,
        "finetune.metrics": _comma_separated(metrics),
        "init_from": _checkpoint(init_from),
    }
    if all(_is_path(table) for table in tables.values()):
        fields |= {f"finetune.{name}_file": path for name, path in tables.items()}
        tables = {}
    experiment = _with_fields(experiment, fields, overrides)
    return _run(experiment, Stage.FINETUNE, tables, workdir, overrides or {}, progress)


def pretrain(
    files: Path | Sequence[Path] | Table,
    validation: Path | Sequence[Path] | Table | None = None,
    *,
    text: str | None = None,
    init_from: "Path | GPT | None" = None,
    workdir: Path | None = None,
    config: Experiment | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> GPT:
    """Trains a language model on text.

    >>> import gptjax
    >>> texts = {"text": [f"the cat saw {i} mice and the dog saw {i} cats" for i in range(50)]}
    >>> tiny = {
    ...     "model.width": 18, "model.context_length": 16, "tokenizer.vocab_size": 80,
    ...     "pretrain.steps": 5,
    ... }
    >>> gpt = gptjax.pretrain(texts, overrides=tiny, progress=False)
    >>> gpt.generate("the cat", max_new_tokens=5)[0].startswith("the cat")
    True

    Args:
      files: names or globs of text files, or a table in memory (see `finetune`) whose rows are
        documents.
      validation: as `files`; None: the last tenth of the text is held out.
      text: column of the text in a table.
      config: the experiment to start from, or the name of one; None: "pretrain_file". Only its
        pretraining stage is trained.
      init_from, workdir, overrides, progress: as in `finetune`.

    Returns:
      The model of the best checkpoint. Its `summary["pretrain"]` holds the scores.

    Raises:
      The exceptions of `finetune`.
    """
    experiment = _experiment(config, "pretrain_file")
    part = experiment.pretrain or PretrainConfig()
    part = dataclasses.replace(part, dataset="", train_files="", validation_files="")
    experiment = dataclasses.replace(experiment, pretrain=part, finetune=None, ablation=None)
    fields: dict[str, Any] = {"pretrain.text": text, "init_from": _checkpoint(init_from)}
    tables = {}
    for name, field, source in (
        ("train", "pretrain.train_files", files),
        ("validation", "pretrain.validation_files", validation),
    ):
        if source is None:
            continue
        if _is_path(source):
            fields[field] = source
        elif isinstance(source, Sequence) and source and all(map(_is_path, source)):
            fields[field] = ",".join(map(os.fspath, source))
        else:
            tables[name] = source
    require(
        "train" in tables or not tables,
        "`validation`: is a table, and `files` is not; give files or a table for both",
    )
    experiment = _with_fields(experiment, fields, overrides)
    return _run(experiment, Stage.PRETRAIN, tables, workdir, overrides or {}, progress)


def _is_path(value: Any) -> TypeGuard[Path]:
    return isinstance(value, str | os.PathLike)


def _checkpoint(model: "Path | GPT | None") -> Path | None:
    return model.path if isinstance(model, GPT) else model


def _comma_separated(names: str | Sequence[str] | None) -> str | None:
    return names if names is None or isinstance(names, str) else ",".join(names)


def _experiment(config: Experiment | str | None, default: str) -> Experiment:
    """Returns the experiment that `config` means; None means the one called `default`."""
    return config if isinstance(config, Experiment) else experiments.load(config or default)


def _with_fields(
    experiment: Experiment, fields: Mapping[str, Any], overrides: Mapping[str, Any] | None
) -> Experiment:
    """Returns the experiment with other values of some fields; None keeps the value.

    Args:
      experiment: is not changed.
      fields: dotted name -> value, from the arguments.
      overrides: the same, from the user; they are checked.
    """
    for name, value in fields.items():
        if value is not None:
            value = os.fspath(value) if isinstance(value, os.PathLike) else value
            experiment = _with_field(experiment, name, value)
    names = list(schema.field_names(Experiment))
    for name, value in (overrides or {}).items():
        require(name in names, f"`overrides`: no field {name!r}{nearest(name, names)}")
        experiment = _with_field(experiment, name, value)
    return experiment


def _with_field(config: Any, path: str, value: Any, whole: str = "") -> Any:
    """Returns a configuration with one field replaced.

    Args:
      config: the configuration, or a part of it.
      path: dotted name of the field below `config`.
      value: of the field.
      whole: dotted name of the field below the experiment, for messages; "" means `path`.
    """
    whole = whole or path
    name, _, rest = path.partition(".")
    if rest:
        part = getattr(config, name)
        before = whole.removesuffix(f".{rest}")
        require(part is not None, f"`overrides`: {whole!r}: the experiment has no {before} part")
        return dataclasses.replace(config, **{name: _with_field(part, rest, value, whole)})
    wanted = typing.get_type_hints(type(config))[name]
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(wanted, type) and not dataclasses.is_dataclass(wanted):
        right = isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))
        kind = {int: "an integer", float: "a number", bool: "True or False"}.get(wanted, "a string")
        require(right, f"`{whole}`={value!r}: must be {kind}")
    return dataclasses.replace(config, **{name: value})


class _TemporaryFolder:
    """A folder that is deleted with this object, or when Python ends."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="gptjax-")
        self._delete = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def keep(self) -> None:
        """Leaves the folder on the disk."""
        self._delete.detach()


class NotebookReporter(TerminalReporter):
    """Shows messages and a progress bar in a notebook."""

    def begin(self, stage: str, total_steps: int, start_step: int) -> None:
        """Opens the bar."""
        with warnings.catch_warnings():
            # Without ipywidgets, tqdm warns and falls back to a bar of text.
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm
        layout = "{desc} {n_fmt}/{total_fmt} |{bar}| {postfix}"
        self._bar = tqdm(desc=stage, total=total_steps, initial=start_step, bar_format=layout)


def _reporter(progress: bool) -> Reporter:
    if not progress:
        return Reporter()
    return NotebookReporter() if _in_notebook() else TerminalReporter()


def _in_notebook() -> bool:
    """Returns whether this is the kernel of a notebook, and not IPython in a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


def _run(
    experiment: Experiment,
    stage: Stage,
    tables: Mapping[str, Path | Table],
    workdir: Path | None,
    given: Mapping[str, Any],
    progress: bool,
) -> GPT:
    """Trains the one stage of an experiment and returns its best model.

    Args:
      experiment: what to train.
      stage: the stage.
      tables: split -> rows; empty if the experiment names files.
      workdir: the folder of the run; None: a temporary one.
      given: the fields that the user set.
      progress: whether to show it.
    """
    folder = _TemporaryFolder() if workdir is None else None
    place = folder.path if folder else os.fspath(typing.cast(Path, workdir))
    try:
        with _arguments_named(stage), _progress_bars_of_datasets_kept():
            rows: dict[str, Any] = {stage: _datasets(experiment, stage, tables)} if tables else {}
            options = run_lib.Options(given=given, tables=rows, reporter=_reporter(progress))
            run_lib.run(experiment, place, options)
            checkpoints = os.path.join(place, "checkpoints", stage)
            gpt = predictor.load(checkpoints, mesh_config=experiment.mesh, argument="workdir")
    except (Preempted, TrainingDiverged) as error:
        if folder:
            folder.keep()
        raise _stopped(error, place) from None
    return dataclasses.replace(gpt, folder=folder)


def _datasets(
    experiment: Experiment, stage: Stage, tables: Mapping[str, Path | Table]
) -> dict[str, Any]:
    """Returns split -> the columns of its table that the stage reads, as a `datasets.Dataset`."""
    experiment = validation_lib.validate(experiment, [stage])
    if experiment.finetune:
        spec = splits.task_spec(experiment.finetune)
        needed, names = [*spec.text_columns, spec.label], experiment.finetune.columns
    else:
        assert experiment.pretrain is not None
        needed, names = [experiment.pretrain.text], ""
    found = {}
    for split, table in tables.items():
        if _is_path(table):
            table = files_lib.read_table(os.fspath(table), schema.split_names(names))
        found[split] = memory.dataset(table, f"`{split}`", needed)
    return found


def _stopped(error: Preempted | TrainingDiverged, workdir: str) -> BaseException:
    """Returns the exception of a stopped run, with a message for Python."""
    message = str(error).replace("the same command", f"the same call with {workdir=!s}")
    if isinstance(error, Preempted) and error.interrupted:
        return KeyboardInterrupt(message)
    return type(error)(message)


@contextlib.contextmanager
def _arguments_named(stage: Stage) -> Iterator[None]:
    """Turns the names of fields and splits in error messages into the names of arguments."""
    names = _ARGUMENTS[stage]
    try:
        yield
    except UserError as error:
        text = re.sub(r"`([\w.]+)`", lambda match: f"`{names.get(match[1], match[1])}`", str(error))
        raise UserError(text) from error


@contextlib.contextmanager
def _progress_bars_of_datasets_kept() -> Iterator[None]:
    """Restores the progress bars of `datasets`, which reading data switches off."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
