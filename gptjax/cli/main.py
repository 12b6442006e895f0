"""Runs the mode that a command line names. An error becomes one line and an exit code.

Exit codes:

0    The command has done its work.
1    gptjax has a bug, or another process of the run did not start or has ended.
2    The user made a mistake, or the input is wrong.
3    The training diverged.
75   The run was asked to stop. The same command continues it, or starts it again.
130  Ctrl-C ended the command.
"""

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence

from absl import app
from absl import logging as absl_logging

from gptjax.cli import console, flags
from gptjax.cluster import processes
from gptjax.errors import Preempted, ProcessLost, TrainingDiverged, UserError
from gptjax.io.console import no_reader, tell

# KeyboardInterrupt means a second Ctrl-C, or a Ctrl-C when no training was running. The first
# Ctrl-C in a training saves the state, and then the training raises `Preempted`.
_EXIT_CODES: dict[type[BaseException], int] = {
    ProcessLost: 1, UserError: 2, TrainingDiverged: 3, Preempted: 75, KeyboardInterrupt: 130,
}  # fmt: skip


def run() -> None:
    """Runs the command line of this process, and exits with the exit code of the command."""
    signal.signal(signal.SIGTERM, _stop_at_once)
    quiet_orbax()
    try:
        app.run(main, flags_parser=parse)
    except BrokenPipeError:  # the program that reads our output has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    finally:
        # The exit code is already decided, and a SIGTERM while Python ends would change it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def parse(argv: Sequence[str]) -> flags.Command:
    """Returns the command of a command line.

    If the command line asks for help or is wrong, `parse` prints the help or the error, and exits.
    """
    try:
        command = flags.parse(argv)
        if isinstance(command, flags.Command):
            return command
        _print_help(command)
    except UserError as error:
        sys.exit(_fail(error, str(flags.FLAGS["mode"].value)))
    sys.exit(0)


def main(command: flags.Command) -> int:
    """Runs the mode of a command, and returns the exit code."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger().setLevel(logging.WARNING)
    # Orbax logs warnings about actions that we want, and logs errors that it raises too.
    absl_logging.get_absl_logger().setLevel(logging.CRITICAL)
    # The mode `compile` reports the compilation time, so it must not read the cache.
    if command.mode != "compile":
        _keep_compiled_programs()
    try:
        names = [field.name for field in dataclasses.fields(processes.Options)]
        processes.start(processes.Options(**flags.values(names)), command.mode)
        # This import is slow. It is not at the top of the file, so that help texts and errors in
        # flags appear at once.
        from gptjax.cli import modes

        getattr(modes, f"run_{command.mode}")(command)
    except tuple(_EXIT_CODES) as error:
        return _fail(error, command.mode)
    except Exception:
        # If the loss of another process caused this exception, the next call ends the program.
        processes.wait_for_news()
        if processes.count() > 1:
            with contextlib.suppress(OSError):
                traceback.print_exc()
            processes.leave(1, "see its traceback")
        raise
    processes.leave(0)
    return 0


def quiet_orbax() -> None:
    """Silences the tracebacks that Orbax prints in the background for a damaged checkpoint.

    Orbax also raises the error itself, which is printed as one line.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    usual = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            usual(unraisable)

    sys.unraisablehook = hook


def _print_help(request: flags.HelpRequest) -> None:
    """Prints the help that a command line asks for.

    The output is flushed here, because `run` handles the error of a closed pipe.
    """
    from gptjax.cli import usage

    if request.name == "helpfull":
        app.usage(writeto_stdout=True)
    elif request.name == "helpxml":
        flags.FLAGS.write_help_in_xml_format(sys.stdout)
    elif request.mode:
        print(usage.of_mode(request.mode, request.config))
    else:
        print(usage.overview())
    sys.stdout.flush()


def _fail(error: BaseException, mode: str) -> int:
    """Prints an error of a mode as one line, and returns the exit code.

    In a run of several processes, it sends the error to the other processes and exits.
    """
    code = next(code for kind, code in _EXIT_CODES.items() if isinstance(error, kind))
    text = console.with_flags(" ".join(str(error).split()) or "interrupted", mode)
    try:
        print("error:", text, file=sys.stderr, flush=True)
    except OSError:
        no_reader()
    processes.leave(code, text)
    return code


def _keep_compiled_programs() -> None:
    """Turns on JAX's cache of compiled programs, so that later runs of a model start faster."""
    import jax

    from gptjax.data import cache

    if cache.folder() and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = os.path.join(cache.folder(), "xla")
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _stop_at_once(*_: object) -> None:
    """Handles SIGTERM while no training runs: during imports, in a report, in other modes.

    No file is left half-written, because files are replaced as a whole.
    """
    text = "asked to stop; the same command starts again"
    tell(f"error: {text}")
    # `leave` runs in a thread of its own, because it might wait for a lock that the main thread
    # held when the signal came.
    leave = threading.Thread(target=processes.leave, args=(75, text), daemon=True)
    leave.start()
    leave.join(40)
    os._exit(75)
