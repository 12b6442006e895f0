"""The modes of the command line: the function `run_MODE` runs the mode MODE.

Each function reads the flags of its mode, calls the library, and writes files or prints text.
"""

import contextlib
import csv
import io
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from gptjax.cli import flags
from gptjax.cli.console import program
from gptjax.cli.flags import Command
from gptjax.cluster import processes
from gptjax.config import schema, validation
from gptjax.config.paper_tasks import SUBMISSIONS
from gptjax.config.schema import FinetuneConfig, TaskSpec
from gptjax.data import splits, tasks
from gptjax.data.tables.labelled import LabelledTable, as_text
from gptjax.data.tables.texts import read_text
from gptjax.data.tokens import store
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.errors import UserError, nearest, require
from gptjax.infer import predictor
from gptjax.infer.predictor import GPT
from gptjax.io import console, files
from gptjax.report import plots, tables

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": ""}
"""Ending of an output file -> the separator of its columns. An empty string means JSON lines."""

Record = dict[str, Any]
"""A row of an output file: column name -> value."""


def run_train(command: Command) -> None:
    """Trains the experiment, and prints its results and some commands to try next."""
    from gptjax.train import run

    options = run.Options(given=command.overrides, profile=flags.PROFILE.value)
    summary = run.run(command.experiment, command.workdir, options)
    if processes.is_main():
        plots.draw_plots(command.workdir)
        model = f"--checkpoint={command.workdir}"
        commands = [f"{program()} generate {model} --prompt='The '"]
        if "finetune" in summary:
            rows = "--input=ROWS.csv --output=predictions.csv"
            commands.append(f"{program()} predict {model} {rows}")
        baselines = (summary.get("finetune") or {}).get("floor", {})
        start = command.experiment.init_from
        print(tables.results_table(summary, baselines, command.workdir, commands, start))


def run_ablate(command: Command) -> None:
    """Runs every variant of every task with several seeds, and writes tables into the workdir."""
    from gptjax.ablation import run

    run.run(command.experiment, command.workdir, flags.SEEDS.value, command.overrides)


def run_evaluate(command: Command) -> None:
    """Prints losses and metrics as one line of JSON.

    With `--probes` it prints the scores of zero-shot probes instead. A probe is a task that the
    language model was never trained on.
    """
    if flags.PROBES.value:
        probes = command.experiment.probes if command.has_config else None
        require(probes != {}, "--probes: the experiment of --config has no probes")
        for name, probe in (probes or {}).items():
            validation.validate_probe(name, probe)
        gpt = _load()
        probes = probes or gpt.experiment.probes
        require(probes, f"--probes: {gpt.path} was trained without any; give --config=probes")
        scores: dict[str, Any] = {"probes": gpt.probe(probes)}
    else:
        gpt = _load()
        source, found = _score_text(gpt) if gpt.task is None else _score_task(gpt, gpt.task)
        _warn_of_unknown(found["unknown_tokens"], source)
        scores = {"data": source, **found}
    print(json.dumps(files.json_ready({"checkpoint": gpt.path, **scores})))


def _warn_of_unknown(unknown: float, source: str) -> None:
    """Warns on stderr if a large fraction of the tokens is unknown."""
    for line in tasks.unknown_warning(unknown, source):
        console.say(line)


def _load() -> GPT:
    """Returns the model of `--checkpoint`: a folder, or a model of the hub."""
    path = flags.CHECKPOINT.value
    require(path, "--checkpoint: give the --workdir of a finished training")
    if schema.hub_address(path):
        from gptjax.interop import hub

        return predictor.from_checkpoint(hub.open_checkpoint(path, "checkpoint", say=console.say))
    return predictor.load(path, argument="checkpoint")


def _finetune_config(gpt: GPT) -> FinetuneConfig:
    """Returns the fine-tuning configuration of the run that trained the model.

    If the run had no fine-tuning stage, the result is the default configuration.
    """
    return gpt.experiment.finetune or FinetuneConfig()


