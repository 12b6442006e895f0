"""The processes of a run: their start, the values that they exchange, and their end.

`jax.distributed` connects the devices of all processes and transfers arrays between them. The
cluster detection of JAX (TPU VMs, GKE, Slurm, Open MPI) finds the number of processes and the index
of this process. Before `jax.distributed` starts, the module `rendezvous` checks that all processes
have started. After that, the module `group` notices lost processes. In a run of one process the
functions of this module do not wait, and use only the values of this process.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from etils import epath

from gptjax import __version__
from gptjax.cluster.group import Group
from gptjax.cluster.rendezvous import host_rendezvous, join_rendezvous, reject_all
from gptjax.errors import ProcessLost, UserError, require
from gptjax.io import files, remote

_FLAGS = "`coordinator_address`, `num_processes` and `process_id`"
# JAX's heartbeat timeout is this many seconds longer than the timeout of `group`. So `group`
# notices a lost process first and can name it. JAX would abort without naming it.
_JAX_LATER = 60
# The time that a network disk has to show a new file to all hosts, in seconds.
_SEEN_SECONDS = 10.0
_TOKEN = ".seen-by-all"

_group: Group | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command line that describe the processes of a run.

    The first three are the address of process 0, the number of processes, and the index of this
    process.
    """

    coordinator_address: str = ""
    num_processes: int | None = None
    process_id: int | None = None
    initialization_timeout: int = 300
    """The number of seconds within which all processes must start."""
    heartbeat_timeout: int = 100
    """The number of seconds without a message after which a process counts as lost."""


@dataclasses.dataclass(frozen=True)
class Place:
    """The index of this process, and the address at which it can reach process 0."""

    address: str
    """HOST:PORT of process 0."""
    count: int
    """The number of processes."""
    index: int
    explicit: bool
    """Whether these values come from the options. Otherwise JAX's cluster detection found them."""


def place(options: Options) -> Place | None:
    """Returns the place of this process. None means that the run has only this process.

    The place comes from the options. Without them, JAX detects it from the environment.

    Raises:
      ProcessLost: the name of process 0's host could not be resolved in time.
      UserError: an option is wrong, or only some of the three options are set.
    """
    given = (options.coordinator_address or None, options.num_processes, options.process_id)
    if given == (None, 1, None):  # the option `num_processes`=1 alone switches the detection off
        return None
    if given == (None, None, None):
        return _detect(options.initialization_timeout)
    require(None not in given, f"{_FLAGS} go together; give all three, or none")
    address, count, index = cast(tuple[str, int, int], given)
    host, _, port = address.rpartition(":")
    require(
        host and port.isascii() and port.isdecimal() and 0 < int(port) < 65536,
        f"`coordinator_address`={address}: must be HOST:PORT of process 0",
    )
    require(count > 0, f"`num_processes`={count}: must be at least 1")
    require(0 <= index < count, f"`process_id`={index}: must be 0 to {count - 1}")
    return Place(address, count, index, True) if count > 1 else None


def _detect(timeout: int) -> Place | None:
    """Returns the place that JAX's cluster detection finds. None means fewer than two processes."""
    env = os.environ
    slurm = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
    mpi = int(env.get("OMPI_COMM_WORLD_SIZE") or 1)
    pods = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    # The detection of Slurm, Open MPI and Kubernetes is skipped if their variables do not describe
    # several processes. JAX would regard an interactive shell of Slurm, or any pod, as one process
    # of a larger job.
    several = {"slurm": slurm > 1, "ompi": mpi > 1, "k8s": pods}

    # This module of JAX is private. The public function, `jax.distributed.initialize`, would not
    # only detect the processes but also connect them.
    from jax._src import clusters

    kinds = [
        kind for kind in clusters.ClusterEnv._cluster_types
        if not kind.opt_in_only_method and several.get(_kind(kind), True)
    ]  # fmt: skip
    kind = next((kind for kind in kinds if kind.is_env_present()), None)
    if kind is None:
        what = "Open MPI" if mpi > 1 else "Kubernetes" if pods else ""
        require(
            not what,
            f"{what} says that this is one of several processes, but jax cannot tell where process "
            f"0 is; give {_FLAGS}, or `num_processes`=1 for a process of its own",
        )
        return None
    count = kind.get_process_count()
    if count < 2:
        return None
    address, port = env.get("JAX_COORDINATOR_ADDRESS"), env.get("JAX_COORDINATOR_PORT")
    try:
        address = address or kind.get_coordinator_address(timeout, port)
    except RuntimeError as error:  # the host name of process 0 is unknown until its host starts
        raise ProcessLost(f"process 0 of {count} was not found in {timeout} s ({error})") from error
    return Place(address, count, kind.get_process_id(), False)


