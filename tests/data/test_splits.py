"""Splits: where the configuration says they come from."""

import datasets
import pytest
from refusals import fails

from gptjax.config.schema import FinetuneConfig, PretrainConfig
from gptjax.data import splits
from gptjax.data.builtin import tasks


def write(path, lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def rows(table, *names):
    values = table.columns(names)
    return list(zip(*(values[name] for name in names), strict=True))


@pytest.fixture
def files(tmp_path):
    """Three files of labelled rows, of different formats."""
    train = [("text", "label"), *((f"train {i}", str(i % 2)) for i in range(40))]
    valid = [("label", "text"), *((str(i % 2), f"valid {i}") for i in range(5))]
    return {
        "train_file": write(tmp_path / "train.csv", [",".join(row) for row in train]),
        "validation_file": write(tmp_path / "valid.tsv", ["\t".join(row) for row in valid]),
        "test_file": write(tmp_path / "test.jsonl", ['{"text": "test", "label": 1, "more": 0}']),
    }


def test_files_are_the_splits(files):
    tables = splits.labelled_splits(FinetuneConfig(**files), seed=0)
    assert list(tables) == ["train", "validation", "test"]
    assert rows(tables["train"], "text", "label") == [(f"train {i}", str(i % 2)) for i in range(40)]
    assert rows(tables["validation"], "text", "label")[4] == ("valid 4", "0")
    assert rows(tables["test"], "text", "label") == [("test", 1)]
    assert [table.source for table in tables.values()] == list(files.values())


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_without_a_validation_file_a_part_of_train_is_held_out(files, fraction):
    config = FinetuneConfig(train_file=files["train_file"], validation_fraction=fraction)
    tables = splits.labelled_splits(config, seed=0)
    assert list(tables) == ["train", "validation"]
    train, held = (rows(tables[name], "text", "label") for name in ("train", "validation"))
    assert len(held) == round(40 * fraction)
    assert sorted(train + held) == sorted((f"train {i}", str(i % 2)) for i in range(40))
    for name, texts in (("train", train), ("validation", held)):
        # The numbers are those of the file, whose row i holds "train i - 1".
        assert tables[name].source == files["train_file"]
        assert [f"train {i - 1}" for i in tables[name].numbers] == [text for text, _ in texts]
    again = splits.labelled_splits(config, seed=0)
    assert rows(again["validation"], "text", "label") == held
    other = splits.labelled_splits(config, seed=1)
    assert rows(other["validation"], "text", "label") != held
    config.validation_fraction = 0.0
    assert "`finetune.validation_fraction`" in fails(splits.labelled_splits, config, 0)


def test_equal_texts_stay_on_one_side(tmp_path):
    lines = ["text,text_pair,label", *(f"text {i % 9},pair {i % 3},{i % 2}" for i in range(90))]
    config = FinetuneConfig(
        train_file=write(tmp_path / "pairs.csv", lines), task="entailment", text_pair="text_pair",
        validation_fraction=0.3,
    )  # fmt: skip
    tables = splits.labelled_splits(config, seed=0)
    train, held = ({row[:2] for row in rows(tables[n], "text", "text_pair")} for n in tables)
    assert not train & held
    assert len(train | held) == 9


def test_a_file_without_a_header(tmp_path):
    path = write(tmp_path / "rows.tsv", ["1\tgood", "0\tbad"])
    table = splits.read_labelled(path, "stars, review", ("review", "stars"))
    assert rows(table, "review", "stars") == [("good", "1"), ("bad", "0")]
    message = fails(splits.read_labelled, path, "stars,review", ("text", "stars"))
    assert path in message
    assert "text" in message


@pytest.mark.parametrize("name", ["train_file", "validation_file", "test_file"])
def test_a_missing_column_or_file_is_named(files, tmp_path, name):
    config = FinetuneConfig(**files | {name: write(tmp_path / "bad.csv", ["texts,label", "a,1"])})
    message = fails(splits.labelled_splits, config, 0)
    assert message.startswith(str(tmp_path / "bad.csv"))
    assert "'texts'" in message
    config = FinetuneConfig(**files | {name: str(tmp_path / "none.csv")})
    assert str(tmp_path / "none.csv") in fails(splits.labelled_splits, config, 0)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_builtin_tasks(name, monkeypatch):
    columns = ["text", "text_pair", "choice1", "choice2", "label"]

    def task(name, split):
        cells = {column: [f"{name} {split} {column}"] for column in columns}
        return datasets.Dataset.from_dict(cells)

    monkeypatch.setattr(tasks, "builtin_task", task)
    changes = {
        "entailment": {"text_pair": "text_pair"},
        "similarity": {"text_pair": "text_pair"},
        "multiple_choice": {"choices": "choice1,choice2"},
    }.get(name, {})
    kind = "classification" if name == tasks.WORD_ORDER else name
    config = FinetuneConfig(dataset=f"builtin:{name}", task=kind, **changes)
    tables = splits.labelled_splits(config, seed=0)
    assert list(tables) == ["train", "validation", "test"]
    needed = (*splits.task_spec(config).text_columns, "label")
    for split, table in tables.items():
        assert rows(table, *needed) == [tuple(f"{name} {split} {column}" for column in needed)]
        assert table.source == f"builtin:{name} ({split})"
    config.text = "txt"
    assert "'txt'" in fails(splits.labelled_splits, config, 0)


def test_the_real_builtin_task():
    tables = splits.labelled_splits(FinetuneConfig(dataset="builtin:classification"), seed=0)
    for split, table in tables.items():
        expected = tasks.builtin_task("classification", split)
        assert rows(table, "text", "label") == list(
            zip(expected["text"], expected["label"], strict=True)
        )


def test_rows_that_are_left_out_are_not_held_out(tmp_path):
    """16 of 20 rows have no label; a fourth of the other four is held out."""
    labels = ["-"] * 16 + ["a", "b", "a", "b"]
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"text {i},{x}\n" for i, x in enumerate(labels)))
    config = FinetuneConfig(train_file=str(path), ignore_label="-", validation_fraction=0.25)
    for seed in range(5):
        tables = splits.labelled_splits(config, seed)
        found = {name: [row for (row,) in rows(table, "label")] for name, table in tables.items()}
        assert (len(found["train"]), len(found["validation"])) == (3, 1)
        assert "-" not in found["train"] + found["validation"]
        assert (tables["train"].ignored, tables["validation"].ignored) == (16, 0)


