"""The exceptions of gptjax. The command line reports each as one line and its own exit code."""

import difflib
import typing


class UserError(Exception):
    """The user made a mistake, or the input is wrong.

    The command line prints ``error: MESSAGE`` and exits with code 2.

    The message is one line. It names the mistake, the place of the mistake (file, row, column,
    argument or field) and a correction. Arguments and fields are written in backquotes, for example
    "`top_p`=2: must be at most 1", and the command line turns them into flags. An exception that is
    not defined in this module (except KeyboardInterrupt) is a bug of gptjax and keeps its
    traceback.
    """


class ProcessLost(Exception):
    """Another process of the run did not start, or has ended. The exit code is 1.

    The user has made no mistake, and the same command may succeed at the next attempt.
    """


class TrainingDiverged(Exception):
    """Several updates in a row were not finite. The exit code is 3."""


class StopRequested(Exception):
    """The process was asked to stop. The exception is raised between two batches.

    A function that has a training state to save catches the exception, saves the state, and raises
    `Preempted`.
    """


class Preempted(Exception):
    """The run received a request to stop and has saved its state. The exit code is 75."""

    interrupted: bool = False
    """Whether the request came from Ctrl-C, not from a scheduler or a closed terminal."""


def require(condition: object, message: str) -> None:
    """Raises `UserError` with `message` unless `condition` is true."""
    if not condition:
        raise UserError(message)


def brief(error: BaseException) -> str:
    """Returns one line with the class of an error and the first 200 characters of its text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """Returns "; did you mean 'X'?" with the most similar name.

    If no name is similar to `name`, the result is an empty string.
    """
    lower = {each.lower(): str(each) for each in names}  # `str` converts members of enumerations
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    return f"; did you mean {lower[near[0]]!r}?" if near else ""
