"""The modes of `launch.py` besides training: files in, files or text out."""

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from gptjax.cluster.processes import is_main
from gptjax.config import schema, validation
from gptjax.config.paper_tasks import SUBMISSIONS
from gptjax.config.schema import TaskKind, TaskSpec, TokenizerKind
from gptjax.data import splits
from gptjax.data.tables import text_files
from gptjax.data.tasks import as_text
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.errors import UserError, nearest, require
from gptjax.infer import predictor
from gptjax.io import console
from gptjax.io import files as files_lib
from gptjax.report import plots, tables

_OUTPUTS = {".csv": ",", ".tsv": "\t", ".jsonl": ""}


def _columns(gpt: predictor.LoadedGPT) -> str:
    """The column names that the model was trained with, for files without a header."""
    finetune = gpt.meta.experiment_config().finetune
    return finetune.columns if finetune else ""


def _read_rows(gpt: predictor.LoadedGPT, path: str, labelled: bool) -> splits.Table:
    require(gpt.task, f"--checkpoint: {gpt.path} was not fine-tuned for a task")
    assert gpt.task is not None
    names = schema.split_names(_columns(gpt))
    label = (gpt.task.label,) if labelled else ()
    if not labelled and gpt.task.label in names:
        # New rows have no label yet; a file with one more column than that has one all the same.
        with contextlib.suppress(UserError):
            return splits.read_labelled(path, _columns(gpt), gpt.task.text_columns)
        names = tuple(name for name in names if name != gpt.task.label)
    return splits.read_labelled(path, ",".join(names), (*gpt.task.text_columns, *label))


def _hub_rows(gpt: predictor.LoadedGPT, split: str) -> splits.Table:
    """The rows of a split of the hub's data set that the model was fine-tuned on."""
    source = gpt.meta.experiment_config().finetune or schema.FinetuneConfig()
    require(
        source.dataset and split and gpt.task,
        "--input: give the file with the rows to predict; or, where the model was fine-tuned on a "
        "data set of the hub, the --split",
    )
    assert gpt.task is not None
    return splits.one_split(source, split, gpt.task.text_columns)


def predict(
    checkpoint: str, input_path: str, output_path: str, split: str = "", glue: str = ""
) -> None:
    """Writes label and probabilities (or the number) of every row of a file, in order.

    The output's columns: `row` (from 1), `prediction`, and a `probability_LABEL` for each label; or
    `index` and `prediction` as GLUE's server takes them.

    Args:
      checkpoint: of a fine-tuning.
      input_path: the rows; empty: the split of the hub's data set.
      output_path: .csv, .tsv or .jsonl.
      split: without an input.
      glue: name of the task to write a submission of; empty: none.
    """
    require(checkpoint, "--checkpoint: give the --workdir of a finished fine-tuning")
    require(
        not (input_path and split), "--split: is of the hub's data set; leave it out with --input"
    )
    require(
        not glue or glue in SUBMISSIONS,
        f"--glue={glue}: must be one of {', '.join(SUBMISSIONS)}{nearest(glue, SUBMISSIONS)}",
    )
    require(output_path, "--output: give the file to write (.csv, .tsv or .jsonl)")
    ending = os.path.splitext(output_path)[1].lower()
    require(
        ending in _OUTPUTS,
        f"--output={output_path}: the ending must be one of {', '.join(_OUTPUTS)}",
    )
    require(
        not (os.path.exists(input_path) and os.path.exists(output_path))
        or not os.path.samefile(input_path, output_path),
        f"--output={output_path}: is the input file; choose another name",
    )
    gpt = predictor.load(checkpoint, argument="checkpoint")
    table = _read_rows(gpt, input_path, labelled=False) if input_path else _hub_rows(gpt, split)
    assert gpt.task is not None
    found = gpt.predict(table.columns(gpt.task.text_columns))
    records = _submission(glue, gpt.task, table, found.labels) if glue else _records(found)
    files_lib.write_atomically(output_path, _table(records, _OUTPUTS[ending]).encode())
    notes = [f"{found.cut:,} cut to fit {gpt.config.context_length} tokens"] if found.cut else []
    notes += [f"{found.empty:,} with an empty text"] if found.empty else []
    print(f"{len(records):,} rows -> {output_path}" + "".join(f", {note}" for note in notes))


