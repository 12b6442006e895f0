"""Whole runs on tiny generated files, through `launch.py`: what the tests of its parts share.

Importing it turns on a compilation cache that lives as long as the test session: equal models then
compile once, in this process and in those that it starts.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import devices
import filelock
import jax
import numpy as np
import orbax.checkpoint as ocp

import launch
from gptjax.cli import main as cli

LAUNCH = os.path.abspath(launch.__file__)
_SUBJECTS = ("the cat", "a dog", "the old man", "my friend", "a small bird", "the king")
_VERBS = ("sat on", "saw", "ran to", "looked at", "sang near", "fell from")
_OBJECTS = ("a tree", "the house", "the river", "a wall", "the garden", "a stone")

TINY = (
    "--config.model.num_layers=1", "--config.model.width=16", "--config.model.num_heads=2",
    "--config.model.context_length=16", "--config.model.unroll=1", "--config.model.init_std=0.2",
    # One size whatever the text, so that all runs share their compiled programs.
    "--config.model.vocab_size=96", "--config.tokenizer.vocab_size=80",
    "--config.model.embedding_dropout=0", "--config.model.attention_dropout=0",
    "--config.model.residual_dropout=0", "--config.model.head_dropout=0",
)  # fmt: skip
"""A model that trains in a second."""

_ROOT = pathlib.Path(os.environ["GPTJAX_TESTS_FOLDER"])
_CACHE = {
    # A folder for each worker: JAX writes entries in place, so that others could read half of one.
    "jax_compilation_cache_dir": str(_ROOT / f"xla-{os.getpid()}"),
    "jax_enable_compilation_cache": True,
    "jax_persistent_cache_min_compile_time_secs": 0.1,
}
for _name, _value in _CACHE.items():
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)


cli.quiet_orbax()  # some tests damage checkpoints


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of few words."""
    rng = random.Random(seed)
    parts = (_SUBJECTS, _VERBS, _OBJECTS)
    return [" ".join(rng.choice(part) for part in parts) for _ in range(count)]


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Labelled rows; the label is what the first word says."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        label = rng.choice(("no", "yes"))
        words = ("good" if label == "yes" else "bad", rng.choice(_SUBJECTS), rng.choice(_OBJECTS))
        found.append({"text": " ".join(words), "label": label})
    return found


def write(path: pathlib.Path, data: str | bytes | list[dict[str, Any]]) -> str:
    """Writes text, bytes, or rows as CSV (their cells hold no comma and no quote)."""
    if isinstance(data, list):
        lines = [list(data[0])] + [list(row.values()) for row in data]
        data = "".join(",".join(map(str, line)) + "\n" for line in lines)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


@dataclasses.dataclass(frozen=True)
class Files:
    """The data of the shared runs."""

    text: str
    train: str
    validation: str
    test: str

    @property
    def pretrain(self) -> tuple[str, ...]:
        """Flags of a pretraining of 20 steps with validations at 10 and 20."""
        return (
            "--config.pretrain.dataset=", f"--config.pretrain.train_files={self.text}",
            "--config.pretrain.batch_size=8", "--config.pretrain.steps=20",
            "--config.pretrain.eval_every=10", "--config.pretrain.optimizer.warmup_steps=2",
            "--config.pretrain.optimizer.learning_rate=0.01",
        )  # fmt: skip

    @property
    def finetune(self) -> tuple[str, ...]:
        """Flags of a fine-tuning of 40 steps with a validation every 8."""
        return (
            "--config.finetune.dataset=", f"--config.finetune.train_file={self.train}",
            f"--config.finetune.validation_file={self.validation}",
            f"--config.finetune.test_file={self.test}",
            "--config.finetune.batch_size=8", "--config.finetune.steps=40",
            "--config.finetune.compare_from_scratch=false", "--config.finetune.baseline=none",
            "--config.finetune.optimizer.learning_rate=0.02",
        )  # fmt: skip


@functools.cache
def files() -> Files:
    """Text, and 64 + 21 + 19 labelled rows: sizes that no batch divides."""
    folder = _ROOT / "data"
    names = ("text.txt", "train.csv", "validation.csv", "test.csv")
    with filelock.FileLock(_ROOT / "data.lock"):
        if not folder.exists():
            folder.mkdir()
            contents = "".join(f"{text}.\n" for text in sentences(300))
            for name, data in zip(
                names, (contents, rows(64, 1), rows(21, 2), rows(19, 3)), strict=True
            ):
                write(folder / name, data)
    return Files(*(str(folder / name) for name in names))


