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
from typing import Any, NamedTuple, TypeGuard

from gptjax.config import experiments, schema
from gptjax.config import validation as validation_lib
from gptjax.config.schema import Experiment, Stage
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

_FIELDS = ("task", "text", "text_pair", "choices", "label", "metrics")
"""The fields of a fine-tuning that are arguments too."""
# Stage -> field or split -> the argument that sets it, for error messages.
_ARGUMENTS: dict[Stage, dict[str, str]] = {
    Stage.FINETUNE: {
        **{f"finetune.{name}": name for name in _FIELDS},
        **{f"finetune.{split}_file": split for split in ("train", "validation", "test")},
    },
    Stage.PRETRAIN: {
        "pretrain.train_files": "files",
        "train": "files",
        "pretrain.validation_files": "validation",
        "pretrain.text": "text",
    },
}
_KINDS = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}


class _Call(NamedTuple):
    """The arguments that `finetune` and `pretrain` share."""

    init_from: "Path | GPT | None"
    workdir: Path | None
    config: Experiment | str | None
    overrides: Mapping[str, Any]
    progress: bool


def finetune(  # noqa: PLR0913 (keywords)
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
    ...     "finetune.epochs": 10.0, "finetune.optimizer.learning_rate": 0.03,
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
    tables = {"train": train, "validation": validation, "test": test}
    tables = {split: table for split, table in tables.items() if table is not None}
    values = (task, text, text_pair, _joined(choices), label, _joined(metrics))
    fields: dict[str, Any] = dict(zip(_FIELDS, values, strict=True))
    fields |= dict.fromkeys(("dataset", "train_file", "validation_file", "test_file"), "")
    if all(_is_path(table) for table in tables.values()):
        fields |= {f"{split}_file": path for split, path in tables.items()}
        tables = {}
    call = _Call(init_from, workdir, config, overrides or {}, progress)
    return _train(Stage.FINETUNE, fields, tables, call)


def pretrain(  # noqa: PLR0913 (keywords)
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
    fields: dict[str, Any] = dict.fromkeys(("dataset", "train_files", "validation_files"), "")
    fields["text"] = text
    tables = {}
    for split, source in (("train", files), ("validation", validation)):
        is_list = isinstance(source, Sequence) and source and all(map(_is_path, source))
        if is_list or _is_path(source):
            fields[f"{split}_files"] = _joined(source)
        elif source is not None:
            tables[split] = source
    require(
        "train" in tables or not tables,
        "`validation`: is a table, and `files` is not; give files or a table for both",
    )
    call = _Call(init_from, workdir, config, overrides or {}, progress)
    return _train(Stage.PRETRAIN, fields, tables, call)


def _is_path(value: Any) -> TypeGuard[Path]:
    return isinstance(value, str | os.PathLike)


def _joined(names: Any) -> Any:
    """Returns a list of names as one text with commas; other values are not changed."""
    return names if names is None or _is_path(names) else ",".join(map(os.fspath, names))


def _experiment(stage: Stage, fields: Mapping[str, Any], call: _Call) -> Experiment:
    """Returns the experiment of a call, which has no other stage.

    Args:
      stage: the stage.
      fields: name -> value of fields of the stage; None keeps the value of the experiment.
      call: the other arguments.
    """
    config = call.config
    if not isinstance(config, Experiment):
        config = experiments.load(config or f"{stage}_file")
    parts: dict[str, Any] = dict.fromkeys(("pretrain", "finetune", "ablation"))
    parts[stage] = getattr(config, stage) or schema.part_class(Experiment.__annotations__[stage])()
    experiment = dataclasses.replace(config, **parts)
    start = call.init_from.path if isinstance(call.init_from, GPT) else call.init_from
    given = {"init_from": start, **{f"{stage}.{name}": fields[name] for name in fields}}
    given = {name: value for name, value in given.items() if value is not None}
    names = list(schema.field_names(Experiment))
    for name, value in {**given, **call.overrides}.items():
        require(name in names, f"`overrides`: no field {name!r}{nearest(name, names)}")
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
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
    wanted = type(config).__annotations__[name]
    if rest:
        part, before = getattr(config, name), whole.removesuffix(f".{rest}")
        require(part is not None, f"`overrides`: {whole!r}: the experiment has no {before} part")
        value = _with_field(part, rest, value, whole)
    elif wanted in _KINDS:
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        right = isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))
        require(right, f"`{whole}`={value!r}: must be {_KINDS[wanted]}")
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
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    # IPython in a terminal has a shell of another kind.
    in_notebook = shell is not None and "IPKernelApp" in shell.config
    return NotebookReporter() if in_notebook else TerminalReporter()


def _train(
    stage: Stage, fields: Mapping[str, Any], tables: Mapping[str, Path | Table], call: _Call
) -> GPT:
    """Trains one stage and returns its best model.

    Args:
      stage: the stage.
      fields: as in `_experiment`.
      tables: split -> rows; empty if the fields name files.
      call: the other arguments.
    """
    import datasets

    experiment = _experiment(stage, fields, call)
    folder = _TemporaryFolder() if call.workdir is None else None
    place = folder.path if folder else os.fspath(typing.cast(Path, call.workdir))
    reporter = _reporter(call.progress)
    try:
        with _arguments_named(stage), contextlib.ExitStack() as end:
            if datasets.is_progress_bar_enabled():  # reading data switches it off
                end.callback(datasets.enable_progress_bars)
            rows: dict[str, Any] = {stage: _datasets(experiment, stage, tables)} if tables else {}
            options = run_lib.Options(given=call.overrides, tables=rows, reporter=reporter)
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
