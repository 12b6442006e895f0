"""Wrong input ends the program with exit code 2 and one line that names the place, without a trace.

Other tests train on input that is odd and yet valid.
"""

import json
import os
import pathlib
import subprocess

import pytest
import runs

from gptjax.data.tables import files as files_lib
from gptjax.data.tokens import tokenizer

ROWS = runs.rows(24)


def pretrain(workdir, text, *more) -> runs.Result:
    return runs.main(
        *runs.TINY, *runs.files().pretrain, "--config.finetune=none",
        f"--config.pretrain.train_files={text}", f"--workdir={workdir}", *more,
    )  # fmt: skip


def finetune(workdir, train, *more) -> runs.Result:
    return runs.main(
        *runs.TINY, *runs.files().finetune, "--config.pretrain=none",
        "--config.finetune.test_file=", "--config.finetune.validation_file=",
        f"--config.finetune.train_file={train}", f"--workdir={workdir}", *more,
    )  # fmt: skip


def bad_row(**changes) -> list[dict[str, str]]:
    return [*ROWS[:3], {**ROWS[3], **changes}, *ROWS[4:]]


PAIRS = [{"a": row["text"], "b": "x", "label": str(i / 7)} for i, row in enumerate(ROWS)]
CHOICES = [{**pair, "label": str(i % 2)} for i, pair in enumerate(PAIRS)]
REGRESSION = ("task=regression", "text=a", "text_pair=b")
MULTIPLE = ("task=multiple_choice", "text=a", "choices=a,b")

