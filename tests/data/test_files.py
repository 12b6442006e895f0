"""Files of rows: what is read is what was written, and every mistake is named in one line."""

import csv
import json
import random

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import fails, write

from gptjax.data.tables.files import read_table
from gptjax.data.tables.labelled import LabelledTable

ODD = [
    "NA",
    "null",
    "None",
    "nan",
    "007",
    "1.0",
    "1e5",
    "True",
    "",
    " ",
    '"',
    '""',
    "'",
    "\\",
    "\t",
]
ODD += [",", ";", "a\nb", "é", "ß", "\u00a0", "\u2028", "\x85", "\x0b", "\x0c", "\x00", "\ufeff"]
ODD += ["日本語", "🙂", "e\u0301", "\u202e", "#", "2020-01-01", "-", "-0", "\U0010ffff"]


def random_cells(generator, count):
    return ["".join(generator.choices(ODD, k=generator.randrange(4))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_csv_is_verbatim_like_the_csv_module_and_pandas(tmp_path, seed):
    generator = random.Random(seed)
    rows = [random_cells(generator, 3) for _ in range(30)]
    path = tmp_path / "rows.csv"
    with open(path, "w", encoding=["utf-8", "utf-8-sig"][seed % 2], newline="") as handle:
        writer = csv.writer(handle, lineterminator=["\n", "\r\n"][seed // 2 % 2])
        writer.writerows([["text", "odd, name", "label"], *rows])
    read = read_table(str(path))
    assert read.column_names == ["text", "odd, name", "label"]
    assert [list(row.values()) for row in read] == rows
    if not any("\x00" in cell for row in rows for cell in row):  # pandas' parser ends cells at NUL
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        assert frame.to_numpy().tolist() == rows


@pytest.mark.parametrize("seed", range(10))
def test_tsv_has_no_quoting_and_keeps_every_row(tmp_path, seed):
    generator = random.Random(seed)
    rows = [
        ["x" + "".join(c for c in random_cells(generator, 1)[0] if c not in "\t\n") for _ in "abc"]
        for _ in range(50)
    ]
    end = ["\n", "\r\n"][seed % 2]
    text = "".join("\t".join(row) + end for row in [["a", "b", "c"], *rows])
    read = read_table(write(tmp_path / "rows.tsv", text))
    assert [list(row.values()) for row in read] == rows


def test_tsv_with_unbalanced_quotes_as_in_mrpc(tmp_path):
    lines = ["\ufeffQuality\t#1 String\t#2 String"]
    lines += [f'{i % 2}\tHe said "yes {i}.\t"No" and ""maybe' for i in range(100)]
    path = write(tmp_path / "msr.txt", "\r\n".join(lines) + "\r\n\r\n")
    read = read_table(path)
    assert read.column_names == ["Quality", "#1 String", "#2 String"]
    assert len(read) == 100
    assert read[7] == {
        "Quality": "1",
        "#1 String": 'He said "yes 7.',
        "#2 String": '"No" and ""maybe',
    }


@pytest.mark.parametrize(("ending", "rows"), [("csv", 4), ("tsv", 4), ("txt", 4)])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_blank_line_of_one_column_is_a_row(tmp_path, ending, rows, end):
    """So a program that reads lines counts the same rows."""
    path = write(tmp_path / f"a.{ending}", end.join(["text", "one", "", "two", "", ""]))
    assert read_table(path)["text"][:] == ["one", "", "two", ""]
    assert read_table(path, ["t"])["t"][:] == ["text", "one", "", "two", ""]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_blank_line_of_several_columns_is_no_row(tmp_path, ending):
    lines = ["text,label", "one,1", "two,2", "", ""]
    text = "\n".join(lines).replace(",", "," if ending == "csv" else "\t")
    assert read_table(write(tmp_path / f"a.{ending}", text))["label"][:] == ["1", "2"]
    assert read_table(write(tmp_path / f"b.{ending}", "\n\n" + text))["label"][:] == ["1", "2"]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_header_is_no_row_of_a_file_whose_columns_are_named(tmp_path, ending):
    names = ["text", "label"]
    lines = [" text,label", "one,1", "text,label"]
    text = "\n".join(lines).replace(",", "," if ending == "csv" else "\t")
    path = write(tmp_path / f"a.{ending}", text)
    message = fails(read_table, path, names)
    assert message.startswith(f"{path}, line 1: is a header with the names text, label; remove")
    assert len(read_table(path, ["a", "label"])) == 3
    # A later row with these cells is data.
    assert len(read_table(write(tmp_path / f"b.{ending}", text.partition("\n")[2]), names)) == 2


def test_columns_name_a_file_without_header(tmp_path):
    path = write(tmp_path / "a.csv", "good,1\nbad,0\n")
    assert read_table(path, ["text", "label"])[:] == {"text": ["good", "bad"], "label": ["1", "0"]}
    assert "line 1: too few cells, 2 where columns has 3" in fails(read_table, path, list("abc"))
    assert "'a' occurs more than once" in fails(read_table, path, ["a", "a"])
    lines = write(tmp_path / "a.jsonl", '{"a": 1}\n')
    assert "leave columns empty" in fails(read_table, lines, ["b"])


def test_a_cell_of_a_million_characters_and_many_chunks(tmp_path):
    big = "é" * 1_000_000
    limit = csv.field_size_limit()
    path = write(tmp_path / "a.csv", f'text,n\n"{big}",1\n' + "x,2\n" * 25_000)
    read = read_table(path)
    assert len(read) == 25_001
    assert read[0]["text"] == big
    assert csv.field_size_limit() == limit


def test_parquet_columns_that_datasets_does_not_know(tmp_path):
    """They do not matter if nobody asks for them. If they are asked for, one line names them."""
    words = pa.array(["a b", "c d"])
    unusual = {
        "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
        "view": pa.array([[1], [2, 3]], pa.list_view(pa.int64())),
    }
    table = pa.table({"text": words, **unusual})
    path = str(tmp_path / "a.parquet")
    newer = json.dumps({"info": {"features": {"text": {"_type": "NewType"}}}})
    for metadata in (None, {"huggingface": newer}):
        pq.write_table(table.replace_schema_metadata(metadata), path)
        rows = LabelledTable(read_table(path), path)
        assert rows.columns(["text"])["text"] == ["a b", "c d"]
        for name in unusual:
            message = fails(rows.columns, [name])
            assert message.startswith(f"{path}: row 1, column {name}: is a list")
    pq.write_table(pa.Table.from_arrays([words, words], names=["text", "text"]), path)
    message = fails(read_table, path)
    assert message.startswith(f"{path}: column 'text' occurs more than once in the file; give")


def test_json_lines_and_parquet_keep_types(tmp_path):
    rows = [
        {"t": "007", "d": "2020-01-01", "n": 1, "f": 1, "l": [1, 2]},
        {"t": None, "n": 2, "f": 0.5},
    ]
    path = write(tmp_path / "a.jsonl", "\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\r\n")
    expected = [{"d": None, "l": None, "t": None} | row for row in rows]
    assert read_table(path).to_list() == expected
    table = pa.Table.from_pylist(expected).append_column(
        "c", pa.array(["x", "y"]).dictionary_encode()
    )
    pq.write_table(table, tmp_path / "a.parquet")
    read = read_table(str(tmp_path / "a.parquet"))
    assert read.to_list() == [row | {"c": c} for row, c in zip(expected, "xy", strict=True)]
    long = "".join(f'{{"n": {i if i < 15_000 else i + 0.5}}}\n' for i in range(20_000))
    assert read_table(write(tmp_path / "b.json", long))[19_999] == {"n": 19_999.5}


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.csv", "", ["a.csv", "empty"]),
        ("a.csv", "\n\n", ["blank lines only"]),
        ("a.csv", "text,label\n", ["no rows"]),
        ("a.tsv", "text\tlabel", ["no rows"]),
        ("a.csv", "text,label,text\na,b,c\n", ["line 1", "'text'", "more than once"]),
        (
            "a.csv",
            'text,label\n"a\nb",1\nc\n',
            ["a.csv, line 4", "too few cells, 1 where the header"],
        ),
        ("a.csv", "text,label\na,b\nc,d,e\n", ["a.csv, line 3", "too many", "quotes"]),
        ("a.tsv", "text\tlabel\na\tb\tc\n", ["a.tsv, line 2", "too many", "tab"]),
        ("a.tsv", "text\tlabel\na\tb\n\nc\td\n", ["a.tsv, line 3", "too few"]),
        ("a.csv", 'text,label\na,1\n"b,2\nc,3\n', ["a.csv, line 3", "quote"]),
        ("a.csv", 'text,label\n"a"b,1\n', ["a.csv, line 2", "quote"]),
        ("a.csv", b"text\nok\nna\xefve\n", ["a.csv, line 3", "0xef", "UTF-8"]),
        ("a.tsv", b"text\nok\ncaf\xe9", ["a.tsv, line 3", "0xe9", "UTF-8"]),
        ("a.jsonl", b'{"a": "\xff"}\n', ["a.jsonl, line 1", "0xff"]),
        ("a.csv", "text\nx\n".encode("utf-16"), ["line 1", "0xff", "UTF-16"]),
        ("a.jsonl", '{"a": 1}\n{"a": \n', ["a.jsonl, line 2", "not JSON"]),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', ["a.jsonl, line 2", "array, not an object"]),
        ("a.json", '[\n{"a": 1}\n]\n', ["a.json, line 1", "one JSON object a line"]),
        ("a.jsonl", "\n\n", ["blank lines only"]),
        ("a.jsonl", '{"a": 1}\n{"a": "x"}\n', ["column 'a'", "int (line 1), str (line 2)"]),
        ("a.jsonl", '{"a": "\\ud800"}\n', ["column 'a'"]),
        ("a.parquet", "text\n", ["a.parquet", "Parquet"]),
        ("a.xlsx", "PK", ["a.xlsx", ".xlsx", ".csv"]),
        ("data", "text\n", ["ending", ".csv"]),
    ],
)
def test_mistakes_are_named_with_file_and_line(tmp_path, name, data, expected):
    message = fails(read_table, write(tmp_path / name, data))
    for part in [str(tmp_path / name), *expected]:
        assert part in message


def test_types_that_change_between_chunks_are_named(tmp_path):
    lines = ['{"a": 1}'] * 12_000 + ['{"a": "x"}'] * 12_000
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    assert path in fails(read_table, path)


def test_missing_files_and_columns_offer_the_nearest_name(tmp_path):
    path = write(tmp_path / "train.csv", "Sentence,label\na,b\n")
    assert "did you mean 'train.csv'?" in fails(read_table, str(tmp_path / "trian.csv"))
    assert "no such file" in fails(read_table, str(tmp_path / "nowhere" / "x.csv"))
    assert "is a folder" in fails(read_table, str(tmp_path))
    table = LabelledTable(read_table(path), path)
    table.require_columns(["label", "Sentence"])
    message = fails(table.require_columns, ["label", "sentence"])
    assert message == (
        f"{path}: no column 'sentence'; did you mean 'Sentence'?; "
        "the columns are 'Sentence', 'label'"
    )
    assert "did you mean" not in fails(table.require_columns, ["zzz"])
