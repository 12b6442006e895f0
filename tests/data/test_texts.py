"""Running text, the hub, holding out: nothing lost, nothing leaked, mistakes named in one line."""

import itertools
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import pytest
from refusals import fails, write

from gptjax.data.tables import texts as texts_lib
from gptjax.data.tables.files import load_hub, read_table
from gptjax.data.tables.labelled import LabelledTable, holdout
from gptjax.data.tables.texts import Texts, holdout_text, is_wrapped, read_text

PROSE = (
    "It was late in the afternoon when the two of them came down to the harbour, and the boats had "
    "all gone out but one, which lay on its side with a hole in it that a child could have crept "
    "through. The old man looked at it for a long time without a word; then he sat on a stone, "
    "took out his pipe, and began to tell me what had happened in the winter of the great storm. "
)


def wrapped(width, paragraphs=6):
    generator = random.Random(width)
    words = PROSE.split()
    texts = [" ".join(words[generator.randrange(20) :]) for _ in range(paragraphs)]
    return "\n\n".join("\n".join(textwrap.wrap(text, width)) for text in texts) + "\n", texts


def corpus(texts):
    return "".join(texts)


@pytest.mark.parametrize("width", [40, 60, 72, 100])
def test_wrapped_prose_is_recognised_and_joined(tmp_path, width):
    text, paragraphs = wrapped(width)
    assert is_wrapped(text.split("\n"))
    path = write(tmp_path / "book.txt", text)
    assert corpus(read_text(path)) == "".join(f"{each}\n" for each in paragraphs)
    assert corpus(read_text(path, "keep")) == text


def test_what_is_not_wrapped():
    verse = (
        "KING:\nNow is the winter of our\nDiscontent made glorious\nBy this sun of York;\n\n" * 5
    )
    sentences = "\n".join(each.strip().capitalize() for each in PROSE.replace(",", ".").split("."))
    lower = "\n".join(PROSE.lower()[i * 7 : i * 7 + 20 + 37 * i % 90] for i in range(30))
    code = Path(texts_lib.__file__).read_text(encoding="utf-8")
    one_line_paragraphs = (PROSE + "\n\n") * 5
    dna = ("ACGTTGCA" * 8 + "\n") * 40
    for text in (verse, sentences, lower, code, one_line_paragraphs, dna, "", "a\n", "\n\n"):
        assert not is_wrapped(text.split("\n")), text[:80]


def test_chapters_of_different_widths_are_wrapped():
    assert is_wrapped((wrapped(65, 12)[0] + "\n" + wrapped(75, 6)[0]).split("\n"))


def test_rows_concatenate_to_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(texts_lib, "PIECE_CHARACTERS", 200)
    generator = random.Random(0)
    words = ["a", "bé", "\u2028", "\x0c", "\r", "x" * 90, "🙂", "\n", "\n", "y" * 700, " "]
    text = " ".join(generator.choices(words, k=2000))
    path = write(tmp_path / "a.txt", "\ufeff" + text.replace("\n", "\r\n"))
    rows = list(read_text(path, "keep"))
    assert "".join(rows) == text
    assert max(map(len, rows)) <= 200
    assert all(row[-1] in " \n" or len(row) == 200 for row in rows[:-1])


