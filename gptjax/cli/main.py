"""Runs one mode of one command line; turns errors and signals into exit codes and one line.

Exit codes: 0 done; 1 a bug of gptjax, or another process was lost; 2 wrong use or wrong input; 3
the training diverged; 75 stopped after saving, for the same command to continue; 130 Ctrl-C.
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

# Ctrl-C comes here the second time, or where there is nothing to save yet.
_EXIT_CODES: dict[type[BaseException], int] = {
    ProcessLost: 1, UserError: 2, TrainingDiverged: 3, Preempted: 75, KeyboardInterrupt: 130,
}  # fmt: skip


def run() -> None:
    """Runs the command line of this process, and exits with its code."""
    signal.signal(signal.SIGTERM, _stop_at_once)
    quiet_orbax()
    try:
        app.run(main, flags_parser=parse)
    except BrokenPipeError:  # the reader of our output has ended, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    finally:
        # The exit code is decided. A SIGTERM while Python cleans up would change it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def parse(argv: Sequence[str]) -> flags.Command:
    """Reads a command line; prints help or an error, and exits, where there is nothing to run."""
    try:
        command = flags.parse(argv)
        if isinstance(command, flags.Command):
            return command
        _print_help(command)
    except UserError as error:
        sys.exit(_fail(error, str(flags.FLAGS["mode"].value)))
    sys.exit(0)


def main(command: flags.Command) -> int:
    """Runs the mode of a command; returns the exit code."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger().setLevel(logging.WARNING)
    # Orbax warns of what we ask it to do, and logs errors that it raises as well.
    absl_logging.get_absl_logger().setLevel(logging.CRITICAL)
    if command.mode != "compile":  # which reports how long the compilation takes
        _keep_compiled_programs()
    try:
        names = [field.name for field in dataclasses.fields(processes.Options)]
        processes.start(processes.Options(**flags.values(names)), command.mode)
        # Not at the top of the file: help and wrong flags do not wait for these imports.
        from gptjax.cli import modes

        getattr(modes, f"run_{command.mode}")(command)
    except tuple(_EXIT_CODES) as error:
        return _fail(error, command.mode)
    except Exception:
        # If another process was lost, that is the reason. This call then ends the program.
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

    The error itself is raised as well, and is printed as one line.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    usual = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            usual(unraisable)

    sys.unraisablehook = hook


def _print_help(request: flags.HelpRequest) -> None:
    """Prints help; flushed here, because a closed pipe is an error that `run` expects."""
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

    In a run of several processes it also tells the others, and exits.
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
    """Turns on JAX's cache of compiled programs: the next run of the same model starts faster."""
    import jax

    from gptjax.data import cache

    if cache.folder() and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = os.path.join(cache.folder(), "xla")
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _stop_at_once(*_: object) -> None:
    """Handles SIGTERM while no training runs: during imports, in a report, in other modes.

    Files are replaced as a whole, so none is left half-written.
    """
    text = "asked to stop; the same command starts again"
    tell(f"error: {text}")
    # In a thread, because `leave` may wait for a lock that this thread held when the signal came.
    leave = threading.Thread(target=processes.leave, args=(75, text), daemon=True)
    leave.start()
    leave.join(40)
    os._exit(75)
