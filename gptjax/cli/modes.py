"""The modes: each reads its flags, calls the library, and writes files or prints text."""

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from gptjax.cli import flags
from gptjax.cli.console import program
from gptjax.cli.flags import Command
from gptjax.cluster.processes import is_main
from gptjax.config import schema, validation
from gptjax.config.paper_tasks import SUBMISSIONS
from gptjax.config.schema import (
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    TaskKind,
    TaskSpec,
    Words,
)
from gptjax.data import splits
from gptjax.data.tables.labelled import LabelledTable, as_text
from gptjax.data.tables.texts import read_text
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.errors import UserError, nearest, require
from gptjax.infer import predictor
from gptjax.infer.predictor import GPT, Predictions
from gptjax.io import console
from gptjax.io import files as files_lib
from gptjax.report import plots, tables

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": ""}
"""Ending of an output file -> what separates its columns; "" for JSON lines."""

Record = dict[str, Any]
"""A row of an output file: column name -> value."""


def train(command: Command) -> None:
    """Trains the experiment; prints its results, and commands to try next."""
    from gptjax.train import run

    summary = run.run(command.experiment, command.workdir, command.overrides, flags.PROFILE.value)
    if is_main():
        plots.draw_plots(command.workdir)
        print(_results(command.workdir, summary))


def _results(workdir: str, summary: Mapping[str, Any]) -> str:
    commands = [f"{program()} generate --checkpoint={workdir} --prompt='The '"]
    if "finetune" in summary:
        commands.append(
            f"{program()} predict --checkpoint={workdir} --input=ROWS.csv --output=predictions.csv"
        )
    baselines = (summary.get("finetune") or {}).get("floor", {})
    return tables.results_table(summary, baselines, workdir, commands)


def ablate(command: Command) -> None:
    """Runs every variant of every task with several seeds; writes the tables into the workdir."""
    from gptjax.ablation import run

    run.run(command.experiment, command.workdir, flags.SEEDS.value, command.overrides)


def evaluate(command: Command) -> None:
    """Prints losses and metrics, or the scores of zero-shot probes, as one line of JSON."""
    require(flags.CHECKPOINT.value, "--checkpoint: give the --workdir of a finished training")
    if flags.PROBES.value:
        probes = command.experiment.probes if command.has_config else None
        require(probes != {}, "--probes: the experiment of --config has no probes")
        for name, probe in (probes or {}).items():
            validation.validate_probe(name, probe)
        gpt = _load()
        scores: dict[str, Any] = {"probes": gpt.probe(probes or _probes_of_training(gpt))}
    else:
        gpt = _load()
        source, found = _score_text(gpt) if gpt.task is None else _score_task(gpt, gpt.task)
        scores = {"data": source, **found}
    print(json.dumps(files_lib.json_ready({"checkpoint": gpt.path, **scores})))


def _load() -> GPT:
    return predictor.load(flags.CHECKPOINT.value, argument="checkpoint")


def _probes_of_training(gpt: GPT) -> dict[str, ProbeConfig]:
    own = gpt.meta.experiment_config().probes
    require(own, f"--probes: {gpt.path} was trained without any; give --config=probes")
    return own


def _finetune_config(gpt: GPT) -> FinetuneConfig:
    """Returns the fine-tuning of the run that trained the model; the defaults if it had none."""
    return gpt.meta.experiment_config().finetune or FinetuneConfig()


def _score_task(gpt: GPT, task: TaskSpec) -> tuple[str, dict[str, float]]:
    """Returns the name of the labelled rows, and the losses and metrics on them."""
    finetune = _finetune_config(gpt)
    if flags.INPUT.value:
        rows = _read_rows(gpt, task, flags.INPUT.value, (*task.text_columns, task.label))
        table = splits.without_label(rows, finetune)
    else:
        _require_data(gpt, finetune.dataset or finetune.train_file)
        seed = gpt.meta.experiment_config().seed
        table = _split(splits.labelled_splits(finetune, seed))
    return table.source, gpt.score(table, table.source, finetune.metrics)


def _score_text(gpt: GPT) -> tuple[str, dict[str, float]]:
    """Returns the name of a text, and the loss and perplexity of a language model on it."""
    pretrain = gpt.meta.experiment_config().pretrain or PretrainConfig()
    if flags.INPUT.value:
        source = flags.INPUT.value
        texts = read_text(source, pretrain.line_breaks)
    else:
        _require_data(gpt, pretrain.dataset or pretrain.train_files)
        texts = _split(splits.text_splits(pretrain))
        source = f"{_split_name()} split"
    return source, gpt.score_text(texts, pretrain.window)


def _require_data(gpt: GPT, source: str) -> None:
    require(source, f"--checkpoint: {gpt.path} was imported, without data; give --input")


def _split_name() -> str:
    return flags.SPLIT.value or "validation"


