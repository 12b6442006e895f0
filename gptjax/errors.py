"""The exceptions that end a run in a way that is not a bug: one line, and an exit code.

Nobody may be there to read that line: a terminal was closed, or the `tee` behind us is gone. That
changes neither what is saved nor the exit code.
"""

import difflib
import typing


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


def brief(error: Exception) -> str:
    """An error of a library on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """Returns "; did you mean 'X'?" with the one of `names` that is most like `name`, or ""."""
    lower = {each.lower(): str(each) for each in names}  # enumerations too
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    return f"; did you mean {lower[near[0]]!r}?" if near else ""