def _kind(kind: Any) -> str:
    return "k8s" if kind.__name__.startswith("K8s") else str(kind.name)


def _code() -> str:
    """Returns a hash of the source files of gptjax."""
    digest = hashlib.blake2b(digest_size=8)
    root = pathlib.Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        # The hash leaves out the folder `experiments`, because only an installed package has it.
        # The processes of a training compare their configurations in another place.
        if name.parts[0] != "experiments":
            digest.update(str(name).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def start(options: Options, mode: str = "train") -> None:
    """Connects this process to the other processes of the run, if the run has several.

    It must be called before JAX's first computation.

    Args:
      options: the options of the command line.
      mode: the mode of the command line. All modes except "train" run in one process.

    Raises:
      ProcessLost: a process did not start.
      UserError: an option is wrong, or a process has another version of gptjax or JAX.
    """
    global _group
    here = place(options)
    if here is None:
        return
    require(
        mode == "train",
        f"`mode`={mode}: runs in one process, and this is one of {here.count}; start it once, with "
        "`num_processes`=1 where the environment speaks of more",
    )
    import jax

    facts = {
        "host": socket.gethostname(), "gptjax": __version__, "gptjax code": _code(),
        "jax": jax.__version__,
    }  # fmt: skip
    wait, silence = options.initialization_timeout, options.heartbeat_timeout
    if here.index == 0:
        links, everyone = host_rendezvous(here.address, here.count, facts, wait, silence)
        problem = _different([{**each, "host": ""} for each in everyone], _hosts(everyone))
        if problem:
            reject_all(links, problem)
            raise UserError(problem)
        host, _, port = here.address.rpartition(":")
        answer: dict[str, Any] = {
            "address": f"{host}:{_port_after(int(port))}",
            "hosts": [each["host"] for each in everyone],
        }
        for link in links.values():
            link.send(answer)
    else:
        link, answer = join_rendezvous(here.address, here.index, here.count, facts, wait, silence)
        links = {0: link}
    _group = Group(here.index, answer["hosts"], links, silence)
    # This service of JAX is switched off, because it would replace our handler of SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        answer["address"], here.count, here.index,
        cluster_detection_method="deactivate" if here.explicit else None,
        initialization_timeout=wait, heartbeat_timeout_seconds=silence + _JAX_LATER,
    )  # fmt: skip


def _hosts(everyone: list[dict[str, Any]]) -> list[str]:
    return [f"process {i} of {len(everyone)} ({each['host']})" for i, each in enumerate(everyone)]