@functools.cache
def trained() -> str:
    """A workdir with both stages, for reading only."""
    workdir = str(_ROOT / "trained")
    # The workers share it: the first one that needs it trains it, the others wait.
    with filelock.FileLock(_ROOT / "trained.lock"):
        if not os.path.exists(os.path.join(workdir, "summary.json")):
            flags = (*TINY, *files().pretrain, *files().finetune, f"--workdir={workdir}")
            with devices.use(1):  # the same model, whichever test comes first
                result = main(*flags)
            assert result.code == 0, result.err
    return workdir


def copy(path: pathlib.Path) -> str:
    """A copy of `trained()` to do harm to."""
    return str(shutil.copytree(trained(), path / "copy"))


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command left: exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a command that was refused."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("error: "), self.err
        return self.err.strip()


def main(*arguments: str) -> Result:
    """`python launch.py ARGUMENTS` in this process (on the devices of the test)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(cli.parse(["launch.py", *arguments]))
        except SystemExit as end:
            code = end.code
    return Result(code, out.getvalue(), err.getvalue())


_running: list[subprocess.Popen] = []
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _usual_signals() -> Iterator[None]:
    """Signals that the tests themselves ignore (under nohup, in the background of a script).

    A new process inherits what is ignored. Meanwhile they have their usual effect.
    """
    ignored = [each for each in _SIGNALS if signal.getsignal(each) == signal.SIG_IGN]
    for each in ignored:
        signal.signal(each, signal.SIG_DFL)
    try:
        yield
    finally:
        for each in ignored:
            signal.signal(each, signal.SIG_IGN)


def spawn(command: Sequence[str], **kwargs: Any) -> subprocess.Popen:
    """Starts a command with pipes for its output; it ends with the test that started it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with _usual_signals():
        process = subprocess.Popen(command, text=True, **(pipes | kwargs))
    _running.append(process)
    return process


def kill_running() -> list[int]:
    """Kills the processes of `spawn` that still run; returns their numbers."""
    left = [process for process in _running if process.poll() is None]
    _running.clear()
    for process in left:
        process.kill()
        process.wait()
    return [process.pid for process in left]


def start(*arguments: str, under: Sequence[str] = (), **kwargs: Any) -> subprocess.Popen:
    """`python launch.py ARGUMENTS` in another process, with one device; `under` another command."""
    return spawn([*under, sys.executable, LAUNCH, *arguments], **kwargs)


def start_several(
    count: int,
    *arguments: str,
    devices: int = 1,
    each: Callable[[int], Sequence[str]] = lambda _: (),
    present: Sequence[int] = (),
    port: int = 0,
    **kwargs: Any,
) -> list[subprocess.Popen]:
    """The same in some processes that are one run.

    Args:
      count: of processes.
      arguments: of all.
      devices: of each.
      each: process -> more arguments.
      present: which of them to start; all.
      port: of process 0; a free one.
      **kwargs: of `start`.
    """
    port = port or free_port()
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    found = []
    for index in present or range(count):
        together = (
            f"--coordinator_address=localhost:{port}", f"--num_processes={count}",
            f"--process_id={index}", "--initialization_timeout=100",
        )  # fmt: skip
        flags = (*arguments, *(together if count > 1 else ()), *each(index))
        found.append(start(*flags, env=environment, **kwargs))
    return found


def finish(process: subprocess.Popen, timeout: float = 250) -> Result:
    """Waits for the end of a process; one that hangs is killed, and says what it had said."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"no end in {timeout:g} s: {out}{err}") from None
    return Result(process.returncode, out, err)


def free_port() -> int:
    """A port that no one listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def steps(workdir: str, stage: str) -> list[int]:
    """The finished checkpoints of a stage, oldest first."""
    folder = pathlib.Path(workdir, "checkpoints", stage)
    if not folder.exists():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def arrays(workdir: str, stage: str, step: int) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Path -> (dtype, shape, bytes) of every array of a checkpoint, read without gptjax."""
    found = {}
    reader = ocp.PyTreeCheckpointer()
    for item in ("params", "optimizer"):
        path = os.path.abspath(os.path.join(workdir, "checkpoints", stage, str(step), item))
        tree = reader.metadata(path).item_metadata.tree
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        for key, value in jax.tree_util.tree_leaves_with_path(
            reader.restore(path, restore_args=numpy)
        ):
            value = np.asarray(value)
            name = item + jax.tree_util.keystr(key)
            found[name] = (str(value.dtype), value.shape, value.tobytes())
    reader.close()
    return found


def records(workdir: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; they hold no times."""
    text = pathlib.Path(workdir, "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def snapshot(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """Path -> contents of every file below a folder."""
    root = pathlib.Path(folder)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def summary(workdir: str) -> dict[str, Any]:
    """summary.json."""
    return json.loads(pathlib.Path(workdir, "summary.json").read_text())
