"""Several processes: start-up, agreement, and their ends.

`jax.distributed` joins the devices and carries the arrays. Its own cluster detection (TPU VMs, GKE,
Slurm, Open MPI) tells who we are; `group` calls the roll before and watches after. With one process
everything here is nothing: functions return what they were given.
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
from typing import Any

from etils import epath

from gptjax import __version__
from gptjax.cluster.group import Group
from gptjax.cluster.rendezvous import host_rendezvous, join_rendezvous, reject_all
from gptjax.errors import ProcessLost, UserError, require
from gptjax.io import remote

_FLAGS = "`coordinator_address`, `num_processes` and `process_id`"
# Above our own: JAX ends a process without a word.
_JAX_LATER = 60
_SEEN_SECONDS = 10.0
_TOKEN = ".seen-by-all"

_group: Group | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of `launch.py`."""

    coordinator_address: str = ""
    num_processes: int | None = None
    process_id: int | None = None
    initialization_timeout: int = 300
    """Seconds for all processes to come up."""
    heartbeat_timeout: int = 100
    """Seconds of silence after which a process counts as lost."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process of how many this is, and where process 0 listens."""

    address: str
    count: int
    index: int
    explicit: bool


def place(options: Options) -> Place | None:
    """Returns the place of this process, by the flags or the environment; None: it is alone.

    Raises:
      ProcessLost: the environment names a machine of process 0 that did not come up.
      UserError: some of the flags without the others, or values that cannot be.
    """
    given = (options.coordinator_address or None, options.num_processes, options.process_id)
    if given == (None, 1, None):  # switches the detection off
        return None
    if given == (None, None, None):
        return _detect(options.initialization_timeout)
    require(None not in given, f"{_FLAGS} go together; give all three, or none")
    address, count, index = options.coordinator_address, given[1], given[2]
    assert count is not None
    assert index is not None
    host, _, port = address.rpartition(":")
    require(
        host and port.isascii() and port.isdecimal() and 0 < int(port) < 65536,
        f"`coordinator_address`={address}: must be HOST:PORT of process 0",
    )
    require(count > 0, f"`num_processes`={count}: must be at least 1")
    require(0 <= index < count, f"`process_id`={index}: must be 0 to {count - 1}")
    return Place(address, count, index, True) if count > 1 else None


def _detect(timeout: int) -> Place | None:
    """What the environment says, where it says that there are several processes."""
    env = os.environ
    slurm = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
    mpi = int(env.get("OMPI_COMM_WORLD_SIZE") or 1)
    pods = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    # An interactive shell of Slurm, and a pod that is no part of a job, are alone.
    hidden = [] if slurm > 1 else ["slurm"]
    hidden += [] if mpi > 1 else ["ompi"]
    hidden += [] if pods else ["k8s"]

    from jax._src import clusters  # nothing public tells without also starting

    kinds = [
        kind for kind in clusters.ClusterEnv._cluster_types
        if not kind.opt_in_only_method and _kind(kind) not in hidden
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
    except RuntimeError as error:  # its name is not known yet: the machine did not come up
        raise ProcessLost(f"process 0 of {count} was not found in {timeout} s ({error})") from error
    return Place(address, count, kind.get_process_id(), False)


def _kind(kind: Any) -> str:
    return "k8s" if kind.__name__.startswith("K8s") else str(kind.name)


def _code() -> str:
    """Returns a hash of the sources of gptjax."""
    digest = hashlib.blake2b(digest_size=8)
    root = pathlib.Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        # The experiments are in the package only once it is installed; their fields are compared.
        if name.parts[0] != "experiments":
            digest.update(str(name).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def start(options: Options, mode: str = "train") -> None:
    """Joins the processes of this run, if there are several. Before JAX's first computation.

    Raises:
      ProcessLost: a process did not come up.
      UserError: wrong flags, or a process of another version.
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
    # Its handler of SIGTERM would take the place of ours.
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
    """The next port, which a firewall may be told of; where it is taken, a free one."""
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
    """Returns whether this is process 0, which writes and prints for all."""
    return _group is None or _group.index == 0


def gather(what: str, value: Any) -> list[Any]:
    """Returns the value (plain, for JSON) of each process; every process has to call it.

    `what` names it where one process waits for long, or is at something else.
    """
    return [value] if _group is None else _group.gather(what, value)


def barrier(what: str) -> None:
    """Waits until every process is here."""
    gather(what, None)


def broadcast(what: str, read: Callable[[], Any]) -> Any:
    """Returns what `read` returns in process 0 (plain, for JSON); its `UserError` in all."""
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
    """Returns `run()`; where it fails in one process it fails in all, so that none waits for ever.

    Raises:
      The error of this process, or a `RuntimeError` that names the process that failed.
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
    """Compares what has to be equal in all processes: name -> a plain value, or a dict of them.

    Raises:
      UserError: in all of them, with the first process that differs from process 0, and in what.
    """
    everyone = gather(" and ".join(facts), dict(facts))
    if _group is not None:
        problem = _different(everyone, [_group.name(index) for index in range(_group.count)])
        require(not problem, problem)


def wait_until_same(what: str, read: Callable[[], Any], again: Callable[[], None]) -> None:
    """Waits until `read` returns the same (plain, for JSON) in all processes.

    Args:
      what: is read.
      read: returns it.
      again: makes `read` look again, where the processes differ.

    Raises:
      UserError: in all of them, if they still differ after some seconds.
    """
    for left in range(int(_SEEN_SECONDS), -1, -1):
        everyone = gather(what, read())
        if all(each == everyone[0] for each in everyone):
            return
        if left:
            time.sleep(1.0)
            again()
    require_same({what: read()})


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _shown(name: str) -> str:
    """The name of a fact in a message; fields of the configuration in backquotes."""
    field = name.removeprefix("config.")
    return name if field == name else f"`{field}`"


def _different(everyone: list[dict[str, Any]], names: list[str]) -> str:
    """What the first process that differs from process 0 differs in, "" if none does."""
    first = _flat(everyone[0])
    for index, values in enumerate(map(_flat, everyone)):
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
    """Raises `UserError` in all processes if one does not see what process 0 writes in a folder.

    Folders that look alike, each on its own host's disk, would do until a checkpoint is restored.
    """
    if _group is None:
        return
    path = remote.absolute(folder) / _TOKEN
    token = broadcast("the workdir", lambda: _write(path, secrets.token_hex(8)))
    end = time.monotonic() + _SEEN_SECONDS  # network disks show new files late
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


def _write(path: epath.Path, text: str) -> str:
    try:
        path.write_text(text)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space, fix its permissions, or "
            "choose another `workdir`"
        ) from error
    return text


def _reads(path: epath.Path, text: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(path.read_text() == text)
    return False


def synchronised_stop(asked: Callable[[], bool]) -> Callable[[], bool]:
    """Returns `asked` so that it becomes true at the same call in all processes."""
    return asked if _group is None else _group.synchronised_stop(asked)


def wait_for_news() -> None:
    """After an error that another process may have caused; ends this one if so."""
    if _group is not None:
        _group.wait_for_news()


def leave(code: int, text: str = "") -> None:
    """Ends a process of several with an exit code, and tells the others; alone it does nothing."""
    if _group is None:
        return
    _group.leave(code, text)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # Not through Python's end: JAX would wait there for processes that may be gone.
    os._exit(code)
