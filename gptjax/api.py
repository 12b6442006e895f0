"""Training from Python: `finetune` and `pretrain`, for notebooks, scripts and services.

The functions do the same as the mode `train` of the command line, so the same configuration gives
the same model. The experiment is the configuration of a run. A stage is `pretrain` or `finetune`.
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
from gptjax.explain import model as model_lib
from gptjax.explain.model import GPT
from gptjax.infer import predictor
from gptjax.train import run as run_lib
from gptjax.train.progress import Reporter, TerminalReporter

Path = str | os.PathLike[str]

_FIELDS = ("task", "text", "text_pair", "choices", "label", "metrics")
"""The fields of `FinetuneConfig` that are arguments of `finetune` too."""
# Stage -> name of a field or split -> name of the argument that sets it, for error messages.
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
    ['accuracy', 'calibrated_task_loss', 'lm_loss', 'loss', 'task_loss']

    Rows are read from a file (CSV, TSV, JSON lines, Parquet) or from a table in memory: a mapping
    of column names to lists, a list of mappings, a pandas DataFrame, a pyarrow Table or a
    `datasets.Dataset`. The same rows give the same model in each form.

    An interrupt (Ctrl-C, or the stop button of a notebook) stops a run. The current step is
    finished and the state is saved, and then `KeyboardInterrupt` is raised. After SIGTERM the state
    is saved too, and `gptjax.errors.Preempted` is raised. The same call with the same `workdir`
    continues the run. Signals are handled only if the call is made in the main thread, because
    Python requires this.

    Args:
      train: the training rows, with the columns of the task.
      validation: the rows whose score chooses the best checkpoint. None means that a part of
        `train` is held out, a tenth by default.
      test: the rows for the final score. None means no test.
      task: classification, entailment, similarity, multiple_choice or regression.
      text: the column of the text. `"a+b"` joins two columns, and `"c[0]"` reads the first element
        of a column of lists.
      text_pair: the column of the second text, in entailment, similarity and regression.
      choices: the columns of the answers, in multiple_choice.
      label: the column of the label.
      metrics: names of metrics. The first metric chooses the best checkpoint.
      init_from: a workdir, a checkpoint, a `GPT`, or a model of the Hugging Face hub: "gpt1" or
        "hf://OWNER/NAME@REVISION". The run starts from its weights, tokenizer and sizes. None means
        the `init_from` of the experiment, which is empty by default, that is, random weights.
      workdir: the folder for checkpoints, metrics.jsonl and summary.json, as on the command line.
        If the folder holds an interrupted run, the run continues. If the run is complete, the model
        is only loaded. None means a temporary folder. It is deleted together with the returned
        `GPT`, so copy it to keep the model. If the run is stopped, the folder is not deleted, and
        the message of the exception names it.
      config: an experiment or the name of an experiment, whose values are the defaults. None means
        "finetune_file". Only the fine-tuning stage of the experiment is trained.
      overrides: dotted name -> value, for other fields of the experiment, such as
        {"finetune.epochs": 3.0, "model.width": 256, "seed": 1}.
      progress: whether to show messages and the progress. A notebook and a terminal show a progress
        bar. Other programs get plain lines.

    If an argument is None, the value of the experiment is used.

    Returns:
      The model of the best checkpoint. Its `summary["finetune"]` holds the scores.

    Raises:
      UserError: an argument, a field or a row is wrong. The message names it.
      TrainingDiverged: several updates in a row were not finite.
      KeyboardInterrupt, Preempted: the run was stopped, and its state is saved.
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
      validation: files or a table in the same form. None means that the end of the training text is
        held out, a tenth by default.
      text: the column of the text in a table.
      config: an experiment or the name of an experiment, whose values are the defaults. None means
        "pretrain_file". Only the pretraining stage of the experiment is trained.
      init_from, workdir, overrides, progress: the same as in `finetune`.

    Returns:
      The model of the best checkpoint. Its `summary["pretrain"]` holds the scores.

    Raises:
      UserError, TrainingDiverged, KeyboardInterrupt, Preempted: the same as in `finetune`.
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
    """Returns a list of names as one text with commas. None and a single name are not changed."""
    return names if names is None or _is_path(names) else ",".join(map(os.fspath, names))


def _experiment(stage: Stage, fields: Mapping[str, Any], call: _Call) -> Experiment:
    """Returns the experiment of a call, with a single stage.

    Args:
      stage: the stage to train.
      fields: name of a field of the stage -> value. None keeps the value of the experiment.
      call: the other arguments.
    """
    config = call.config
    if not isinstance(config, Experiment):
        config = experiments.load(config or f"{stage}_file")
    parts: dict[str, Any] = dict.fromkeys(("pretrain", "finetune", "ablation"))
    parts[stage] = getattr(config, stage) or schema.part_class(Experiment.__annotations__[stage])()
    choose = config.not_set(call.overrides) if stage == Stage.FINETUNE else ""
    experiment = dataclasses.replace(config, choose=choose, **parts)
    start = call.init_from.path if isinstance(call.init_from, GPT) else call.init_from
    given = {"init_from": start, **{f"{stage}.{name}": fields[name] for name in fields}}
    given = {name: value for name, value in given.items() if value is not None}
    names = list(schema.field_names(Experiment))
    for name, value in [*given.items(), *call.overrides.items()]:
        require(name in names, f"`overrides`: no field {name!r}{nearest(name, names)}")
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        experiment = _with_field(experiment, name, value)
    return experiment


def _with_field(experiment: Experiment, path: str, value: Any) -> Experiment:
    """Returns an experiment with another value of a field, after a check of its type.

    Args:
      experiment: the configuration.
      path: the dotted name of the field.
      value: the new value of the field.
    """
    *parents, name = path.split(".")
    part: Any = experiment
    for i, parent in enumerate(parents, start=1):
        part = getattr(part, parent)
        before = ".".join(parents[:i])
        require(part is not None, f"`overrides`: {path!r}: the experiment has no {before} part")
    wanted = typing.get_type_hints(type(part))[name]
    if wanted in _KINDS:
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        right = isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))
        require(right, f"`{path}`={value!r}: must be {_KINDS[wanted]}")
    return schema.with_value(experiment, path, value)


class _TemporaryFolder:
    """A folder that is deleted together with this object, or when Python ends."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="gptjax-")
        self._delete = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def keep(self) -> None:
        """Prevents the deletion of the folder."""
        self._delete.detach()