def _records(found: predictor.Predictions) -> list[dict[str, Any]]:
    records = []
    for i, label in enumerate(found.labels):
        record: dict[str, Any] = {"row": i + 1, "prediction": label}
        if found.probabilities is not None:
            for name, value in zip(found.label_names, found.probabilities[i], strict=True):
                record[f"probability_{name}"] = round(float(value), 6)
        records.append(record)
    return records


def _submission(
    task: str, spec: TaskSpec, table: splits.Table, labels: list[Any]
) -> list[dict[str, Any]]:
    """Rows of a file for GLUE's server: the index in the test file, and the answer by its name."""
    names = SUBMISSIONS[task]
    numbers = tuple(str(i) for i in range(len(names)))
    require(
        (spec.kind is TaskKind.REGRESSION) == (not names)
        and (set(spec.labels) <= set(names) or spec.labels == numbers),
        f"--glue={task}: its answers are {', '.join(names) or 'numbers'}; the model's are "
        f"{', '.join(spec.labels[:5]) or 'numbers'}",
    )
    if not names:
        answers = [f"{min(5.0, max(0.0, value)):.3f}" for value in labels]
    else:
        as_named = set(spec.labels) <= set(names)
        answers = labels if as_named else [names[int(label)] for label in labels]
    existing = table.rows.column_names
    column = next((name for name in ("index", "idx") if name in existing), "")
    index = list(table.rows[column] if column else range(len(labels)))
    for row, value in enumerate(index, 1):
        number = as_text(value).strip().isdecimal()
        require(number, f"{table.where}: row {row}, column {column}: {value!r} is not a number")
    return [
        {"index": int(i), "prediction": answer} for i, answer in zip(index, answers, strict=True)
    ]


def _table(records: list[dict[str, Any]], delimiter: str) -> str:
    if not delimiter:
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    text = io.StringIO()
    if delimiter == "\t":
        # Like the files we read: tabs and no quoting, so that rows stay lines.
        lines = [list(records[0])] + [list(record.values()) for record in records]
        return "".join("\t".join(_plain(cell) for cell in line) + "\n" for line in lines)
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _plain(cell: Any) -> str:
    return " ".join(as_text(cell).split()) if isinstance(cell, str) else str(cell)


def evaluate(checkpoint: str, split: str, input_path: str) -> None:
    """Prints losses and metrics of a checkpoint on a split of its experiment, or on a file."""
    require(checkpoint, "--checkpoint: give the --workdir of a finished training")
    gpt = predictor.load(checkpoint, argument="checkpoint")
    if gpt.task is not None:
        where, scores = _evaluate_task(gpt, split, input_path)
    else:
        where, scores = _evaluate_text(gpt, split, input_path)
    print(json.dumps(files_lib.json_ready({"checkpoint": gpt.path, "data": where, **scores})))


def evaluate_probes(checkpoint: str, configs: Mapping[str, schema.ProbeConfig] | None) -> None:
    """Prints the scores of zero-shot probes: those given, else those of the checkpoint's run."""
    require(checkpoint, "--checkpoint: give the --workdir of a finished pretraining")
    require(configs or configs is None, "--probes: the experiment of --config has no probes")
    for name, each in (configs or {}).items():
        validation.validate_probe(name, each)
    gpt = predictor.load(checkpoint, argument="checkpoint")
    if not configs:
        configs = gpt.meta.experiment_config().probes
    require(
        configs,
        f"--probes: {gpt.path} was trained without any; give --config=experiments/probes.py",
    )
    print(json.dumps(files_lib.json_ready({"checkpoint": gpt.path, "probes": gpt.probe(configs)})))


