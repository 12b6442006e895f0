"""The modes that read a trained model or write a tokenizer, and the trace of `bench`."""

import csv
import itertools
import json
import math
import os
import pathlib
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import runs
from sklearn import metrics as sk

import gptjax
from gptjax.data.tokens import tokenizer

COUNT = 1000


def predict(input_path, output_path) -> runs.Result:
    return runs.main(
        "--mode=predict", f"--checkpoint={runs.trained()}", f"--input={input_path}",
        f"--output={output_path}",
    )  # fmt: skip


def read(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of an output file as another program would read them."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{name: str(value) for name, value in row.items()} for row in rows]
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """(folder, texts, output rows): rows of all lengths, some empty, some far too long."""
    folder = tmp_path_factory.mktemp("predict")
    rng = random.Random(0)
    texts = []
    for i, row in enumerate(runs.rows(COUNT, 9)):
        texts.append("" if i % 50 == 0 else " ".join([row["text"]] * rng.choice((1, 1, 1, 2, 9))))
    runs.write(folder / "in.csv", [{"id": i, "text": text} for i, text in enumerate(texts)])
    result = predict(folder / "in.csv", folder / "out.csv")
    assert result.code == 0, result.err
    assert f"{COUNT:,} rows -> {folder}/out.csv" in result.out
    assert "20 with an empty text" in result.out
    assert "cut to fit 16 tokens" in result.out
    return folder, texts, read(folder / "out.csv")


def probabilities(rows) -> np.ndarray:
    return np.array([[float(row[f"probability_{name}"]) for name in ("no", "yes")] for row in rows])


def test_one_output_row_for_each_input_row(thousand):
    _, _, rows = thousand
    assert list(rows[0]) == ["row", "prediction", "probability_no", "probability_yes"]
    assert [row["row"] for row in rows] == [str(i + 1) for i in range(COUNT)]
    values = probabilities(rows)
    np.testing.assert_allclose(values.sum(axis=1), 1, atol=2e-6)
    assert [row["prediction"] for row in rows] == [("no", "yes")[i] for i in values.argmax(axis=1)]
    assert len(set(values[:, 0])) > 20


def test_the_rows_are_in_order(thousand):
    folder, texts, rows = thousand
    order = list(range(COUNT))
    random.Random(1).shuffle(order)
    shuffled = folder / "shuffled.jsonl"
    shuffled.write_text("".join(json.dumps({"text": texts[i]}) + "\n" for i in order))
    for ending in ("tsv", "jsonl"):
        output = folder / f"shuffled_out.{ending}"
        assert predict(shuffled, output).code == 0
        np.testing.assert_allclose(
            probabilities(read(output)), probabilities(rows)[order], atol=1e-5
        )


def test_a_row_alone_is_answered_the_same(thousand):
    folder, texts, rows = thousand
    for i in (0, 7, 50, 999):
        runs.write(folder / "one.csv", [{"text": texts[i], "label": "yes"}])
        assert predict(folder / "one.csv", folder / "one_out.csv").code == 0
        found = read(folder / "one_out.csv")
        assert len(found) == 1
        np.testing.assert_allclose(probabilities(found), probabilities(rows)[i : i + 1], atol=1e-5)


def test_an_output_that_cannot_be_written_is_one_line():
    assert "cannot write /proc/out.csv" in predict(runs.files().test, "/proc/out.csv").error


def test_a_missing_input_beside_an_old_output_is_one_line(tmp_path):
    output = tmp_path / "out.csv"
    output.write_text("an earlier run's")
    assert "typo.csv: no such file" in predict(str(tmp_path / "typo.csv"), str(output)).error
    assert output.read_text() == "an earlier run's"


def evaluate(*flags) -> dict:
    result = runs.main("--mode=evaluate", f"--checkpoint={runs.trained()}", *flags)
    assert result.code == 0, result.err
    return json.loads(result.out.splitlines()[-1])


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluate_scores_what_predict_writes(tmp_path, split):
    path = getattr(runs.files(), split)
    assert predict(path, tmp_path / "out.csv").code == 0
    found = [row["prediction"] for row in read(tmp_path / "out.csv")]
    labels = [row["label"] for row in read(pathlib.Path(path))]
    accuracy = sk.accuracy_score(labels, found)
    of_split, of_file = evaluate(f"--split={split}"), evaluate(f"--input={path}")
    assert of_split["accuracy"] == of_file["accuracy"] == pytest.approx(accuracy)
    assert of_split["floor_accuracy"] == pytest.approx(
        max(labels.count("no"), labels.count("yes")) / len(labels)
    )
    values = probabilities(read(tmp_path / "out.csv"))
    assert of_split["calibrated_task_loss"] == pytest.approx(
        sk.log_loss(labels, values / values.sum(axis=1, keepdims=True)), abs=1e-4
    )
    assert {of_split["data"], of_file["data"]} == {path}
    kept = runs.summary(runs.trained())["finetune"][split]
    assert of_split["accuracy"] == kept["accuracy"]
    for name in ("lm_loss", "task_loss", "calibrated_task_loss"):
        assert of_split[name] == pytest.approx(kept[name], rel=1e-5)


@pytest.mark.slow
def test_a_model_of_windows_predicts_as_it_was_validated(tmp_path):
    """Three windows are read, some texts have more; then export says what it lacks."""
    table = [
        {"text": " ".join([row["text"]] * (1, 3, 6, 12)[i % 4]), "label": row["label"]}
        for i, row in enumerate(runs.rows(24, 3))
    ]
    path, workdir = runs.write(tmp_path / "long.csv", table), f"{tmp_path}/w"
    trained = runs.main(
        "--config=experiments/finetune_file.py", *runs.TINY,
        f"--config.finetune.train_file={path}", f"--config.finetune.validation_file={path}",
        "--config.finetune.long=windows", "--config.finetune.max_windows=3",
        "--config.finetune.head=mean", "--config.finetune.lm_weight=0.5",
        "--config.finetune.baseline=none", "--config.finetune.steps=4",
        "--config.finetune.batch_size=8", f"--workdir={workdir}",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    # The notes, counted here from the model's own tokens: 14 tokens of a text are in a window.
    gpt = gptjax.load(workdir)
    lengths = [len(gpt.tokenizer.encode(row["text"])) for row in table]
    share = sum(min(length, 3 * 14) for length in lengths) / sum(lengths)
    several, cut = (sum(length > 14 * n for length in lengths) for n in (1, 3))
    assert 0 < cut < several < 24
    note = (
        f"{several} in windows of 16 tokens, up to 3 a text, {cut} cut to fit 3 windows, "
        f"{math.floor(1000 * share) / 10:.1f}% of the tokens are read"
    )
    assert f" unknown tokens, {note}\n" in trained.out
    common = (f"--checkpoint={workdir}", f"--input={path}")
    predicted = runs.main("--mode=predict", *common, f"--output={tmp_path}/out.csv")
    assert note in predicted.out
    kept = runs.summary(workdir)["finetune"]["validation"]
    evaluated = json.loads(runs.main("--mode=evaluate", *common).out.splitlines()[-1])
    assert evaluated["read_tokens"] == pytest.approx(share)
    for name in ("accuracy", "task_loss", "lm_loss"):
        assert evaluated[name] == pytest.approx(kept[name], rel=1e-5)
    values = probabilities(read(tmp_path / "out.csv"))
    labels = [row["label"] for row in table]
    loss = sk.log_loss(labels, values / values.sum(axis=1, keepdims=True))
    assert kept["calibrated_task_loss"] == pytest.approx(loss, abs=1e-4)
    assert len(values) == 24
    made = runs.main(
        "--mode=export", f"--input={workdir}", f"--output={tmp_path}/x", "--format=openai"
    )
    assert "texts of at most 14 tokens" in made.out
    assert "only gptjax has a task head that reads the mean state" in made.out


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """(folder, flags): a model whose validation rows were held out of the training file."""
    folder = tmp_path_factory.mktemp("held_out")
    runs.write(folder / "train.csv", runs.rows(60, 1))
    runs.write(folder / "text.txt", "".join(f"{line}\n" for line in runs.sentences(80)))
    flags = [
        flag
        for flag in (*runs.files().pretrain, *runs.files().finetune)
        if not re.search(r"(train|validation|test)_files?=|warmup_steps=", flag)
    ]
    flags += [
        f"--config.finetune.train_file={folder}/train.csv", "--config.finetune.steps=2",
        f"--config.pretrain.train_files={folder}/text.txt", "--config.pretrain.steps=2",
        f"--workdir={folder}/run",
    ]  # fmt: skip
    result = runs.main(*runs.TINY, *flags)
    assert result.code == 0, result.err
    return folder


@pytest.mark.parametrize(
    ("stage", "name", "more"),
    [
        ("finetune", "train.csv", "".join(f"one more row {i},yes\n" for i in range(40))),
        ("pretrain", "text.txt", "One more line that was not there.\n"),
    ],
)
def test_held_out_rows_of_a_file_that_has_changed_are_not_scored(held_out, stage, name, more):
    """Rows that were trained on would be held out now."""
    flags = ["--mode=evaluate", f"--checkpoint={held_out}/run/checkpoints/{stage}"]
    kept = runs.summary(f"{held_out}/run")[stage]
    before = runs.main(*flags, "--split=validation")
    assert before.code == 0, before.err
    loss = kept.get("validation_loss") or kept["validation"]["task_loss"]
    found = json.loads(before.out.splitlines()[-1])
    assert (found.get("task_loss") or found["loss"]) == pytest.approx(loss, rel=1e-5)
    path = held_out / name
    text = path.read_text()
    path.write_text(text + more)
    after = runs.main(*flags, "--split=validation")
    assert (after.code, after.out) == (2, "")
    assert after.error.startswith(f"error: --split=validation: {path} is not what the model was")
    assert runs.main(*flags, f"--input={path}").code == 0
    path.write_text(text)


def test_evaluate_and_predict_warn_of_unknown_tokens(tmp_path):
    rows = [{"text": "\u6f22\u5b57 \u4eee\u540d", "label": "yes"}]
    path = runs.write(tmp_path / "in.csv", rows)
    warning = f"warning: 100% of the tokens of {path} are unknown to the tokenizer"
    found = predict(path, tmp_path / "out.csv")
    assert "100.00% unknown tokens" in found.out
    assert warning in found.err
    flags = ("--mode=evaluate", f"--checkpoint={runs.trained()}", f"--input={path}")
    assert warning in runs.main(*flags).err
    known = runs.write(tmp_path / "known.csv", [{"text": "the cat", "label": "yes"}])
    assert predict(known, tmp_path / "out.csv").err == ""


def test_evaluate_a_language_model(tmp_path):
    stage = f"--checkpoint={runs.trained()}/checkpoints/pretrain"
    of_split = evaluate(stage)
    kept = runs.summary(runs.trained())["pretrain"]
    assert of_split["loss"] == pytest.approx(kept["validation_loss"], rel=1e-5)
    assert of_split["perplexity"] == pytest.approx(np.exp(of_split["loss"]))
    of_file = evaluate(stage, f"--input={runs.files().text}")
    assert 0 < of_file["loss"] < np.log(96)
    text = runs.write(tmp_path / "noise.txt", "zz qq xx " * 50)
    assert evaluate(stage, f"--input={text}")["loss"] > of_file["loss"]


def generate(*flags) -> list[str]:
    result = runs.main("--mode=generate", f"--checkpoint={runs.trained()}", *flags)
    assert result.code == 0, result.err
    return result.out.splitlines()


def test_generate_prints_texts_that_begin_with_the_prompt():
    flags = ("--prompt=The cat", "--max_new_tokens=10", "--num_samples=3", "--seed=5")
    lines = generate(*flags)
    assert generate(*flags) == lines
    assert generate(*flags[:-1], "--seed=6") != lines
    assert [line for line in lines if line.startswith("--- ")] == [
        f"--- {i} of 3" for i in (1, 2, 3)
    ]
    starts = [after for line, after in itertools.pairwise(lines) if line[:4] == "--- "]
    assert all(text.split()[:2] == ["the", "cat"] for text in starts)
    assert generate("--prompt=", "--max_new_tokens=3", "--temperature=0")


def test_what_the_vocabulary_lacks_is_said():
    flags = ("--mode=generate", f"--checkpoint={runs.trained()}", "--max_new_tokens=1")
    said = "of its characters or words are not in the vocabulary"
    assert said in runs.main(*flags, "--prompt=the 漢 cat").err
    assert said not in runs.main(*flags, "--prompt=the cat").err


@pytest.mark.parametrize("kind", ["bpe", "character"])
def test_tokenizer_writes_what_loads(tmp_path, kind):
    output = tmp_path / "made" / "here"
    result = runs.main(
        "--mode=tokenizer", f"--input={runs.files().text}", f"--output={output}",
        f"--config.tokenizer.kind={kind}", "--config.tokenizer.vocab_size=90",
    )  # fmt: skip
    assert result.code == 0, result.err
    loaded = tokenizer.load(output / "tokenizer.json")
    ids = loaded.encode("the old man")
    if kind == "character":
        assert sorted(os.listdir(output)) == ["tokenizer.json"]
        assert len(ids) == len("the old man")
        return
    assert sorted(os.listdir(output)) == ["merges.txt", "tokenizer.json", "vocab.json"]
    pair = tokenizer.load_gpt1(str(output / "vocab.json"), str(output / "merges.txt"))
    assert pair.encode("the old man") == ids
    assert len(loaded) == 90 + 4
    # A training uses the file as it is.
    done = runs.main(
        *runs.TINY, *runs.files().pretrain, "--config.finetune=none",
        f"--workdir={tmp_path}/w", f"--config.tokenizer.file={output}/tokenizer.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert tokenizer.load(tmp_path / "w" / "tokenizer.json").hash == loaded.hash


def test_a_damaged_best_checkpoint_is_one_line(tmp_path):
    workdir = runs.copy(tmp_path)
    scores = {
        record["step"]: record["accuracy"]
        for record in runs.records(workdir)
        if record["stage"] == "finetune" and record["split"] == "validation"
    }
    best = max(scores, key=lambda step: (scores[step], step))
    step = pathlib.Path(workdir, "checkpoints", "finetune", str(best))
    files = [path for path in step.glob("params/**/d/*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    flags = ["--mode=predict", f"--checkpoint={workdir}", f"--input={runs.files().test}"]
    flags.append(f"--output={tmp_path}/out.csv")
    # In a process of its own, whose output includes whatever Orbax prints.
    process = runs.start(*flags)
    out, err = process.communicate(timeout=200)
    error = runs.Result(process.returncode, out, err).error
    assert f"{step}: is damaged" in error
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("flags", ["--help", "--helpfull"])
def test_output_into_a_closed_pipe_is_no_traceback(flags):
    command = f"{sys.executable} {runs.LAUNCH} {flags} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_bench_traces_more_steps_beside_its_report(tmp_path):
    flags = ["bench", *runs.TINY, "--steps=1", f"--output={tmp_path}/report.json"]
    result = runs.main(*flags, "--profile=2")
    assert result.code == 0, result.err
    assert f"trace of 2 steps -> {tmp_path}/profile" in result.err
    (trace,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == 1
    assert "`" not in runs.main(*flags, "--profile=2", "--bench=input").error
    assert "--profile=-1" in runs.main(*flags, "--profile=-1").error