def _split(tables: Mapping[str, Any]) -> Any:
    """Returns the table of the split that `--split` names."""
    name = _split_name()
    require(
        name in tables,
        f"--split={name}: must be one of {', '.join(tables)}{nearest(name, tables)}",
    )
    return tables[name]


def _read_rows(gpt: GPT, task: TaskSpec, path: str, columns: tuple[str, ...]) -> LabelledTable:
    """Reads a file that has at least these columns; one without a header has those of training."""
    names = _finetune_config(gpt).columns
    if task.label not in columns and task.label in schema.split_names(names):
        # A file of new rows has no column for the label; yet one that has it is read as well.
        with contextlib.suppress(UserError):
            return splits.read_labelled(path, names, columns)
        names = ",".join(name for name in schema.split_names(names) if name != task.label)
    return splits.read_labelled(path, names, columns)


def predict(_: Command) -> None:
    """Writes the label and the probabilities (or the number) of every row of a file, in order.

    The columns of the output are `row` (from 1), `prediction`, and for each label
    `probability_LABEL`. With `--glue` they are `index` and `prediction`.
    """
    output_path, glue = flags.OUTPUT.value, flags.GLUE.value
    delimiter = _check_predict_flags()
    gpt = _load()
    task = gpt.require_task()
    table = _unlabelled_rows(gpt, task)
    found = gpt.predict(table)
    records = _submission(glue, task, table, found.labels) if glue else _records(found)
    files_lib.write_atomically(output_path, _table(records, delimiter).encode())
    notes = [f"{found.cut:,} cut to fit {gpt.config.context_length} tokens"] if found.cut else []
    notes += [f"{found.empty:,} with an empty text"] if found.empty else []
    print(f"{len(records):,} rows -> {output_path}" + "".join(f", {note}" for note in notes))


def _check_predict_flags() -> str:
    """Checks the flags before the model is loaded; returns the delimiter of the output."""
    input_path, output_path, glue = flags.INPUT.value, flags.OUTPUT.value, flags.GLUE.value
    require(flags.CHECKPOINT.value, "--checkpoint: give the --workdir of a finished fine-tuning")
    require(
        not (input_path and flags.SPLIT.value),
        "--split: belongs to the model's data set on the Hugging Face hub; give it or --input, "
        "not both",
    )
    require(
        not glue or glue in SUBMISSIONS,
        f"--glue={glue}: must be one of {', '.join(SUBMISSIONS)}{nearest(glue, SUBMISSIONS)}",
    )
    require(output_path, "--output: give the file to write (.csv, .tsv or .jsonl)")
    ending = os.path.splitext(output_path)[1].lower()
    require(
        ending in _DELIMITERS,
        f"--output={output_path}: the ending must be one of {', '.join(_DELIMITERS)}",
    )
    require(
        not (os.path.exists(input_path) and os.path.exists(output_path))
        or not os.path.samefile(input_path, output_path),
        f"--output={output_path}: is the input file; choose another name",
    )
    return _DELIMITERS[ending]


def _unlabelled_rows(gpt: GPT, task: TaskSpec) -> LabelledTable:
    """Returns the rows of `--input`, or of a split of the hub's data set."""
    if flags.INPUT.value:
        return _read_rows(gpt, task, flags.INPUT.value, task.text_columns)
    finetune = _finetune_config(gpt)
    require(
        finetune.dataset and flags.SPLIT.value,
        "--input: give the file with the rows to predict; or --split, if the model was fine-tuned "
        "on a data set of the Hugging Face hub",
    )
    return splits.one_split(finetune.dataset, flags.SPLIT.value, task.text_columns)


def _records(found: Predictions) -> list[Record]:
    records = []
    for i, label in enumerate(found.labels):
        record: Record = {"row": i + 1, "prediction": label}
        if found.probabilities is not None:
            for name, value in zip(found.label_names, found.probabilities[i], strict=True):
                record[f"probability_{name}"] = round(float(value), 6)
        records.append(record)
    return records


def _submission(glue: str, task: TaskSpec, table: LabelledTable, labels: list[Any]) -> list[Record]:
    """Returns the rows that GLUE's server accepts: the index of the test row, and the answer."""
    names = SUBMISSIONS[glue]
    numbers = tuple(str(i) for i in range(len(names)))
    require(
        (task.kind is TaskKind.REGRESSION) == (not names)
        and (set(task.labels) <= set(names) or task.labels == numbers),
        f"--glue={glue}: its answers are {', '.join(names) or 'numbers'}; the model's are "
        f"{', '.join(task.labels[:5]) or 'numbers'}",
    )
    if not names:
        answers = [f"{min(5.0, max(0.0, value)):.3f}" for value in labels]
    elif set(task.labels) <= set(names):
        answers = labels
    else:
        answers = [names[int(label)] for label in labels]
    existing = table.column_names
    column = next((name for name in ("index", "idx") if name in existing), "")
    index = list(table.rows[column] if column else range(len(labels)))
    for row, value in enumerate(index, 1):
        number = as_text(value).strip().isdecimal()
        require(number, f"{table.source}: row {row}, column {column}: {value!r} is not a number")
    return [
        {"index": int(i), "prediction": answer} for i, answer in zip(index, answers, strict=True)
    ]