def _evaluate_task(
    gpt: predictor.LoadedGPT, split: str, input_path: str
) -> tuple[str, dict[str, float]]:
    assert gpt.task is not None
    experiment = gpt.meta.experiment_config()
    finetune = experiment.finetune
    assert finetune is not None
    if input_path:
        table = splits.without_label(_read_rows(gpt, input_path, labelled=True), finetune)
    else:
        _require_data(finetune.dataset or finetune.train_file, gpt)
        tables = splits.labelled_splits(finetune, experiment.seed)
        _require_split(split, tables)
        table = tables[split]
    rows = table.columns((*gpt.task.text_columns, gpt.task.label))
    return table.where, gpt.score(rows, table.where, finetune.metrics)


def _evaluate_text(
    gpt: predictor.LoadedGPT, split: str, input_path: str
) -> tuple[str, dict[str, float]]:
    pretrain = gpt.meta.experiment_config().pretrain
    assert pretrain is not None
    if input_path:
        texts = text_files.read_text(input_path, pretrain.line_breaks)["text"]
        return input_path, gpt.score_text(texts, pretrain.window)
    _require_data(pretrain.dataset or pretrain.train_files, gpt)
    tables = splits.text_splits(pretrain)
    _require_split(split, tables)
    return f"{split} split", gpt.score_text(tables[split]["text"], pretrain.window)


def _require_data(source: str, gpt: predictor.LoadedGPT) -> None:
    require(source, f"--checkpoint: {gpt.path} was imported, without data; give --input")


def _require_split(split: str, tables: dict[str, Any]) -> None:
    require(
        split in tables,
        f"--split={split}: must be one of {', '.join(tables)}{nearest(split, tables)}",
    )


def generate(
    checkpoint: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    num_samples: int,
    seed: int,
) -> None:
    """Prints texts that begin with the prompt."""
    require(checkpoint, "--checkpoint: give the --workdir of a finished training")
    gpt = predictor.load(checkpoint, argument="checkpoint")
    unknown = gpt.tokenizer.encode(prompt).count(gpt.tokenizer.unknown_id)
    if unknown:
        console.say(f"--prompt: {unknown} of its characters or words are not in the vocabulary")
    texts = gpt.generate(prompt, max_new_tokens, temperature, top_k, top_p, num_samples, seed)
    for i, text in enumerate(texts):
        if num_samples > 1:
            print(f"--- {i + 1} of {num_samples}")
        print(text)


def train_tokenizer(
    tokenizer_config: schema.TokenizerConfig, input_path: str, output_path: str
) -> None:
    """Trains a tokenizer on text files; writes `tokenizer.json` and the vocabulary/merges pair."""
    require(input_path, "--input: give the text files (comma-separated globs)")
    require(output_path, "--output: give the folder to write")
    require(
        tokenizer_config.vocab_size > 0,
        f"--config.tokenizer.vocab_size={tokenizer_config.vocab_size}: must be greater than 0",
    )
    require(
        tokenizer_config.kind in tuple(TokenizerKind),
        f"--config.tokenizer.kind={tokenizer_config.kind}: must be one of "
        f"{', '.join(TokenizerKind)}",
    )
    texts = text_files.read_text(input_path)["text"]
    tokenizer = tokenizer_lib.build(tokenizer_config, texts)
    with files_lib.disk_errors(output_path):
        os.makedirs(output_path, exist_ok=True)
    files = {"tokenizer.json": tokenizer.to_json()}
    pair = tokenizer_lib.pair_texts(tokenizer)
    if pair is not None:
        files["vocab.json"], files["merges.txt"] = pair
    for name, text in files.items():
        files_lib.write_atomically(os.path.join(output_path, name), text.encode())
    print(f"{len(tokenizer):,} tokens -> {output_path} ({', '.join(files)})")
    sys.stdout.flush()


def show_results(workdir: str, summary: Mapping[str, Any]) -> None:
    """Draws the plots of a finished training; prints its results and the commands to try next."""
    if not is_main():
        return
    plots.draw_plots(workdir)
    commands = [f"python launch.py --mode=generate --checkpoint={workdir} --prompt='The '"]
    if "finetune" in summary:
        commands.append(
            f"python launch.py --mode=predict --checkpoint={workdir} --input=ROWS.csv "
            "--output=predictions.csv"
        )
    baselines = (summary.get("finetune") or {}).get("floor", {})
    print(tables.results_table(summary, baselines, workdir, commands))