def _score_task(gpt: GPT, task: TaskSpec) -> tuple[str, dict[str, float]]:
    """Returns the name of the labelled rows, and the losses and metrics of the model on them."""
    finetune = _finetune_config(gpt)
    if flags.INPUT.value:
        rows = _read_rows(gpt, task, flags.INPUT.value, (*task.text_columns, task.label))
        table = splits.without_label(rows, finetune)
    else:
        _require_data(gpt, finetune.dataset or finetune.train_file)
        tables = splits.labelled_splits(finetune, gpt.experiment.seed)
        table = _split(tables)
        if table.part_of:
            train = gpt.encode(tables["train"], table.part_of, labelled=True)
            _require_same_training_data(gpt, train.fingerprint, table.part_of)
    return table.source, gpt.score(table, table.source, finetune.metrics)


def _score_text(gpt: GPT) -> tuple[str, dict[str, float]]:
    """Returns the name of a text, and the loss and perplexity of the language model on the text."""
    pretrain = gpt.experiment.pretrain or schema.PretrainConfig()
    if flags.INPUT.value:
        source = flags.INPUT.value
        texts = read_text(source, pretrain.line_breaks)
    else:
        data = pretrain.dataset or pretrain.train_files
        _require_data(gpt, data)
        tables = splits.text_splits(pretrain)
        texts = _split(tables)
        if not pretrain.validation_files and pretrain.dataset != splits.BUILTIN:
            train = tables["train"]
            stream = store.token_stream(train, gpt.tokenizer, train.fingerprint)
            found = store.statistics(stream, gpt.tokenizer, train.fingerprint).fingerprint
            _require_same_training_data(gpt, found, data)
        source = f"{_split_name()} split"
    return source, gpt.score_text(texts, pretrain.window)


def _require_data(gpt: GPT, source: str) -> None:
    require(
        source,
        f"--checkpoint: {gpt.path} was imported or trained on tables in Python, so it names no "
        "data; give --input",
    )


def _require_same_training_data(gpt: GPT, fingerprint: str, source: str) -> None:
    """Raises `UserError` if rows that are held out now can have been trained on.

    Args:
      gpt: the model.
      fingerprint: the fingerprint of the training data that is left after the held-out part.
      source: the files, or the data set.
    """
    require(
        fingerprint == gpt.meta.data_fingerprint,
        f"--split={_split_name()}: {source} is not what the model was trained on (it has changed, "
        "or an earlier version of gptjax held out other rows), so the held-out rows may have been "
        "trained on; restore it, or give other rows with --input",
    )


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
    """Reads a file that has at least these columns.

    A file without a header must have the columns of the training file, in the same order. The
    column of the label can be left out if it is not among `columns`.
    """
    names = _finetune_config(gpt).columns
    if task.label not in columns and task.label in schema.split_names(names):
        # A file of new rows may have the column of the label. If reading with this column fails,
        # the last line reads the file without it.
        with contextlib.suppress(UserError):
            return splits.read_labelled(path, names, columns)
        names = ",".join(name for name in schema.split_names(names) if name != task.label)
    return splits.read_labelled(path, names, columns)


