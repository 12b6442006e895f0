"""The exceptions that end a run in a way that is not a bug: one line, and an exit code.

Nobody may be there to read that line: a terminal was closed, or the `tee` behind us is gone. That
changes neither what is saved nor the exit code.
"""

import contextlib
import os


class UserError(Exception):
    """Wrong use or wrong input.

    The message is one line that says what is wrong, where (file, row, column or flag) and what to
    write instead. ``launch.py`` prints it as ``error: MESSAGE`` and exits with code 2; every other
    exception is a bug of ours and keeps its traceback.
    """


class ProcessLost(Exception):
    """Another process of the run did not come up, or has ended. ``launch.py`` exits with code 1.

    Not the user's mistake: the same command may well succeed at the next try.
    """


class TrainingDiverged(Exception):
    """Several updates in a row were not finite. ``launch.py`` exits with code 3."""


class Preempted(Exception):
    """The run was asked to stop (SIGTERM) and has saved. ``launch.py`` exits with code 75."""


def require(condition: object, message: str) -> None:
    """Raises `UserError` with `message` unless `condition` is true."""
    if not condition:
        raise UserError(message)


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


def brief(error: Exception) -> str:
    """An error of a library on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
