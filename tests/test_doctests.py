"""The examples in docstrings, run as doctests."""

import doctest
import importlib
import pathlib

import pytest

import gptjax

PACKAGE = pathlib.Path(gptjax.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)
# The examples of these modules train models.
SLOW = ("gptjax.api",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in MODULES],
)
def test_examples_give_what_they_show(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
