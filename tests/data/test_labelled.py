"""Column expressions: joined columns, elements of lists, and names that look like either."""

import collections
import datetime
import decimal
import json
import math
import random

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import fails, write

from gptjax.data.tables import memory
from gptjax.data.tables.files import read_table
from gptjax.data.tables.labelled import LabelledTable, as_text, holdout, same_label
from gptjax.data.tables.texts import read_text
from gptjax.errors import UserError

ROWS = {
    "a": ["x", None, "z"],
    "b": ["1", "2", 3],
    "list": [["p", "q"], ("r", "s"), ["t", "u", "v"]],
    "a+b": ["own"] * 3,
    "list[1]": ["named"] * 3,
    "c": [0.5, 1, 2],
}


def read(expression: str, without: tuple[str, ...] = (), **kwargs):
    rows = {name: values for name, values in ROWS.items() if name not in without}
    table = LabelledTable(rows, "rows.csv", **kwargs)
    table.require_columns([expression])
    return table.columns([expression])[expression]


@pytest.mark.parametrize(
    ("expression", "without", "expected"),
    [
        ("a", (), ["x", None, "z"]),
        ("c", (), [0.5, 1, 2]),
        ("a+b", ("a+b",), ["x 1", " 2", "z 3"]),
        ("a + b", (), ["x 1", " 2", "z 3"]),
        ("a+b", (), ["own"] * 3),
        ("list[0]", (), ["p", "r", "t"]),
        ("list[1]", ("list[1]",), ["q", "s", "u"]),
        ("list[1]", (), ["named"] * 3),
        ("c+list[0]+a", (), ["0.5 p x", "1 r ", "2 t z"]),
    ],
)
def test_values(expression, without, expected):
    assert read(expression, without) == expected


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("d", "no column 'd'"),
        ("a+d", "no column 'd'"),
        ("lst[0]", "no column 'lst'; did you mean 'list'"),
        ("list[2]", "rows.csv: row 1, column list: has 2 elements; list[2] needs at least 3"),
        ("a[0]", "rows.csv: row 1, column a: is no list"),
    ],
)
def test_what_is_not_there_is_named(expression, message):
    with pytest.raises(UserError) as info:
        read(expression)
    assert message in str(info.value)


def test_the_row_of_the_file_is_named():
    with pytest.raises(UserError, match="row 7, column list"):
        read("list[2]", numbers=(7, 8, 9))


def test_columns_of_different_lengths_are_refused():
    table = LabelledTable({"a": ["x", "y"], "b": ["z"]}, "rows")
    with pytest.raises(UserError, match=r"rows: columns of different lengths \[1, 2\]"):
        table.columns(["a", "b"])


def test_cells_as_text():
    rows = datasets.Dataset.from_dict({"a": ["x", None], "b": [1, 2], "c": [0.5, None]})
    table = LabelledTable(rows, "rows").select([1, 0])
    values = table.columns(["a", "b", "c"])
    assert {name: list(map(as_text, cells)) for name, cells in values.items()} == {
        "a": ["", "x"], "b": ["2", "1"], "c": ["", "0.5"]
    }  # fmt: skip
    assert [table.number(i) for i in range(2)] == [2, 1]
    assert [table.select([1]).number(0), table.cell(0, "a")] == [1, "rows: row 2, column a"]


MISSING = [
    None, math.nan, np.float32("nan"), np.datetime64("NaT"), pd.NA, pd.NaT, decimal.Decimal("nan"),
]  # fmt: skip


@pytest.mark.parametrize("missing", MISSING, ids=repr)
def test_a_missing_value_of_any_kind_is_none(missing):
    rows = {"a": ["x", missing], "list": [["p"], [missing]]}
    table = LabelledTable(rows, "rows")
    values = table.columns(["a", "a+list[0]", "list[0]"])
    assert values == {"a": ["x", None], "a+list[0]": ["x p", " "], "list[0]": ["p", None]}
    assert as_text(missing) == ""
    frame = pd.DataFrame({"a": ["x", missing]}, dtype=object)
    for form in ([{"a": "x"}, {"a": missing}], {"a": ["x", missing]}, frame):
        assert memory.columns(form, "`rows`")["a"] == ["x", None]
        assert memory.dataset(form, "`rows`", ["a"])["a"][:] == ["x", None]


def test_a_missing_value_in_a_file_is_none(tmp_path):
    lines = "".join(
        f"{json.dumps({'text': 'x', 'label': value})}\n" for value in (1, math.nan, None)
    )
    tables = [read_table(write(tmp_path / "a.jsonl", lines))]
    pq.write_table(
        pa.table({"text": ["x"] * 3, "label": [1, math.nan, None]}), tmp_path / "a.parquet"
    )
    tables.append(read_table(str(tmp_path / "a.parquet")))
    for table in tables:
        assert LabelledTable(table, "rows").columns(["label"])["label"] == [1, None, None]


@pytest.mark.parametrize(
    "value", ["x", "", "nan", 0, 1.5, True, datetime.date(2020, 1, 2), decimal.Decimal("1.5")]
)
def test_a_value_is_not_changed(value):
    found = LabelledTable({"a": [value]}, "rows").columns(["a"])["a"]
    assert found == [value]
    assert type(found[0]) is type(value)


