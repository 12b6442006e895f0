"""The splits of a stage: where its configuration says they come from, as `datasets` tables."""

import dataclasses
from typing import Any

from gptjax.config import schema
from gptjax.config.schema import FinetuneConfig, PretrainConfig, TaskKind, TaskSpec
from gptjax.data.builtin import tasks as builtin_tasks
from gptjax.data.tables import expressions, holdout, hub, text_files
from gptjax.data.tables import files as files_lib
from gptjax.data.tasks import as_text
from gptjax.errors import UserError, require

BUILTIN = "builtin"


@dataclasses.dataclass(frozen=True)
class Table:
    """A split: its rows and what to call it in an error message."""

    rows: Any
    """`datasets.Dataset`"""
    where: str
    part_of: str = ""
    """The file that this split is a part of, where one file was divided."""
    numbers: tuple[int, ...] | None = None
    """Row of the file (from 1) of each row, where the split does not hold all of them."""
    ignored: int = 0
    """Rows left out for their label."""

    def columns(self, names: tuple[str, ...]) -> dict[str, list[Any]]:
        """Returns column name (or expression, see `columns.py`) -> values."""
        existing = self.rows.column_names
        return {
            name: expressions.read(self.rows.__getitem__, existing, name, self.where, self.numbers)
            for name in names
        }


def text_splits(config: PretrainConfig) -> dict[str, Any]:
    """Returns {"train", "validation"} -> `datasets.Dataset` with a column `text`."""
    if config.dataset == BUILTIN:
        return {name: builtin_tasks.builtin_text(name) for name in ("train", "validation")}
    if config.dataset:
        train = hub.load_hub(config.dataset, "train")
        files_lib.require_columns(train, [config.text], config.dataset)
        # Documents are separated by a blank line, as those of files are.
        train = train.map(
            lambda row: {"text": as_text(row[config.text]).rstrip("\n") + "\n\n"},
            remove_columns=train.column_names,
        )
    else:
        train = text_files.read_text(config.train_files, config.line_breaks)
    if config.validation_files:
        validation = text_files.read_text(config.validation_files, config.line_breaks)
    else:
        train, validation = holdout.holdout_text(train, config.validation_fraction)
    return {"train": train, "validation": validation}


def task_spec(config: FinetuneConfig) -> TaskSpec:
    """Returns the task that the configuration describes, its label names still unknown."""
    return TaskSpec(
        kind=TaskKind(config.task),
        text=config.text,
        text_pair=config.text_pair,
        choices=schema.split_names(config.choices),
        label=config.label,
        cut=config.cut,
    )


def read_labelled(path: str, columns: str, needed: tuple[str, ...]) -> Table:
    """Reads a table file and checks that it has the columns `needed`."""
    rows = files_lib.read_table(path, schema.split_names(columns))
    files_lib.require_columns(rows, list(needed), path)
    return Table(rows, path)


def _from_hub(config: FinetuneConfig, split: str, needed: tuple[str, ...]) -> Table:
    rows = hub.load_hub(config.dataset, split)
    where = f"{config.dataset} ({split})"
    files_lib.require_columns(rows, list(needed), where)
    return Table(rows, where)


def one_split(config: FinetuneConfig, split: str, needed: tuple[str, ...]) -> Table:
    """Returns one split of a data set, built in or from the hub, with the columns `needed`."""
    if not config.dataset.startswith(BUILTIN + ":"):
        return _from_hub(config, split, needed)
    tables = _builtin(config.dataset, needed)
    require(split in tables, f"{config.dataset}: no split {split!r}; it has {', '.join(tables)}")
    return tables[split]


def labelled_splits(config: FinetuneConfig, seed: int) -> dict[str, Table]:
    """Returns {"train", "validation"} and, where there is one, "test".

    Without a validation file a part of train is held out; rows of equal text stay together. Rows
    with the label `ignore_label` are left out.
    """
    tables = _all_rows(config, seed)
    return {name: without_label(each, config) for name, each in tables.items()}


def without_label(table: Table, config: FinetuneConfig) -> Table:
    """Returns the table without the rows whose label is `ignore_label`."""
    ignored = config.ignore_label
    if not ignored:
        return table
    labels = table.columns((config.label,))[config.label]
    kept = [i for i, value in enumerate(labels) if as_text(value).strip() != ignored]
    require(kept, f"{table.where}: every row has the label {ignored!r}, which is ignored")
    numbers = table.numbers or range(1, len(labels) + 1)
    return dataclasses.replace(
        table, rows=table.rows.select(kept, keep_in_memory=True),
        numbers=tuple(numbers[i] for i in kept), ignored=len(labels) - len(kept),
    )  # fmt: skip


def _all_rows(config: FinetuneConfig, seed: int) -> dict[str, Table]:
    spec = task_spec(config)
    needed = (*spec.text_columns, spec.label)
    if config.dataset.startswith(BUILTIN + ":"):
        return _builtin(config.dataset, needed)
    if config.dataset:
        tables = {
            "train": _from_hub(config, "train", needed),
            "validation": _from_hub(config, config.validation_split, needed),
        }
        if config.test_split:
            tables["test"] = _from_hub(config, config.test_split, needed)
        return tables
    files = {"train": config.train_file, "validation": config.validation_file}
    files["test"] = config.test_file
    tables = {
        name: read_labelled(path, config.columns, needed) for name, path in files.items() if path
    }
    if "validation" not in tables:
        require(
            config.validation_fraction > 0,
            "`finetune.validation_fraction`: must be above 0 without validation_file",
        )
        tables |= _held_out(tables["train"], spec.text_columns, config.validation_fraction, seed)
    return tables


def _held_out(
    table: Table, text_columns: tuple[str, ...], fraction: float, seed: int
) -> dict[str, Table]:
    """Divides a table; each part remembers which rows of the file it holds."""
    number = "row of the file"
    rows = table.rows.add_column(number, list(range(1, len(table.rows) + 1)))
    existing = table.rows.column_names
    read = dict.fromkeys(
        name for each in text_columns for name in expressions.sources(each, existing)
    )
    try:
        parts = holdout.holdout(rows, list(read), fraction, seed)
    except UserError as error:
        raise UserError(f"{table.where}: {error}") from error
    return {
        name: Table(part.remove_columns(number), table.where, table.where, tuple(part[number]))
        for name, part in zip(("train", "validation"), parts, strict=True)
    }


def _builtin(dataset: str, needed: tuple[str, ...]) -> dict[str, Table]:
    name = dataset.removeprefix(BUILTIN + ":")
    tables = {}
    for split in ("train", "validation", "test"):
        where = f"{dataset} ({split})"
        tables[split] = Table(builtin_tasks.builtin_task(name, split), where)
        files_lib.require_columns(tables[split].rows, list(needed), where)
    return tables