BAD_FILES = {
    "empty": (b"", (), ["train.csv", "empty"]),
    "header only": (b"text,label\n", (), ["train.csv", "no rows"]),
    "one class": (
        [{**row, "label": "yes"} for row in ROWS], (), ["train.csv", "column label", "'yes'"],
    ),
    "empty label": (bad_row(label=""), (), ["train.csv", "row 4", "column label", "empty"]),
    "bad byte": (
        b"text,label\na,yes\nb \xff,no\n", (), ["train.csv, line 3", "0xff", "UTF-8"],
    ),
    "utf-16": ("text,label\na,b\n".encode("utf-16"), (), ["line 1", "UTF-16"]),
    "unknown column": (ROWS, ("text=txet",), ["no column 'txet'", "'text'"]),
    "unknown label column": (ROWS, ("label=lable",), ["no column 'lable'", "'label'"]),
    "ragged": (b"text,label\na,b,c\n", (), ["train.csv, line 2", "cells"]),
    "not a number": (
        [{**row, "label": "high"} if i == 5 else row for i, row in enumerate(PAIRS)], REGRESSION,
        ["row 6", "column label", "'high' is not a number"],
    ),
    "a nan target": (
        [{**row, "label": "nan"} if i == 5 else row for i, row in enumerate(PAIRS)], REGRESSION,
        ["row 6", "'nan' is not a number"],
    ),
    "not answers": (
        [{**row, "label": "7"} if i == 5 else row for i, row in enumerate(CHOICES)], MULTIPLE,
        ["column label", "7", "0 to 1"],
    ),
    "one row": (ROWS[:1], (), ["train.csv"]),
    "one text": ([ROWS[0], {**ROWS[0], "label": "other"}], (), ["validation"]),
    "no such task": (ROWS, ("task=clasification",), ["task=clasification", "classification"]),
    "no pair": (ROWS, ("task=entailment",), ["text_pair"]),
    "unknown metric": (ROWS, ("metrics=acuracy",), ["acuracy", "accuracy"]),
    "late warm-up": (ROWS, ("optimizer.warmup_steps=40",), ["warmup_steps=40", "40 steps"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_training_file_is_one_line(tmp_path, case):
    data, flags, words = BAD_FILES[case]
    path = runs.write(tmp_path / "train.csv", data)
    result = finetune(tmp_path / "w", path, *(f"--config.finetune.{flag}" for flag in flags))
    for word in words:
        assert word in result.error
    assert sorted(os.listdir(tmp_path)) == ["train.csv"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_label_unseen_in_training_is_one_line(tmp_path, split):
    path = runs.write(tmp_path / "other.csv", bad_row(label="yess"))
    result = finetune(tmp_path / "w", runs.files().train, f"--config.finetune.{split}_file={path}")
    assert f"{path}: row 4, column label: label 'yess'" in result.error
    assert "did you mean 'yes'?" in result.error
    assert not (tmp_path / "w").exists()


def test_a_missing_file_is_one_line_with_the_nearest(tmp_path):
    runs.write(tmp_path / "train.csv", ROWS)
    error = finetune(tmp_path / "w", tmp_path / "trian.csv").error
    assert f"{tmp_path}/trian.csv: no such file" in error
    assert "did you mean 'train.csv'?" in error
    error = pretrain(tmp_path / "w", f"{tmp_path}/*.txt").error
    assert f"{tmp_path}/*.txt: no file matches" in error
    assert not (tmp_path / "w").exists()


BAD_TEXTS = {
    "empty": (b"", ["t.txt", "no text"]),
    "blank": (b"\n \n", ["t.txt", "no text"]),
    "bad byte": (b"one\ntwo \xe9\n", ["t.txt, line 2", "0xe9"]),
    "short": (b"one word", ["--config.pretrain"]),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_bad_text_is_one_line(tmp_path, case):
    data, words = BAD_TEXTS[case]
    result = pretrain(tmp_path / "w", runs.write(tmp_path / "t.txt", data))
    for word in words:
        assert word in result.error
    assert not (tmp_path / "w").exists()


WRONG_USE = {
    "field": (["--config.pretrain.batchsize=3"], ["did you mean 'pretrain.batch_size'?"]),
    "type": (["--config.pretrain.steps=many"], ["--config.pretrain.steps=many"]),
    "float for int": (["--config.pretrain.steps=1.5"], ["--config.pretrain.steps=1.5"]),
    "flag": (["--wrokdir=x"], ["wrokdir"]),
    "mode": (["--mode=trian"], ["--mode=trian", "did you mean 'train'?"]),
    "far mode": (["--mode=zzz"], ["--mode=zzz", "the modes are train, evaluate, predict"]),
    "positional": (["train"], ["train: unexpected argument"]),
    "experiment": (
        ["--config=experiments/quikstart.py"], ["no such file", "did you mean 'quickstart'?"],
    ),
    "far experiment": (["--config=zzz"], ["no such file", "quickstart, shakespeare_char"]),
    "batch": (["--config.pretrain.batch_size=12"], ["pretrain.batch_size=12", "multiple of 8"]),
    "mesh": (["--config.mesh.data=3"], ["--config.mesh", "8"]),
    "heads": (["--config.model.num_heads=3"], ["--config.model.num_heads=3", "width=16"]),
    "vocabulary": (["--config.model.vocab_size=10"], ["--config.model.vocab_size=10"]),
    "warm-up": (
        ["--config.pretrain.optimizer.warmup_steps=20"],
        ["--config.pretrain.optimizer.warmup_steps=20", "below the 20 steps"],
    ),
    "init_from": (
        ["--config.init_from=nowhere"], ["--config.init_from=nowhere", "no checkpoint there"],
    ),
    "tokenizer": (["--config.tokenizer.file=no.json"], ["no.json", "No such file"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_USE)
@pytest.mark.usefixtures("eight_devices")
def test_wrong_use_is_one_line(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    flags, words = WRONG_USE[case]
    result = runs.main(
        *runs.TINY, *runs.files().pretrain, "--config.finetune=none", "--workdir=w", *flags
    )
    for word in words:
        assert word in result.error
    assert os.listdir(tmp_path) == []


def test_no_stage_is_one_line():
    assert "no stage" in runs.main("--config.pretrain=none", "--config.finetune=none").error


WRONG_MODES = {
    "no checkpoint": (["--mode=predict"], ["--checkpoint"]),
    "nothing there": (
        ["--mode=predict", "--checkpoint=nowhere", "--input=IN", "--output=o.csv"],
        ["--checkpoint=nowhere", "no checkpoint"],
    ),
    "no input": (["--mode=predict", "--checkpoint=DIR", "--output=o.csv"], ["--input"]),
    "no output": (["--mode=predict", "--checkpoint=DIR", "--input=IN"], ["--output"]),
    "ending": (
        ["--mode=predict", "--checkpoint=DIR", "--input=IN", "--output=o.xls"],
        ["--output=o.xls", ".csv, .tsv, .jsonl"],
    ),
    "column": (
        ["--mode=predict", "--checkpoint=DIR", "--input=OTHER", "--output=o.csv"],
        ["other.csv", "no column 'text'", "'texts'"],
    ),
    "missing input": (
        ["--mode=predict", "--checkpoint=DIR", "--input=no.csv", "--output=o.csv"],
        ["no.csv", "no such file"],
    ),
    "a language model": (
        ["--mode=predict", "--checkpoint=DIR/checkpoints/pretrain", "--input=IN",
         "--output=o.csv"],
        ["not fine-tuned"],
    ),
    "split": (["--mode=evaluate", "--checkpoint=DIR", "--split=tset"], ["--split=tset", "test"]),
    "unlabelled": (
        ["--mode=evaluate", "--checkpoint=DIR", "--input=UNLABELLED"], ["no column 'label'"],
    ),
    "generate": (["--mode=generate"], ["--checkpoint"]),
    "temperature": (["--mode=generate", "--checkpoint=DIR", "--temperature=-1"], ["temperature"]),
    "top_p": (["--mode=generate", "--checkpoint=DIR", "--top_p=2"], ["--top_p=2"]),
    "samples": (["--mode=generate", "--checkpoint=DIR", "--num_samples=0"], ["--num_samples=0"]),
    "tokenizer input": (["--mode=tokenizer", "--output=t"], ["--input"]),
    "tokenizer output": (["--mode=tokenizer", "--input=IN"], ["--output"]),
    "tokenizer size": (
        ["--mode=tokenizer", "--input=IN", "--output=t", "--config.tokenizer.vocab_size=0"],
        ["--config.tokenizer.vocab_size=0"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_MODES)
def test_wrong_use_of_a_model_is_one_line(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    runs.write(tmp_path / "other.csv", [{"texts": "a", "label": "yes"}])
    runs.write(tmp_path / "unlabelled.csv", [{"text": "a", "other": "b"}])
    before = runs.snapshot(tmp_path)
    flags, words = WRONG_MODES[case]
    places = {"DIR": runs.trained(), "OTHER": "other.csv", "UNLABELLED": "unlabelled.csv"}
    places["IN"] = runs.files().test
    for name, place in places.items():
        flags = [flag.replace(f"={name}", f"={place}") for flag in flags]
    result = runs.main(*flags)
    for word in words:
        assert word in result.error
    assert runs.snapshot(tmp_path) == before


CHANGES = {
    "tokenizer": "another tokenizer",
    "training data": "another training data",
    "configuration": "model.width: 16 -> 32",
    "task": "finetune.task",
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_workdir_of_something_else_is_refused_and_untouched(tmp_path, what):
    files, workdir, more = runs.files(), runs.copy(tmp_path), []
    if what == "tokenizer":
        other = tokenizer.train_bpe(["some other text " * 3], 40)
        other.save(os.path.join(workdir, "tokenizer.json"))
    if what == "configuration":
        more = ["--config.model.width=32"]
    if what == "task":
        more = ["--config.finetune.task=entailment", "--config.finetune.text_pair=text"]
    before = runs.snapshot(workdir)
    train = pathlib.Path(files.train)
    original = train.read_bytes()
    if what == "training data":
        train.write_bytes(original.replace(b"good", b"bad", 1))
    try:
        flags = [*runs.TINY, *files.pretrain, *files.finetune]
        result = runs.main(*flags, f"--workdir={workdir}", *more)
    finally:
        train.write_bytes(original)
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert (result.code, len(lines), "Traceback" in result.err) == (2, 1, False), result.err
    assert CHANGES[what] in lines[0]
    after = runs.snapshot(workdir)
    assert {name: after.get(name) for name in before if "tensorboard" not in name} == {
        name: data for name, data in before.items() if "tensorboard" not in name
    }


def test_the_workdir_is_a_file(tmp_path):
    path = runs.write(tmp_path / "w", b"something of mine")
    assert f"{path}" in pretrain(path, runs.files().text).error
    assert (tmp_path / "w").read_bytes() == b"something of mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_workdir(tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert "Permission denied" in pretrain(tmp_path / "w", runs.files().text).error
    finally:
        tmp_path.chmod(0o700)


def test_a_workdir_that_cannot_be_made():
    assert "cannot write /proc/w" in pretrain("/proc/w", runs.files().text).error


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 KiB; the test is skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_run_continues_after(small_disk):
    workdir = small_disk / "w"
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 150_000)
    full = pretrain(workdir, runs.files().text, "--config.pretrain.save_every=2")
    lines = full.err.splitlines()
    assert full.code == 2, full.err
    assert lines[-1].startswith("error: ")
    assert "space" in lines[-1]
    assert "Traceback" not in full.err
    kept = runs.steps(str(workdir), "pretrain")
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    done = pretrain(workdir, runs.files().text, "--config.pretrain.save_every=2")
    assert done.code == 0, done.err
    if kept:
        assert f"continuing at step {kept[-1]} of 20" in done.out
    expected = runs.arrays(runs.trained(), "pretrain", 20)
    assert runs.arrays(str(workdir), "pretrain", 20) == expected


@pytest.mark.slow
def test_a_full_disk_is_nothing_but_one_line(small_disk):
    (small_disk / "filler").write_bytes(b"x" * 150_000)
    process = runs.start(
        *runs.TINY, *runs.files().pretrain, "--config.finetune=none",
        f"--workdir={small_disk}/w", "--config.pretrain.save_every=2",
    )  # fmt: skip
    _, err = process.communicate(timeout=200)
    lines = [line for line in err.splitlines() if not line.startswith("pretrain ")]
    assert (process.returncode, len(lines)) == (2, 1), err
    assert lines[0].startswith(f"error: cannot write {small_disk}/w")
    assert "no space left" in lines[0].lower()


ODD_TEXT = "\U0001f642 \u4f60\u597d \u0627\u0644 e\u0301 \u200b \u2028 \ufeff"


def csv(texts: list[str], end: str = "\n") -> bytes:
    lines = [f"{text},{row['label']}" for text, row in zip(texts, ROWS, strict=True)]
    return "".join(line + end for line in ["text,label", *lines]).encode()


TEXTS = [row["text"] for row in ROWS]
ODD = {
    "crlf and byte order mark": b"\xef\xbb\xbf" + csv(TEXTS, "\r\n"),
    "odd unicode": csv([f"{text} {ODD_TEXT}" for text in TEXTS]),
    "empty texts": csv(["" if i % 4 == 0 else text for i, text in enumerate(TEXTS)]),
    "a million characters": csv(["many words " * 91_000] + ["words"] * 23),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ODD)
def test_odd_input_trains(tmp_path, case):
    path = runs.write(tmp_path / "train.csv", ODD[case])
    result = finetune(tmp_path / "w", path, f"--config.finetune.validation_file={path}")
    assert result.code == 0, result.err
    assert f"{len(ROWS)} train examples" in result.out
    if case == "empty texts":
        assert "6 with an empty text" in result.out
        assert files_lib.read_table(path).num_rows == 24
    if case == "a million characters":
        assert "1 cut to fit 16 tokens" in result.out
    tokens = json.loads((tmp_path / "w" / "tokenizer.json").read_text())["model"]["vocab"]
    assert not any("\ufeff" in token or "\r" in token for token in tokens)


@pytest.mark.slow
def test_one_step_with_a_batch_larger_than_the_data(tmp_path):
    path = runs.write(tmp_path / "train.csv", ROWS[:6])
    more = (f"--config.finetune.validation_file={path}", "--config.finetune.steps=1")
    result = finetune(tmp_path / "w", path, *more, "--config.finetune.batch_size=64")
    assert result.code == 0, result.err
    assert runs.summary(str(tmp_path / "w"))["finetune"]["steps"] == 1
    assert runs.steps(str(tmp_path / "w"), "finetune") == [1]
