"""The splits (train, validation, test) of a training stage.

Their rows come from the built-in data, files, the Hugging Face hub, or tables in memory.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gptjax.config import schema
from gptjax.config.schema import FinetuneConfig, PretrainConfig, TaskKind, TaskSpec
from gptjax.data.builtin import tasks as builtin_tasks
from gptjax.data.builtin.tasks import SPLITS
from gptjax.data.tables import files
from gptjax.data.tables.files import Dataset
from gptjax.data.tables.labelled import LabelledTable, as_text, holdout, same_label
from gptjax.data.tables.texts import Texts, holdout_text, read_text
from gptjax.errors import require

BUILTIN = "builtin"


def text_splits(
    config: PretrainConfig, tables: Mapping[str, Dataset] | None = None
) -> dict[str, Texts]:
    """Returns the texts of "train" and "validation".

    If there is no validation text, the end of the training text is held out for validation.

    Args:
      config: the source of the text, and the fraction of it that is held out.
      tables: split -> rows in memory, which replace the files or the data set of `config`. The
        splits are "train" and, if there is one, "validation". Each row is a document, and its text
        is in the column `config.text`. None means that there are no such tables.

    Raises:
      UserError: a file, column or split does not exist or has no text.
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
    """Returns the text of a column, with a blank line after each row, as `read_text` returns it."""
    LabelledTable(rows, source).require_columns([column])
    files.import_datasets()  # this call switches off the progress bars of `map`

    def texts(batch: Mapping[str, Any], indices: list[int]) -> dict[str, list[str]]:
        table = LabelledTable(dict(batch), source, numbers=[index + 1 for index in indices])
        cells = table.columns([column])[column]
        return {"text": [as_text(cell).rstrip("\n") + "\n\n" for cell in cells]}

    documents = rows.map(texts, batched=True, with_indices=True, remove_columns=rows.column_names)
    return Texts.of(documents.with_format("arrow")[:].column("text"))


def task_spec(config: FinetuneConfig) -> TaskSpec:
    """Returns the task that the configuration describes, still without the names of its labels."""
    kind, choices = TaskKind(config.task), schema.split_names(config.choices)
    windows = config.max_windows if config.long == schema.Long.WINDOWS else 0
    return TaskSpec(
        kind, config.text, config.text_pair, choices, config.label,
        cut=config.cut, windows=windows, mean=config.head == schema.Head.MEAN,
    )  # fmt: skip


def labelled_splits(
    config: FinetuneConfig, seed: int, tables: Mapping[str, Dataset] | None = None
) -> dict[str, LabelledTable]:
    """Returns the rows of "train", "validation" and, if there is one, "test".

    If there are no validation rows, a fraction of the training rows is held out for validation.
    Rows of equal text are then in the same split, and each class has about the same share of both
    splits. Rows whose label is `config.ignore_label` are left out first.

    Args:
      config: the source of the rows, and the names of the columns to read.
      seed: the seed of the choice of the rows that are held out.
      tables: split -> rows in memory, which replace the files or the data set of `config`. The
        splits are "train" and, if there are such, "validation" and "test". None means that there
        are no such tables.

    Raises:
      UserError: a file, column or split does not exist, or a file cannot be read.
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
    splits = {name: without_label(table, config) for name, table in splits.items()}
    if "validation" not in splits:
        require(
            config.validation_fraction > 0,
            "`finetune.validation_fraction`: must be above 0 without validation_file",
        )
        classes = spec.label if spec.kind.has_classes else ""
        fraction = config.validation_fraction
        symmetric = spec.kind.sums_candidates
        parts = holdout(splits["train"], spec.text_columns, fraction, seed, classes, symmetric)
        splits["train"] = parts[0]
        # The rows that were left out are counted once, in the training split.
        splits["validation"] = dataclasses.replace(parts[1], ignored=0)
    return splits


def one_split(dataset: str, split: str, needed: tuple[str, ...]) -> LabelledTable:
    """Returns one split of a built-in data set or of a data set of the hub.

    Args:
      dataset: "builtin:TASK", or the name of a data set of the hub.
      split: the name of the split.
      needed: names of columns, or expressions (see `labelled.py`), which the rows must have.
    """
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
      columns: comma-separated names of the columns, for a file without a header. An empty string
        means that the file has a header.
      needed: names of columns, or expressions (see `labelled.py`).
    """
    return _checked(files.read_table(path, schema.split_names(columns)), path, needed)


def without_label(table: LabelledTable, config: FinetuneConfig) -> LabelledTable:
    """Returns the table without the rows whose label is `config.ignore_label`."""
    ignored = config.ignore_label
    if not ignored:
        return table
    labels = table.columns([config.label])[config.label]
    kept = [i for i, value in enumerate(labels) if not same_label(as_text(value), ignored)]
    require(kept, f"{table.source}: every row has the label {ignored!r}, which is ignored")
    return dataclasses.replace(table.select(kept), ignored=len(labels) - len(kept))


def _in_order(tables: Mapping[str, Dataset], names: tuple[str, ...]) -> dict[str, Dataset]:
    """Returns the tables in the order of `names`. Checks their names, and that they have rows."""
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
