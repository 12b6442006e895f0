"""Output for a person at the terminal, who may have closed it."""

import contextlib
import json
import os
import sys
from typing import Any

from gptjax.io.files import json_ready, write_json
from gptjax.io.remote import PathLike


def tell(line: str) -> None:
    """Writes a line to stderr without Python's buffers: safe in any thread and signal handler."""
    try:
        os.write(2, f"{line}\n".encode())
    except OSError:
        no_reader()


def no_reader() -> None:
    """Sends stderr, and stdout if it is the same file, to /dev/null from now on.

    To be called when a write fails because the terminal was closed or a pipe has no reader: later
    output is then lost, but it changes neither what is saved nor the exit code.
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
    """Prints `obj` as JSON, and writes it to the file `path` too unless that is empty."""
    print(json.dumps(json_ready(obj), indent=2))
    if path:
        write_json(path, obj)
