"""Fields of configurations with a constraint, such as `width: int = positive(768)`.

The constraint is a function in the field's metadata. It takes a value and returns a text that says
why the value is wrong, or an empty string. `gptjax.config.validation` calls the constraint and
adds the name of the field to the text.
"""

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any, TypeVar

from gptjax.errors import nearest

T = TypeVar("T")
Number = TypeVar("Number", int, float)
_PROBLEM = "problem"


def problem(field: dataclasses.Field[Any], value: Any) -> str:
    """Returns the reason why `value` violates the constraint of a field, or an empty string."""
    return field.metadata.get(_PROBLEM, lambda _: "")(value)


def _constrained(default: Any, check: Callable[[Any], str]) -> Any:
    return dataclasses.field(default=default, metadata={_PROBLEM: check})


def limited(default: T, allows: Callable[[T], bool], text: str) -> T:
    """Returns a field whose values must fulfil `allows`.

    Args:
      default: the default value of the field.
      allows: a function that returns whether a value is allowed.
      text: the reason to report for a value that is not allowed.
    """
    return _constrained(default, lambda value: "" if allows(value) else text)


def _finite(default: Number, allows: Callable[[Number], bool], text: str) -> Number:
    def check(value: Number) -> str:
        if not allows(value):  # NaN fulfils no rule
            return text
        return "" if value < math.inf else "must be finite"

    return _constrained(default, check)


def positive(default: Number) -> Number:
    """Returns a field of finite numbers above 0."""
    return _finite(default, lambda value: value > 0, "must be greater than 0")


def not_negative(default: Number) -> Number:
    """Returns a configuration field whose value must be finite and at least 0."""
    return _finite(default, lambda value: value >= 0, "must not be negative")


def fraction(default: float) -> float:
    """Returns a configuration field whose value must be at least 0 and below 1."""
    return limited(default, lambda value: 0 <= value < 1, "must be at least 0 and below 1")


def one_of(default: enum.StrEnum) -> str:
    """Returns a field whose value is a member of the default's enumeration, as a plain string."""
    members = tuple(type(default))

    def check(value: str) -> str:
        if value in members:
            return ""
        return f"must be one of {', '.join(members)}{nearest(value, members)}"

    return _constrained(default.value, check)
