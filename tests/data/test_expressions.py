"""Column expressions: joined columns, elements of lists, and names that look like either."""

import pytest

from gptjax.data.tables import expressions
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
    existing = [name for name in ROWS if name not in without]
    expressions.require_columns(existing, [expression], "rows.csv")
    return expressions.read(ROWS.__getitem__, existing, expression, "rows.csv", **kwargs)


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