def test_bytes_are_text_or_an_error(tmp_path):
    table = pa.table({"text": pa.array(["é".encode(), b"b"], pa.binary()), "n": [1, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = LabelledTable(read_table(str(tmp_path / "a.parquet")), "a.parquet")
    assert rows.columns(["text", "text+n"]) == {"text": ["é", "b"], "text+n": ["é 1", "b 2"]}
    assert "".join(read_text(str(tmp_path / "a.parquet"))) == "é\n\nb\n\n"
    message = fails(LabelledTable({"a": [b"x", b"ok \xff"]}, "rows").columns, ["a"])
    assert message.startswith("rows: row 2, column a: bytes that are not UTF-8")
    assert "at byte 3" in message


@pytest.mark.parametrize(
    "cell",
    [["a", "b"], ("a",), [], np.array(["a"]), {"key": "a"}, {"a", "b"}],
    ids=["list", "tuple", "empty", "array", "dict", "set"],
)
def test_a_list_or_a_structure_is_no_text(cell):
    table = LabelledTable({"a": ["x", cell], "b": ["y", "z"], "c": [["p"], [cell]]}, "rows")
    for expression in ("a", "b+a"):
        message = fails(table.columns, [expression])
        assert message.startswith("rows: row 2, column a: is a ")
        assert "not a text or a number; write " in message
    assert fails(table.columns, ["c[0]"]).startswith("rows: row 2, column c[0]: is a ")
    assert table.columns(["b"]) == {"b": ["y", "z"]}  # other columns may hold anything


def test_a_list_in_a_document_is_an_error(tmp_path):
    lines = "".join(json.dumps({"text": ["a", "b"]}) + "\n" for _ in range(3))
    path = write(tmp_path / "a.jsonl", lines)
    assert fails(read_text, path).startswith(f"{path}: row 1, column text: is a list")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("a", None, "b"))
    assert "".join(read_text(write(tmp_path / "b.jsonl", lines))) == "a\n\n\n\nb\n\n"


@pytest.mark.parametrize(
    ("label", "other", "equal"),
    [
        ("-1", "-1.0", True), (" 1", "1", True), ("1e0", "1", True), ("a", "a ", True),
        ("a", "b", False), ("1", "-1", False), ("nan", "NaN", False), ("inf", "Infinity", False),
        ("9007199254740993", "9007199254740992", False), ("1_0", "10", False),
        ("1e400", "1e500", False),
    ],
)  # fmt: skip
def test_labels_are_compared_as_numbers_if_both_are_numbers(label, other, equal):
    assert same_label(label, other) == same_label(other, label) == equal


def classes(table: LabelledTable) -> collections.Counter:
    return collections.Counter(table.columns(["label"])["label"])


@pytest.mark.parametrize("seed", range(20))
def test_the_held_out_part_is_close_to_the_fraction_and_has_all_classes(seed):
    generator = random.Random(seed)
    count, fraction = generator.randint(60, 400), generator.choice([0.05, 0.1, 0.3])
    weights = [generator.choice([1, 3, 10]) for _ in "abcd"]
    labels = generator.choices("abcd", weights, k=count)
    table = LabelledTable({"text": list(map(str, range(count))), "label": labels}, "rows")
    train, held = holdout(table, ["text"], fraction, seed, "label")
    wanted, all_classes = math.ceil(fraction * count), classes(table)
    assert sum(classes(held).values()) == wanted
    for name, size in all_classes.items():
        assert abs(classes(held)[name] - wanted * size / count) < 1
    assert set(classes(train)) == set(all_classes)


@pytest.mark.parametrize("seed", range(20))
def test_large_groups_of_equal_texts_do_not_overshoot(seed):
    generator = random.Random(seed)
    texts = [f"text {i}" for i in range(60)]
    for name in range(generator.randint(1, 4)):
        texts += [f"often {name}"] * generator.randint(10, 200)
    labels = [generator.choice("ab") for _ in texts]
    table = LabelledTable({"text": texts, "label": labels}, "rows")
    train, held = holdout(table, ["text"], 0.1, seed, "label")
    wanted = math.ceil(0.1 * len(texts))
    sizes = [len(each.columns(["text"])["text"]) for each in (train, held)]
    assert sum(sizes) == len(texts)
    # The single texts can fill the part that the large groups exceed.
    assert min(wanted, 60) - 2 <= sizes[1] <= wanted
    assert not set(train.columns(["text"])["text"]) & set(held.columns(["text"])["text"])


@pytest.mark.parametrize("seed", range(5))
def test_a_pair_and_its_mirror_image_are_in_one_split(seed):
    pairs = [(f"text {i}", f"other {i}") for i in range(30)]
    rows = pairs + [(second, first) for first, second in pairs]
    table = LabelledTable({"a": [a for a, _ in rows], "b": [b for _, b in rows]}, "rows")

    def shared(symmetric):
        parts = holdout(table, ["a", "b"], 0.2, seed, symmetric=symmetric)
        sets = [
            {frozenset(pair) for pair in zip(part.rows["a"], part.rows["b"], strict=True)}
            for part in parts
        ]
        return len(sets[0] & sets[1])

    assert shared(symmetric=True) == 0
    assert shared(symmetric=False) > 0


def test_two_large_groups_need_a_validation_file():
    rows = {"text": ["x"] * 100 + ["y"] * 100, "label": ["a", "b"] * 100}
    message = fails(holdout, LabelledTable(rows, "rows.csv"), ["text"], 0.1, 0, "label")
    assert message.startswith("rows.csv: cannot hold out 0.1 of 200 rows with 2 different texts")


@pytest.mark.parametrize("seed", range(5))
def test_a_class_with_one_row_stays_in_training(seed):
    rows = {"text": list(map(str, range(200))), "label": ["a"] * 199 + ["b"]}
    train, held = holdout(LabelledTable(rows, "rows"), ["text"], 0.1, seed, "label")
    assert (classes(train)["b"], classes(held)) == (1, {"a": 20})
    rows["label"] = rows["text"]  # if each row has its own class, this cannot be kept
    _, held = holdout(LabelledTable(rows, "rows"), ["text"], 0.1, seed, "label")
    assert sum(classes(held).values()) == 20