class NotebookReporter(TerminalReporter):
    """Shows messages and a progress bar in a notebook."""

    def begin(self, stage: str, total_steps: int, start_step: int) -> None:
        """Opens the progress bar of a stage."""
        with warnings.catch_warnings():
            # If ipywidgets is not installed, tqdm warns and shows a bar of text instead.
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm
        layout = "{desc} {n_fmt}/{total_fmt} |{bar}| {postfix}"
        self._bar = tqdm(desc=stage, total=total_steps, initial=start_step, bar_format=layout)


def _reporter(progress: bool) -> Reporter:
    if not progress:
        return Reporter()
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    # IPython in a terminal has no "IPKernelApp" in its configuration.
    in_notebook = shell is not None and "IPKernelApp" in shell.config
    return NotebookReporter() if in_notebook else TerminalReporter()


def _train(
    stage: Stage, fields: Mapping[str, Any], tables: Mapping[str, Path | Table], call: _Call
) -> GPT:
    """Trains one stage and returns its best model.

    Args:
      stage: the stage to train.
      fields: name of a field of the stage -> value. None keeps the value of the experiment.
      tables: split -> rows. The mapping is empty if the fields name files.
      call: the other arguments.
    """
    import datasets

    experiment = _experiment(stage, fields, call)
    folder = _TemporaryFolder() if call.workdir is None else None
    place = folder.path if folder else os.fspath(typing.cast(Path, call.workdir))
    reporter = _reporter(call.progress)
    try:
        with _arguments_named(stage), contextlib.ExitStack() as end:
            # Reading data disables the progress bars of `datasets`, which belong to the caller.
            if datasets.is_progress_bar_enabled():
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
    return model_lib.of(dataclasses.replace(gpt, folder=folder))


def _datasets(
    experiment: Experiment, stage: Stage, tables: Mapping[str, Path | Table]
) -> dict[str, Any]:
    """Returns split -> a `datasets.Dataset` with the columns of its table that the stage reads."""
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
    """Returns the exception of a stopped run, with a message for callers from Python."""
    message = str(error).replace("the same command", f"the same call with {workdir=!s}")
    if isinstance(error, Preempted) and error.interrupted:
        return KeyboardInterrupt(message)
    return type(error)(message)


@contextlib.contextmanager
def _arguments_named(stage: Stage) -> Iterator[None]:
    """Replaces the names of fields and data splits in error messages by names of arguments."""
    names = _ARGUMENTS[stage]
    try:
        yield
    except UserError as error:
        text = re.sub(r"`([\w.]+)`", lambda match: f"`{names.get(match[1], match[1])}`", str(error))
        raise UserError(text) from error
