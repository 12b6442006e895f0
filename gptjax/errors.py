"""The exceptions that a user meets: each ends a run with one line and an exit code of its own."""

import difflib
import typing


class UserError(Exception):
    """Wrong use or wrong input. The command line prints ``error: MESSAGE`` and exits with code 2.

    The message is one line that names what is wrong, where (file, row, column, argument or field)
    and what to write instead. Arguments and fields stand in backquotes, as in "`top_p`=2: must be
    at most 1"; the command line turns them into flags. Every other exception is a bug of ours and
    keeps its traceback.
    """


class ProcessLost(Exception):
    """Another process of the run did not start, or has ended. The exit code is 1.

    The user has made no mistake: the same command may succeed at the next attempt.
    """


class TrainingDiverged(Exception):
    """Several updates in a row were not finite. The exit code is 3."""


class StopRequested(Exception):
    """The process was asked to stop. Raised between two batches, where nothing is half done.

    Whoever holds a state to save catches it, saves, and raises `Preempted`.
    """


class Preempted(Exception):
    """The run received a request to stop and has saved its state. The exit code is 75."""

    interrupted: bool = False
    """Whether Ctrl-C asked to stop, and not a scheduler or a closed terminal."""


def require(condition: object, message: str) -> None:
    """Raises `UserError` with `message` unless `condition` is true."""
    if not condition:
        raise UserError(message)


def brief(error: BaseException) -> str:
    """Returns class and text of a library's error on one line, the text cut to 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """Returns "; did you mean 'X'?" with the name that is most like `name`, "" if none is."""
    lower = {each.lower(): str(each) for each in names}  # `str`: members of enumerations too
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    return f"; did you mean {lower[near[0]]!r}?" if near else ""
