"""Lines for the person at the terminal, who may have left."""

import contextlib
import json
import os
import sys
from typing import Any

from gptjax.io.files import json_ready, write_json
from gptjax.io.remote import PathLike


def tell(line: str) -> None:
    """Writes a line to stderr, from any thread, and in a signal that comes amid another print."""
    try:
        os.write(2, f"{line}\n".encode())
    except OSError:
        no_reader()


def no_reader() -> None:
    """What is still to be printed where stderr goes is dropped, instead of failing."""
    null = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError):
        if os.path.sameopenfile(1, 2):
            os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)


def say(text: str) -> None:
    """Prints a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(obj: Any, path: PathLike = "") -> None:
    """Prints `obj` as JSON, and writes it to `path` unless empty."""
    print(json.dumps(json_ready(obj), indent=2))
    if path:
        write_json(path, obj)