def _port_after(port: int) -> int:
    """Returns the next port, or any free port if the next port is in use.

    The next port is known before the run, so a firewall can be opened for it.
    """
    for candidate in (port + 1, 0):
        with contextlib.suppress(OSError, OverflowError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", candidate))
            return int(probe.getsockname()[1])
    raise OSError("no free port")


def count() -> int:
    """Returns the number of processes."""
    return _group.count if _group else 1


def is_main() -> bool:
    """Returns whether this is process 0, which alone writes files and prints for the run."""
    return _group is None or _group.index == 0


def gather(what: str, value: Any) -> list[Any]:
    """Returns the values of all processes, in their order. All processes must call `gather`.

    Args:
      what: a description of the values, for messages about a process that is late or that makes
        another call.
      value: the value of this process, which JSON must be able to represent.
    """
    return [value] if _group is None else _group.gather(what, value)


def barrier(what: str) -> None:
    """Waits until all processes have called `barrier`. Messages describe the call with `what`."""
    gather(what, None)


def broadcast(what: str, read: Callable[[], Any]) -> Any:
    """Calls `read` in process 0, and returns its result in all processes.

    Args:
      what: a description of the result for messages.
      read: a function whose result JSON must be able to represent.

    Raises:
      UserError: `read` raised it in process 0. All processes then raise it.
    """
    if _group is None:
        return read()
    found, problem = None, None
    if _group.index == 0:
        try:
            found = read()
        except UserError as error:
            problem = str(error)
    found, problem = gather(what, [found, problem])[0]
    require(problem is None, str(problem))
    return found


def run_everywhere(what: str, run: Callable[[], Any]) -> Any:
    """Calls `run` in each process and returns its result in this process.

    If `run` fails in one process, then all processes raise an error. So no process waits for
    another process that has failed.

    Args:
      what: a description of the call for messages.
      run: a function that may raise any `Exception`.

    Raises:
      Exception: `run` raised it in this process.
      RuntimeError: `run` failed in another process. The message names this process.
    """
    if _group is None:
        return run()
    found, failure = None, None
    try:
        found = run()
    except Exception as error:
        failure = error
    texts = gather(what, None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for index, text in enumerate(texts):
        if text is not None:
            raise RuntimeError(f"{_group.name(index)}: {text}")
    return found


def require_same(facts: Mapping[str, Any]) -> None:
    """Requires that all processes call `require_same` with equal facts.

    Args:
      facts: name -> a value that JSON can represent, or a dictionary of such values.

    Raises:
      UserError: the facts of a process differ from the facts of process 0. All processes raise it.
        It names the first such process and the facts that differ.
    """
    everyone = gather(" and ".join(facts), dict(facts))
    if _group is not None:
        problem = _different(everyone, [_group.name(index) for index in range(_group.count)])
        require(not problem, problem)


def wait_until_same(what: str, read: Callable[[], Any], again: Callable[[], None]) -> None:
    """Waits until `read` returns the same value in all processes.

    Args:
      what: a description of the value for messages.
      read: a function whose result JSON must be able to represent.
      again: a function that refreshes what `read` reads. It is called while the processes differ.

    Raises:
      UserError: the processes still differ after some seconds. All processes raise it.
    """
    for left in range(int(_SEEN_SECONDS), -1, -1):
        everyone = gather(what, read())
        if all(each == everyone[0] for each in everyone):
            return
        if left:
            time.sleep(1.0)
            again()
    require_same({what: read()})


def _shown(name: str) -> str:
    """Returns the name of a fact for messages. A field of the configuration gets backquotes."""
    field = name.removeprefix("config.")
    return name if field == name else f"`{field}`"


def _different(everyone: list[dict[str, Any]], names: list[str]) -> str:
    """Returns a message about the first process that differs from process 0, "" if none does.

    Args:
      everyone: the facts of each process.
      names: the name of each process for messages.
    """
    from flax.traverse_util import flatten_dict

    flat = [flatten_dict(values, sep=".") for values in everyone]
    first = flat[0]
    for index, values in enumerate(flat):
        wrong = [name for name in first | values if first.get(name) != values.get(name)]
        if wrong:
            parts = [
                f"{_shown(name)} {values.get(name)!r}, not {first.get(name)!r}"
                for name in wrong[:3]
            ]
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            return (
                f"{names[index]} differs from process 0: {'; '.join(parts)}{more}; start all "
                "processes with the same command, code and data"
            )
    return ""


def require_shared(folder: str) -> None:
    """Requires that all processes see a file that process 0 writes to a folder.

    If the path is a different folder on each host's own disk, a run would train, but it could not
    restore a checkpoint.

    Raises:
      UserError: a process does not see the file. All processes raise it.
    """
    if _group is None:
        return
    path = remote.absolute(folder) / _TOKEN
    token = broadcast("the workdir", lambda: _write_token(path))
    end = time.monotonic() + _SEEN_SECONDS  # network disks may show new files late
    while not (seen := _reads(path, token)) and time.monotonic() < end:
        time.sleep(0.1)
    everyone = gather("the workdir", seen)
    if _group.index == 0:
        path.unlink(missing_ok=True)
    for index, each in enumerate(everyone):
        require(
            each,
            f"`workdir`={folder}: {_group.name(index)} does not see what process 0 wrote there; it "
            "must be a folder that all processes share",
        )


def _write_token(path: epath.Path) -> str:
    token = secrets.token_hex(8)
    files.write_atomically(path, token.encode())
    return token


def _reads(path: epath.Path, text: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(path.read_text() == text)
    return False


def synchronised_stop(asked: Callable[[], bool]) -> Callable[[], bool]:
    """Returns a function like `asked` that first returns True at the same call in all processes.

    All processes must call this function equally often.

    Args:
      asked: a function that returns whether this process was asked to stop.
    """
    return asked if _group is None else _group.synchronised_stop(asked)


def wait_for_news() -> None:
    """Waits some seconds after an error. If another process was lost, this process ends here."""
    if _group is not None:
        _group.wait_for_news()


def leave(code: int, text: str = "") -> None:
    """Tells the other processes that this process ends, and ends it.

    In a run of one process it does nothing.

    Args:
      code: the exit code of this process.
      text: the reason of the end, for the messages of the other processes.
    """
    if _group is None:
        return
    _group.leave(code, text)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # `os._exit` skips the handlers that Python calls at its end. The handler of JAX would wait for
    # the other processes, which might have ended already.
    os._exit(code)