def run_predict(_: Command) -> None:
    """Writes the predictions for the rows of a file, one line for each row, in the same order.

    A prediction is a label with the probabilities of all labels, or the number of a regression.

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
    files.write_atomically(output_path, _table(records, delimiter).encode())
    notes = found.reading.describe(found.cut, gpt.config.context_length)
    notes += [f"{found.empty:,} with an empty text"] if found.empty else []
    notes += [f"{found.unknown:.2%} unknown tokens"]
    print(f"{len(records):,} rows -> {output_path}" + "".join(f", {note}" for note in notes))
    _warn_of_unknown(found.unknown, table.source)


def _check_predict_flags() -> str:
    """Checks the flags before the model is loaded, and returns the delimiter of the output file."""
    input_path, output_path, glue = flags.INPUT.value, flags.OUTPUT.value, flags.GLUE.value
    require(flags.CHECKPOINT.value, "--checkpoint: give the --workdir of a finished fine-tuning")
    if input_path and flags.SPLIT.value:
        raise UserError(
            "--split: belongs to the model's data set on the Hugging Face hub; give it or --input, "
            "not both"
        )
    if glue and glue not in SUBMISSIONS:
        known = ", ".join(SUBMISSIONS)
        raise UserError(f"--glue={glue}: must be one of {known}{nearest(glue, SUBMISSIONS)}")
    require(output_path, "--output: give the file to write (.csv, .tsv or .jsonl)")
    ending = os.path.splitext(output_path)[1].lower()
    require(
        ending in _DELIMITERS,
        f"--output={output_path}: the ending must be one of {', '.join(_DELIMITERS)}",
    )
    both_exist = os.path.exists(input_path) and os.path.exists(output_path)
    if both_exist and os.path.samefile(input_path, output_path):
        raise UserError(f"--output={output_path}: is the input file; choose another name")
    return _DELIMITERS[ending]


def _unlabelled_rows(gpt: GPT, task: TaskSpec) -> LabelledTable:
    """Returns the rows of `--input`, or of a split of the model's data set on the hub."""
    if flags.INPUT.value:
        return _read_rows(gpt, task, flags.INPUT.value, task.text_columns)
    finetune = _finetune_config(gpt)
    require(
        finetune.dataset and flags.SPLIT.value,
        "--input: give the file with the rows to predict; or --split, if the model was fine-tuned "
        "on a data set of the Hugging Face hub",
    )
    return splits.one_split(finetune.dataset, flags.SPLIT.value, task.text_columns)


def _records(found: predictor.Predictions) -> list[Record]:
    records: list[Record] = [
        {"row": row, "prediction": label} for row, label in enumerate(found.labels, 1)
    ]
    if found.probabilities is not None:
        names = [f"probability_{name}" for name in found.label_names]
        for record, values in zip(records, found.probabilities, strict=True):
            record |= zip(names, (round(float(value), 6) for value in values), strict=True)
    return records


def _submission(glue: str, task: TaskSpec, table: LabelledTable, labels: list[Any]) -> list[Record]:
    """Returns the rows that GLUE's server accepts, with the index of a test row and the answer.

    Args:
      glue: the name of the GLUE task.
      task: the task of the model.
      table: the test rows.
      labels: the predicted label or number of each test row.
    """
    names = SUBMISSIONS[glue]
    by_number = {str(number): name for number, name in enumerate(names)}
    require(
        (task.kind is schema.TaskKind.REGRESSION) == (not names)
        and (set(task.labels) <= set(names) or task.labels == tuple(by_number)),
        f"--glue={glue}: its answers are {', '.join(names) or 'numbers'}; the model's are "
        f"{', '.join(task.labels[:5]) or 'numbers'}",
    )
    if names:
        answers = [by_number.get(label, label) for label in labels]
    else:
        answers = [f"{min(5.0, max(0.0, value)):.3f}" for value in labels]
    column = next((name for name in ("index", "idx") if name in table.column_names), "")
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
    rows = [list(records[0]), *(list(record.values()) for record in records)]
    if delimiter == "\t":
        # Our reader of .tsv files knows no quotes, so a cell must not hold a tab or a line break.
        return "".join("\t".join(map(_plain, row)) + "\n" for row in rows)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _plain(cell: Any) -> str:
    return " ".join(as_text(cell).split()) if isinstance(cell, str) else str(cell)


