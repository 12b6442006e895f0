"""Column expressions: joined columns, elements of lists, and names that look like either."""

import datasets
import pytest

from gptjax.data.tables.labelled import LabelledTable, as_text
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