def test_builtin_names():
    message = fails(splits.labelled_splits, FinetuneConfig(dataset="builtin:sentiment"), 0)
    assert "sentiment" in message
    assert "classification" in message


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder of data files in place of a data set of the hub."""
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        lines = [f'{{"sentence": "{split} {i}", "label": {i % 2}}}' for i in range(6)]
        write(folder / f"{split}.jsonl", lines)
    load = datasets.load_dataset

    def local(name, *args, **kwargs):
        assert name == "owner/name"
        return load(str(folder), *args, cache_dir=str(tmp_path / "cache"), **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", local)
    return "owner/name"


def test_hub_splits(hub):
    config = FinetuneConfig(dataset=hub, text="sentence")
    tables = splits.labelled_splits(config, seed=0)
    assert list(tables) == ["train", "validation"]
    assert rows(tables["validation"], "sentence", "label")[1] == ("validation 1", 1)
    config.validation_split, config.test_split = "test", "validation"
    tables = splits.labelled_splits(config, seed=0)
    assert list(tables) == ["train", "validation", "test"]
    assert rows(tables["validation"], "sentence")[0] == ("test 0",)
    assert rows(tables["test"], "sentence")[0] == ("validation 0",)
    assert tables["test"].source == "owner/name (validation)"
    config.text = "sentense"
    message = fails(splits.labelled_splits, config, 0)
    assert message.startswith("owner/name (train): ")
    assert "'sentence'" in message


def corpus(texts):
    return "".join(texts)


def test_hub_text_holds_a_part_out(hub):
    config = PretrainConfig(dataset=hub, text="sentence", validation_fraction=0.4)
    tables = splits.text_splits(config)
    whole = "".join(f"train {i}\n\n" for i in range(6))
    assert corpus(tables["train"]) + corpus(tables["validation"]) == whole
    assert len(corpus(tables["validation"])) == pytest.approx(0.4 * len(whole), abs=9)
    config.text = "words"
    assert "'words'" in fails(splits.text_splits, config)


def test_text_files(tmp_path):
    text = "".join(f"This is line {i}.\n" for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("Another one.\n")
    config = PretrainConfig(train_files=str(tmp_path / "a.txt"), validation_fraction=0.2)
    tables = splits.text_splits(config)
    assert list(tables) == ["train", "validation"]
    assert corpus(tables["train"]) + corpus(tables["validation"]) == text
    assert 0.19 < len(corpus(tables["validation"])) / len(text) < 0.22
    config.validation_files = str(tmp_path / "b.txt")
    tables = splits.text_splits(config)
    assert (corpus(tables["train"]), corpus(tables["validation"])) == (text, "Another one.\n")
    config.validation_files = str(tmp_path / "c.txt")
    assert "c.txt" in fails(splits.text_splits, config)


def test_builtin_text():
    tables = splits.text_splits(PretrainConfig(dataset="builtin"))
    for name, table in tables.items():
        assert corpus(table) == corpus(tasks.builtin_text(name))


# Rows in memory.


def in_memory(names, count=10):
    return {
        name: datasets.Dataset.from_dict(
            {"body": [f"{name} {i}" for i in range(count)], "label": [i % 2 for i in range(count)]}
        )
        for name in names
    }


def test_tables_in_memory_are_the_splits():
    config = FinetuneConfig(text="body")
    given = in_memory(["test", "validation", "train"])
    tables = splits.labelled_splits(config, 0, given)
    assert list(tables) == ["train", "validation", "test"]
    for name, table in tables.items():
        assert rows(table, "body", "label") == [(f"{name} {i}", i % 2) for i in range(10)]
        assert table.source == f"`{name}`"
    config = FinetuneConfig(text="body", ignore_label="1")
    assert splits.labelled_splits(config, 0, given)["test"].ignored == 5


def test_a_part_of_a_table_in_memory_is_held_out():
    config = FinetuneConfig(text="body", validation_fraction=0.3)
    tables = splits.labelled_splits(config, 0, in_memory(["train", "test"]))
    assert set(tables) == {"train", "validation", "test"}
    train, held_out = (rows(tables[name], "body") for name in ("train", "validation"))
    assert (len(train), len(held_out)) == (7, 3)
    assert sorted(train + held_out) == [(f"train {i}",) for i in range(10)]
    numbers = [number - 1 for number in tables["validation"].numbers]
    assert held_out == [(f"train {i}",) for i in numbers]
    assert tables["validation"].part_of == tables["train"].part_of == "`train`"


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (["test"], {}, "`tables`: has test; it must have train, and may have validation and test"),
        (["train", "dev"], {}, "`tables`: has train, dev; it must have train"),
        ([], {}, "`tables`: has nothing"),
        (["train"], {"text": "txt"}, "`train`: no column 'txt'"),
        (["train"], {"validation_fraction": 0.0}, "`finetune.validation_fraction`"),
    ],
)
def test_mistakes_in_tables_in_memory(names, changes, message):
    config = FinetuneConfig(**{"text": "body"} | changes)
    assert fails(splits.labelled_splits, config, 0, in_memory(names)).startswith(message)


def test_a_table_without_rows_is_refused():
    empty = in_memory(["train"]) | in_memory(["validation"], 0)
    expected = "`validation`: has no rows; add at least one"
    assert fails(splits.labelled_splits, FinetuneConfig(text="body"), 0, empty) == expected
    assert fails(splits.text_splits, PretrainConfig(text="body"), empty) == expected


def test_text_in_memory_is_documents():
    config = PretrainConfig(text="body", validation_fraction=0.4)
    given = in_memory(["validation", "train"])
    texts = splits.text_splits(config, given)
    assert list(texts) == ["train", "validation"]
    for name, split in texts.items():
        assert corpus(split) == "".join(f"{name} {i}\n\n" for i in range(10))
    held_out = splits.text_splits(config, {"train": given["train"]})
    assert corpus(held_out["train"]) + corpus(held_out["validation"]) == corpus(texts["train"])
    assert 0.3 < len(corpus(held_out["validation"])) / len(corpus(texts["train"])) < 0.5
    again = splits.text_splits(config, {"train": given["train"].select(range(10))})
    assert again["train"].fingerprint == held_out["train"].fingerprint
    assert "`tables`: has train, test" in fails(
        splits.text_splits, config, in_memory(["train", "test"])
    )


def test_the_task_is_that_of_the_configuration():
    config = FinetuneConfig(task="multiple_choice", text="q", choices="a, b,c", label="answer")
    spec = splits.task_spec(config)
    assert (spec.kind, spec.choices, spec.labels) == ("multiple_choice", ("a", "b", "c"), ())
    assert spec.text_columns == ("q", "a", "b", "c")
    assert spec.label == "answer"
    pair = splits.task_spec(FinetuneConfig(task="similarity", text="one", text_pair="two"))
    assert pair.text_columns == ("one", "two")
