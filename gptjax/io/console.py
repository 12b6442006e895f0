"""Output for a person at the terminal. The terminal may have been closed."""

import contextlib
import json
import os
import sys
from typing import Any

from gptjax.io.files import json_ready, write_json
from gptjax.io.remote import PathLike


def tell(line: str) -> None:
    """Writes a line to stderr without Python's buffers.

    It can be called safely in any thread and in a signal handler.
    """
    try:
        os.write(2, f"{line}\n".encode())
    except OSError:
        no_reader()


def no_reader() -> None:
    """Sends stderr, and stdout if it is the same file, to /dev/null from now on.

    It is called when a write fails, because the terminal was closed or a pipe has no reader. Later
    output is then lost, but it raises no error that would change the saved files or the exit code.
    """
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
    """Prints `obj` as JSON. If `path` is not empty, `obj` is also written to this file."""
    print(json.dumps(json_ready(obj), indent=2))
    if path:
        write_json(path, obj)
