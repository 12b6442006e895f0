"""Files with any contents, and the one line that refuses them: what the tests of data/ share."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from gptjax.errors import UserError


def write(path: pathlib.Path, data: str | bytes, encoding: str = "utf-8") -> str:
    """Writes text or bytes, without a change of line breaks; returns the path."""
    path.write_bytes(data if isinstance(data, bytes) else data.encode(encoding))
    return str(path)


def fails(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Returns the message of the `UserError` that a call raises; it has one line."""
    with pytest.raises(UserError) as info:
        function(*args, **kwargs)
    message = str(info.value)
    assert "\n" not in message
    return message