def test_globs_are_sorted_and_each_file_is_read_once(tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    write(tmp_path / "b.txt", "B")
    write(tmp_path / "a[1].txt", "A\n")
    write(tmp_path / "sub" / "deep" / "c.txt", "C")
    os.symlink(tmp_path / "b.txt", tmp_path / "z.txt")
    patterns = f"{tmp_path}/**/*.txt, {tmp_path}/b.txt,{tmp_path}/a[1].txt"
    assert corpus(read_text(patterns)) == "A\nB\nC"


def test_documents_with_a_text_column(tmp_path):
    write(tmp_path / "a.jsonl", '{"text": "one\\ntwo"}\n{"text": null}\n{"text": "three"}\n')
    assert corpus(read_text(f"{tmp_path}/a.jsonl", "keep")) == "one\ntwo\n\n\n\nthree\n\n"
    path = write(tmp_path / "b.jsonl", '{"txt": "x"}\n')
    assert "did you mean 'txt'" in fails(read_text, path)


def test_text_mistakes(tmp_path):
    assert "no file matches" in fails(read_text, f"{tmp_path}/*.txt")
    assert "no text files" in fails(read_text, " , ")
    assert "**" in fails(read_text, str(tmp_path))
    empty = write(tmp_path / "book.txt", "\n \n")
    assert "no text in 1 file" in fails(read_text, empty)
    assert "did you mean 'book.txt'" in fails(read_text, str(tmp_path / "bok.txt"))
    bad = write(tmp_path / "bad.txt", b"good\n\n\xa4\n")
    message = fails(read_text, bad)
    assert f"{bad}, line 3: byte 0xa4" in message


def test_hub_loads_a_folder_and_names_the_splits(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    write(tmp_path / "set" / "test.jsonl", '{"text": "c"}\n')
    load = datasets.load_dataset

    def cached_here(*args, **kwargs):
        return load(*args, cache_dir=str(tmp_path / "cache"), **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", cached_here)
    assert load_hub(str(tmp_path / "set"), "train")["text"][:] == ["a", "b"]
    message = fails(load_hub, str(tmp_path / "set"), "tset")
    assert "no split 'tset'; did you mean 'test'?" in message
    assert "train, test" in message


def test_hub_spec_and_failures(monkeypatch):
    calls = []

    def load(*args, **kwargs):
        calls.append((args, kwargs))
        raise ConnectionError("Couldn't reach 'nyu-mll/glue'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = fails(load_hub, "nyu-mll/glue:mrpc", "train")
    assert calls == [(("nyu-mll/glue", "mrpc"), {"split": "train"})]
    assert "nyu-mll/glue:mrpc" in message
    assert "Couldn't reach" in message
    fails(load_hub, "owner/name", "train")
    assert calls[-1] == (("owner/name", None), {"split": "train"})


def test_holdout_is_deterministic_and_leaks_nothing():
    generator = random.Random(1)
    texts = [
        generator.choice(["A  cat", "a cat", "dog", "Straße", "STRASSE"]) + f" {i % 300}"
        for i in range(999)
    ]
    rows = datasets.Dataset.from_dict({"t": texts, "n": list(range(999))})
    table = LabelledTable(rows, "rows.csv")
    train, validation = holdout(table, ["t"], 0.1, seed=3)
    assert 100 <= len(validation.rows) <= 110
    assert sorted([*train.rows["n"], *validation.rows["n"]]) == list(range(999))
    for side in (train, validation):
        assert side.rows["n"][:] == sorted(side.rows["n"])
        assert [number - 1 for number in side.numbers] == side.rows["n"][:]
        assert (side.source, side.part_of) == ("rows.csv", "rows.csv")

    def plain(side):
        return {" ".join(text.casefold().split()) for text in side.rows["t"]}

    assert not plain(train) & plain(validation)
    again = holdout(table, ["t"], 0.1, seed=3)
    assert again[1].rows["n"][:] == validation.rows["n"][:]
    assert holdout(table, ["t"], 0.1, seed=4)[1].rows["n"][:] != validation.rows["n"][:]
    # The choice depends on the text alone, not on the order of the rows.
    backwards = holdout(table.select(range(998, -1, -1)), ["t"], 0.1, seed=3)
    assert sorted(backwards[1].rows["n"]) == validation.rows["n"][:]


def test_holdout_needs_two_different_texts():
    table = LabelledTable(datasets.Dataset.from_dict({"t": ["x", "X ", "x"]}), "a.csv")
    message = fails(holdout, table, ["t"], 0.5, 0)
    assert message.startswith("a.csv: cannot hold out 0.5 of 3 rows")
    assert "give a validation file" in message
    assert "cannot hold out 1 of 3 rows" in fails(holdout, table, ["t"], 1.0, 0)


@pytest.mark.parametrize("seed", range(10))
def test_holdout_text_cuts_at_a_line_break_close_by(seed):
    generator = random.Random(seed)
    text = "".join(generator.choices(["é", "b", "c ", "🙂", "\n"], [5, 5, 5, 1, 0.5], k=5000))
    cuts = [0, *sorted(generator.sample(range(len(text)), 9)), len(text)]
    rows = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
    train, validation = holdout_text(Texts.of(rows), 0.1)
    assert corpus(train) + corpus(validation) == text
    exact = int(0.9 * len(text))
    near = text.rfind("\n", 0, exact) + 1
    assert len(corpus(train)) == (near if near and near >= exact - len(text) // 100 else exact)


def test_holdout_text_without_line_breaks_is_exact():
    texts = Texts.of(["a" * 95, "b" * 5])
    train, validation = holdout_text(texts, 0.25)
    assert (len(corpus(train)), len(corpus(validation))) == (75, 25)
    assert len(corpus(holdout_text(texts, 0.05)[0])) == 95
    message = fails(holdout_text, Texts.of(["a"]), 0.5)
    assert "validation files" in message


def test_fingerprint_and_holdout_are_the_same_in_another_process(tmp_path):
    path = write(tmp_path / "a.csv", "t,n\n" + "".join(f"text {i},{i}\n" for i in range(50)))
    text = write(tmp_path / "a.txt", "One line.\nAnother.\n")
    code = (
        "import sys; from gptjax.data.tables.files import *;"
        "from gptjax.data.tables.labelled import *; from gptjax.data.tables.texts import *;"
        "table = LabelledTable(read_table(sys.argv[1]), 'rows');"
        "print(read_text(sys.argv[1].replace('csv', 'txt')).fingerprint);"
        "print(*holdout(table, ['t'], 0.2, 7)[1].rows['n'])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    run = [sys.executable, "-c", code, path]
    out = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    table = LabelledTable(read_table(path), "rows")
    held_out = holdout(table, ["t"], 0.2, 7)[1].rows["n"]
    assert out.stdout.split() == [read_text(text).fingerprint, *held_out]
    assert out.stderr == ""


def test_import_does_not_pull_in_datasets():
    code = "from gptjax.data.tables import texts; import gptjax.data.builtin.tasks, sys; "
    code += "print('datasets' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