def run_generate(_: Command) -> None:
    """Prints texts that begin with the prompt."""
    gpt = _load()
    ids = gpt.tokenizer.encode(flags.PROMPT.value)
    unknown = ids.count(gpt.tokenizer.unknown_id)
    if unknown:
        console.say(f"--prompt: {unknown} of its characters or words are not in the vocabulary")
    sampling = ("max_new_tokens", "temperature", "top_k", "top_p", "num_samples", "seed")
    texts = gpt.generate(ids, **flags.values(sampling))
    for i, text in enumerate(texts, 1):
        if len(texts) > 1:
            print(f"--- {i} of {len(texts)}")
        print(text)


def run_explain(_: Command) -> None:
    """Writes a page that shows, step by step, how a model reads one text."""
    from gptjax.explain import data, pictures
    from gptjax.explain.model import Page

    output_path, format = flags.OUTPUT.value, flags.FORMAT.value
    ending = os.path.splitext(output_path)[1].lower()
    if format is None:
        require(output_path, "--output: give the page to write (.html)")
        is_known = ending in (".html", ".json")
        require(is_known, f"--output={output_path}: the ending must be .html or .json")
    else:
        formats = list(schema.PictureFormat)
        require(format in formats, f"--format={format}: must be one of {', '.join(formats)}")
        is_folder = bool(output_path) and (os.path.isdir(output_path) or not ending)
        is_folder = is_folder and not os.path.isfile(output_path)
        require(is_folder, f"--output={output_path}: give a folder for the .{format} pictures")
        place = pathlib.Path(output_path).absolute()
        while not place.exists():
            place = place.parent
        require(place.is_dir(), f"--output={output_path}: {place} is no folder")
        for name in ("compare", "other_text", "weights"):
            given = flags.FLAGS[name].present
            require(not given, f"--{name}: pictures do not show it; leave it out with --format")
        pictures.fonts(flags.LANGUAGE.value)
    heads = _heads(flags.HEADS.value)
    gpt = _load()
    texts, names = _texts(gpt), schema.split_names(flags.COMPARE.value)
    # Pictures show no comparison.
    compare: Any = [] if format or names == ("none",) else names or None
    if note := data.how_long(gpt, texts):
        console.say(f"--text: {note}")
    found = data.explain(
        gpt, texts, flags.LABEL.value, heads, compare, _other_text(gpt, texts), flags.WEIGHTS.value
    )
    shown = Page(found, flags.LANGUAGE.value)
    length = f"{len(found['tokens'])} tokens"
    if format is not None:
        paths = shown.save_pictures(output_path, format)
        print(f"{length} -> {len(paths)} pictures in {output_path}")
        return
    text = json.dumps(found, allow_nan=False) if ending == ".json" else shown.html
    files.write_atomically(output_path, text.encode())
    size = f"{len(text.encode()) / 1e6:.1f} MB"
    use = "; it opens in a browser" if ending == ".html" else ""
    print(f"{length} -> {output_path} ({size}){use}")


def _heads(names: str) -> list[tuple[int, int]]:
    """Returns the heads of `--heads`, as pairs of a layer and a head."""
    found = []
    for name in schema.split_names(names):
        layer, _, head = name.partition(".")
        both = layer.isdecimal() and head.isdecimal()
        require(both, f"--heads={names}: {name!r} must be LAYER.HEAD, such as 0.3")
        found.append((int(layer), int(head)))
    return found


def _other_text(gpt: GPT, texts: str | dict[str, str]) -> str | dict[str, str] | None:
    """Returns the texts with that of `--other_text`; None without the flag."""
    other = flags.OTHER_TEXT.value
    if other is None or isinstance(texts, str):
        return other
    return texts | {gpt.require_task().text: other}


