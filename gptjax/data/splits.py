"""The splits of a stage: from the built-in data, files, the hub, or tables in memory."""

import dataclasses
from collections.abc import Mapping

from gptjax.config import schema
from gptjax.config.schema import FinetuneConfig, PretrainConfig, TaskKind, TaskSpec
from gptjax.data.builtin import tasks as builtin_tasks
from gptjax.data.builtin.tasks import SPLITS
from gptjax.data.tables import files
from gptjax.data.tables.files import Dataset
from gptjax.data.tables.labelled import LabelledTable, as_text, holdout
from gptjax.data.tables.texts import Texts, holdout_text, read_text
from gptjax.errors import require

BUILTIN = "builtin"


def text_splits(
    config: PretrainConfig, tables: Mapping[str, Dataset] | None = None
) -> dict[str, Texts]:
    """Returns the texts of "train" and "validation".

    Without validation files (or a validation table), the end of the training text is held out.

    Args:
      config: where the text comes from, and which part of it is held out.
      tables: "train", and "validation" if there is one -> rows in memory, instead of the files or
        the data set of `config`. As in a data set of the hub, each row is a document in the column
        `config.text`.

    Raises:
      UserError: files, columns or splits that do not exist, or no text in them.
    """
    if tables is not None:
        tables = _in_order(tables, ("train", "validation"))
        texts = {name: _documents(rows, config.text, f"`{name}`") for name, rows in tables.items()}
    elif config.dataset == BUILTIN:
        texts = {name: builtin_tasks.builtin_text(name) for name in ("train", "validation")}
    elif config.dataset:
        rows = files.load_hub(config.dataset, "train")
        texts = {"train": _documents(rows, config.text, config.dataset)}
    else:
        texts = {"train": read_text(config.train_files, config.line_breaks)}
    if "validation" not in texts and config.validation_files:
        texts["validation"] = read_text(config.validation_files, config.line_breaks)
    elif "validation" not in texts:
        parts = holdout_text(texts["train"], config.validation_fraction)
        texts["train"], texts["validation"] = parts
    return texts


def _documents(rows: Dataset, column: str, source: str) -> Texts:
    """Returns the text of a column; a blank line ends each row, as it does in `read_text`."""
    LabelledTable(rows, source).require_columns([column])
    files.import_datasets()  # without progress bars
    documents = rows.map(
        lambda row: {"text": as_text(row[column]).rstrip("\n") + "\n\n"},
        remove_columns=rows.column_names,
    )
    return Texts.of(documents.with_format("arrow")[:].column("text"))


def task_spec(config: FinetuneConfig) -> TaskSpec:
    """Returns the task that the configuration describes, without the names of its labels."""
    kind, choices = TaskKind(config.task), schema.split_names(config.choices)
    return TaskSpec(kind, config.text, config.text_pair, choices, config.label, cut=config.cut)


def labelled_splits(
    config: FinetuneConfig, seed: int, tables: Mapping[str, Dataset] | None = None
) -> dict[str, LabelledTable]:
    """Returns the rows of "train", "validation" and, if there is one, "test".

    Without a validation file (or table) a part of train is held out; rows of equal text stay
    together. Rows whose label is `config.ignore_label` are left out.

    Args:
      config: where the rows come from, and which of their columns are read.
      seed: decides which rows are held out.
      tables: "train", and "validation" and "test" if there are such -> rows in memory, instead of
        the files or the data set of `config`.

    Raises:
      UserError: files, columns or splits that do not exist, or a file that cannot be read.
    """
    spec = task_spec(config)
    needed = (*spec.text_columns, spec.label)
    if tables is not None:
        tables = _in_order(tables, SPLITS)
        splits = {name: _checked(rows, f"`{name}`", needed) for name, rows in tables.items()}
    else:
        if config.dataset.startswith(f"{BUILTIN}:"):
            names = SPLITS
        elif config.dataset:
            names = ("train", config.validation_split, config.test_split)
        else:
            names = (config.train_file, config.validation_file, config.test_file)
        splits = {}
        for split, name in zip(SPLITS, names, strict=True):
            if name and config.dataset:
                splits[split] = one_split(config.dataset, name, needed)
            elif name:
                splits[split] = read_labelled(name, config.columns, needed)
    if "validation" not in splits:
        require(
            config.validation_fraction > 0,
            "`finetune.validation_fraction`: must be above 0 without validation_file",
        )
        parts = holdout(splits["train"], spec.text_columns, config.validation_fraction, seed)
        splits["train"], splits["validation"] = parts
    return {name: without_label(table, config) for name, table in splits.items()}


def one_split(dataset: str, split: str, needed: tuple[str, ...]) -> LabelledTable:
    """Returns one split of a data set, built in or from the hub, with the columns `needed`."""
    name = dataset.removeprefix(f"{BUILTIN}:")
    if name == dataset:
        rows = files.load_hub(dataset, split)
    else:
        require(split in SPLITS, f"{dataset}: no split {split!r}; it has {', '.join(SPLITS)}")
        rows = builtin_tasks.builtin_task(name, split)
    return _checked(rows, f"{dataset} ({split})", needed)


def read_labelled(path: str, columns: str, needed: tuple[str, ...]) -> LabelledTable:
    """Reads a table file and checks that it has the columns `needed`.

    Args:
      path: the file.
      columns: comma-separated names of the columns of a file without a header; "": it has one.
      needed: names or expressions.
    """
    return _checked(files.read_table(path, schema.split_names(columns)), path, needed)


def without_label(table: LabelledTable, config: FinetuneConfig) -> LabelledTable:
    """Returns the table without the rows whose label is `config.ignore_label`."""
    ignored = config.ignore_label
    if not ignored:
        return table
    labels = table.columns([config.label])[config.label]
    kept = [i for i, value in enumerate(labels) if as_text(value).strip() != ignored]
    require(kept, f"{table.source}: every row has the label {ignored!r}, which is ignored")
    return dataclasses.replace(table.select(kept), ignored=len(labels) - len(kept))


def _in_order(tables: Mapping[str, Dataset], names: tuple[str, ...]) -> dict[str, Dataset]:
    """Returns the tables in the order of `names`; checks that they have these names and rows."""
    require(
        "train" in tables and set(tables) <= set(names),
        f"`tables`: has {', '.join(tables) or 'nothing'}; it must have train, and may have "
        f"{' and '.join(names[1:])}",
    )
    for name, rows in tables.items():
        require(len(rows), f"`{name}`: has no rows; add at least one")
    return {name: tables[name] for name in names if name in tables}


def _checked(rows: Dataset, source: str, needed: tuple[str, ...]) -> LabelledTable:
    table = LabelledTable(rows, source)
    table.require_columns(needed)
    return table