def _table(records: list[Record], delimiter: str) -> str:
    if not delimiter:
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if delimiter == "\t":
        # The .tsv files that we read have no quotes: a cell may hold no tab and no line break.
        lines = [list(records[0])] + [list(record.values()) for record in records]
        return "".join("\t".join(_plain(cell) for cell in line) + "\n" for line in lines)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _plain(cell: Any) -> str:
    return " ".join(as_text(cell).split()) if isinstance(cell, str) else str(cell)


def generate(_: Command) -> None:
    """Prints texts that begin with the prompt."""
    require(flags.CHECKPOINT.value, "--checkpoint: give the --workdir of a finished training")
    gpt = _load()
    samples = flags.NUM_SAMPLES.value
    ids = gpt.tokenizer.encode(flags.PROMPT.value)
    unknown = ids.count(gpt.tokenizer.unknown_id)
    if unknown:
        console.say(f"--prompt: {unknown} of its characters or words are not in the vocabulary")
    texts = gpt.generate(
        ids,
        flags.MAX_NEW_TOKENS.value,
        temperature=flags.TEMPERATURE.value,
        top_k=flags.TOP_K.value,
        top_p=flags.TOP_P.value,
        num_samples=samples,
        seed=flags.SEED.value,
    )
    for i, text in enumerate(texts, 1):
        if samples > 1:
            print(f"--- {i} of {samples}")
        print(text)


def tokenizer(command: Command) -> None:
    """Trains a tokenizer on text files; writes `tokenizer.json` and the vocabulary/merges pair."""
    config, output_path = command.experiment.tokenizer, flags.OUTPUT.value
    require(flags.INPUT.value, "--input: give the text files (comma-separated globs)")
    require(output_path, "--output: give the folder to write")
    validation.validate_tokenizer(config)
    texts = read_text(flags.INPUT.value)
    trained = tokenizer_lib.build(config, texts)
    files = {"tokenizer.json": trained.to_json()}
    pair = tokenizer_lib.pair_texts(trained)
    if pair is not None:
        files["vocab.json"], files["merges.txt"] = pair
    with files_lib.disk_errors(output_path):
        os.makedirs(output_path, exist_ok=True)
    for name, text in files.items():
        files_lib.write_atomically(os.path.join(output_path, name), text.encode())
    print(f"{len(trained):,} tokens -> {output_path} ({', '.join(files)})")
    sys.stdout.flush()


def import_weights(command: Command) -> None:
    """Makes a workdir from the weights of another program."""
    from gptjax.interop import convert

    # Only a flag counts: the default of the field is not that of imported tokenizers.
    words = command.overrides.get("tokenizer.words", Words.EXACT)
    output_path = flags.OUTPUT.value
    for line in convert.import_weights(flags.INPUT.value, output_path, flags.FORMAT.value, words):
        print(line)
    print(f"to start from them: --config.init_from={output_path}")


def export_weights(_: Command) -> None:
    """Writes a trained model as a folder for another program."""
    from gptjax.interop import convert

    for line in convert.export_weights(flags.INPUT.value, flags.OUTPUT.value, flags.FORMAT.value):
        print(line)


def compile_step(command: Command) -> None:
    """Prints what the train step costs on a machine that need not be there."""
    from gptjax.cost import compile, sweep

    topology, stage, output_path = flags.TOPOLOGY.value, flags.STAGE.value, flags.OUTPUT.value
    if flags.SWEEP.value:
        sweep.run(command.experiment, topology, stage, flags.SWEEP_LIMIT.value, output_path)
    else:
        compile.run(command.experiment, topology, stage, output_path)


def bench(command: Command) -> None:
    """Prints how fast training, generation or the loading of data is on this machine."""
    from gptjax.cost import bench

    output_path = flags.OUTPUT.value
    beside = os.path.dirname(output_path) if output_path else command.workdir
    request = bench.Request(
        what=flags.BENCH.value,
        stage=flags.STAGE.value,
        steps=flags.STEPS.value,
        max_new_tokens=flags.MAX_NEW_TOKENS.value,
        num_samples=flags.NUM_SAMPLES.value,
        profile=flags.PROFILE.value,
        profile_folder=os.path.join(beside, "profile"),
    )
    bench.run(command.experiment, request, output_path)


MODES: dict[str, Callable[[Command], None]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "generate": generate,
    "tokenizer": tokenizer,
    "import": import_weights,
    "export": export_weights,
    "ablate": ablate,
    "compile": compile_step,
    "bench": bench,
}