def _texts(gpt: GPT) -> str | dict[str, str]:
    """Returns the texts of `--text`, `--text_pair` and `--choice`, as `GPT.read` takes them."""
    text, pair, answers = flags.TEXT.value, flags.TEXT_PAIR.value, flags.CHOICE.value or []
    if text is None:
        raise UserError("--text: give the text to explain")
    task, kind = gpt.task, gpt.task.kind if gpt.task else "a language model"
    wants_pair = task is not None and bool(task.text_pair)
    count = len(task.choices) if task else 0
    require(pair is None or wants_pair, f"--text_pair: {gpt.path} is {kind}; it reads no pair")
    require(pair is not None or not wants_pair, f"--text_pair: give it; {gpt.path} is {kind}")
    require(
        len(answers) == count,
        f"--choice: given {len(answers)} times; {gpt.path} is {kind}; it reads "
        + (f"{count} of them" if count else "no choices"),
    )
    if task is None:
        return text
    texts: dict[str, str] = {task.text: text, **dict(zip(task.choices, answers, strict=True))}
    return texts if pair is None else {**texts, task.text_pair: pair}


def run_tokenizer(command: Command) -> None:
    """Trains a tokenizer on text files, and writes it as `tokenizer.json`.

    A BPE tokenizer is also written as the two files `vocab.json` and `merges.txt`.
    """
    config, output_path = command.experiment.tokenizer, flags.OUTPUT.value
    require(flags.INPUT.value, "--input: give the text files (comma-separated globs)")
    require(output_path, "--output: give the folder to write")
    validation.validate_tokenizer(config)
    trained = tokenizer_lib.build(config, read_text(flags.INPUT.value))
    texts = {"tokenizer.json": trained.to_json()}
    pair = tokenizer_lib.pair_texts(trained)
    if pair is not None:
        texts["vocab.json"], texts["merges.txt"] = pair
    with files.disk_errors(output_path):
        os.makedirs(output_path, exist_ok=True)
    for name, text in texts.items():
        files.write_atomically(os.path.join(output_path, name), text.encode())
    print(f"{len(trained):,} tokens -> {output_path} ({', '.join(texts)})")


def run_import(command: Command) -> None:
    """Creates a workdir from the weights of another program."""
    from gptjax.interop import convert

    # `tokenizer.words` is used only if the user set it by flag. The default of the field, `fast`,
    # is for new tokenizers, and the default for imported tokenizers is `exact`.
    words = command.overrides.get("tokenizer.words", schema.Words.EXACT)
    output_path = flags.OUTPUT.value
    lines = convert.import_weights(flags.INPUT.value, output_path, _weight_format(), words)
    print(*lines, f"to start from them: --config.init_from={output_path}", sep="\n")


def run_export(_: Command) -> None:
    """Writes a trained model as a folder for another program."""
    from gptjax.interop import convert

    lines = convert.export_weights(flags.INPUT.value, flags.OUTPUT.value, _weight_format())
    print(*lines, sep="\n")


def _weight_format() -> schema.WeightFormat:
    """Returns the format of `--format`, which is that of transformers by default."""
    name, names = flags.FORMAT.value or schema.WeightFormat.HUGGINGFACE, list(schema.WeightFormat)
    require(name in names, f"--format={name}: must be one of {', '.join(names)}")
    return schema.WeightFormat(name)


def run_compile(command: Command) -> None:
    """Prints the cost of the train step on a given machine, which need not be present."""
    from gptjax.cost import compile, sweep

    topology, stage, output_path = flags.TOPOLOGY.value, flags.STAGE.value, flags.OUTPUT.value
    if flags.SWEEP.value:
        sweep.run(command.experiment, topology, stage, flags.SWEEP_LIMIT.value, output_path)
    else:
        compile.run(command.experiment, topology, stage, output_path)


def run_bench(command: Command) -> None:
    """Prints the speed of training, text generation or data loading on this machine."""
    from gptjax.cost import bench

    output_path = flags.OUTPUT.value
    beside = os.path.dirname(output_path) if output_path else command.workdir
    request = bench.Request(
        what=flags.BENCH.value,
        profile_folder=os.path.join(beside, "profile"),
        **flags.values(("stage", "steps", "max_new_tokens", "num_samples", "profile")),
    )
    bench.run(command.experiment, request, output_path)
