"""What a person sees of a run while it trains, and the files it leaves behind.

Everything here takes host numbers and writes from one process: the others pass ``enabled=False``.
"""

import contextlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath

from gptjax.errors import UserError
from gptjax.io import remote as storage
from gptjax.io.remote import PathLike

STAGES = ("pretrain", "finetune", "finetune_from_scratch")
"""The order in which the stages of a run follow each other."""


_PLAIN_LINE_SECONDS = _FLUSH_SECONDS = 10.0

T = TypeVar("T")


@contextlib.contextmanager
def disk_errors(path: PathLike) -> Iterator[None]:
    """Turns a full or read-only disk into a `UserError`: one line that names the path.

    Of a bucket, rights alone: that it cannot be reached for a while is not the user's to mend.
    """
    try:
        yield
    except OSError as error:
        refused = isinstance(error, PermissionError) or "orbidden" in str(error)
        if storage.is_remote(path) and not refused:
            raise
        raise UserError(
            f"cannot write {os.fspath(path)}: {error.strerror or error}; "
            "free space, fix its permissions, or choose another folder"
        ) from error


def write_atomically(path: PathLike, data: bytes) -> None:
    """Puts `data` at `path`, making its folder, so that no reader ever sees half a file."""
    if storage.is_remote(path):
        with disk_errors(path):
            epath.Path(path).write_bytes(data)
        return
    folder, name = os.path.split(os.path.abspath(path))
    # Not `tempfile`: its files are readable by their owner only, and would stay so.
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    with disk_errors(path):
        os.makedirs(folder, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise


def json_ready(value: Any) -> Any:
    """`value` with NumPy numbers as Python's, and NaN and infinities, which JSON lacks, as null."""
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(v) for v in value]
    if isinstance(value, np.generic | np.ndarray):
        return json_ready(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def machine() -> str:
    """Returns what a measurement was made on: "2 x Intel(R) Xeon(R) ..., jax 0.10.2".

    With what the C library was told about its memory, by the launcher or by the user.
    """
    device = jax.devices()[0]
    count, kind = jax.device_count(), device.device_kind
    if device.platform == "cpu":
        count, kind = os.cpu_count() or 1, platform.processor() or platform.machine()
        with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
            kind = next(line for line in lines if "model name" in line).partition(":")[2].strip()
    memory = os.environ.get("GLIBC_TUNABLES", "") if device.platform == "cpu" else ""
    return (
        f"{count} x {kind}, Python {platform.python_version()}, jax {jax.__version__}"
        f"{memory and f', GLIBC_TUNABLES={memory}'}"
    )


def write_json(path: PathLike, obj: Any) -> None:
    """Writes `obj` as JSON, atomically, keys in their order; `UserError` when the disk refuses."""
    write_atomically(path, json.dumps(json_ready(obj), indent=2, allow_nan=False).encode() + b"\n")


def say(text: str) -> None:
    """Prints a line on stderr, from the first process."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def print_json(obj: Any, path: PathLike = "") -> None:
    """Prints `obj` as JSON, and writes it to `path` unless empty, both from the first process."""
    if jax.process_index() == 0:
        print(json.dumps(json_ready(obj), indent=2))
        if path:
            write_json(path, obj)


def read_json(path: PathLike) -> Any:
    """Reads a JSON file; a missing or broken one is a `UserError`."""
    try:
        return json.loads(epath.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{os.fspath(path)}: cannot be read as JSON ({error})") from error


def _lines(path: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of metrics.jsonl and their records, without what a killed process left."""
    with contextlib.suppress(FileNotFoundError):
        for line in epath.Path(path).read_bytes().splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if line.endswith(b"\n") and {"step", "stage", "split"} <= set(record):
                    yield line, record


def read(workdir: PathLike) -> list[dict[str, Any]]:
    """The records of ``WORKDIR/metrics.jsonl``, oldest first; [] when there is none."""
    return [record for _, record in _lines(os.path.join(workdir, "metrics.jsonl"))]


def _event(**fields: Any) -> bytes:
    """A TensorBoard event; messages inside it are given as dicts."""
    from tensorboardX.proto import event_pb2

    return event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()


def _open_events(folder: str, purge_from: int | None) -> Any:
    """A new file of events in `folder`, which tells TensorBoard to forget older ones' last steps.

    Not tensorboardX' SummaryWriter: its queue blocks for ever once a full disk has killed its
    thread, and two of its files made in one second are the same file.
    """
    from tensorboardX import RecordWriter, record_writer

    if storage.is_remote(folder):
        record_writer.register_writer_factory("gs", storage.RemoteFiles)
    else:
        os.makedirs(folder, exist_ok=True)
    # TensorBoard reads the files of a folder in the order of their names.
    writer = RecordWriter(os.path.join(folder, f"events.out.tfevents.{time.time_ns()}"))
    writer.write(_event(file_version="brain.Event:2"))
    if purge_from is not None:
        writer.write(_event(step=purge_from, session_log={"status": "START"}))
    return writer


class MetricsLog:
    """``metrics.jsonl`` in a working directory, and the same numbers under ``tensorboard/``.

    A line is ``{"step", "stage", "split", NAME: float or null, ...}``, of a training step with the
    ``"ledger"`` of its batches (see `train.ledger`), on disk when `write` returns; in a bucket,
    which cannot append, some seconds later, or when `sync` returns. Use as a
    context manager, or call `close`. A full disk is a `UserError` everywhere.

    Args:
      workdir: made if missing.
      enabled: False in every process but one: all methods then do nothing.
    """

    def __init__(self, workdir: PathLike, enabled: bool = True):
        self._enabled = enabled
        self._workdir = workdir
        self._path = os.path.join(workdir, "metrics.jsonl")
        self._events_dir = os.path.join(workdir, "tensorboard")
        self._events: dict[str, Any] = {}
        self._next_flush = 0.0
        self._purge_from: dict[str, int] = {}
        if enabled:
            self._open(lambda record: True)

    def _open(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        # Rewritten even to keep all: a new line must not be glued to half a line.
        with disk_errors(self._path):
            kept = b"".join(line for line, record in _lines(self._path) if keep(record))
        write_atomically(self._path, kept)
        with disk_errors(self._path):
            remote = storage.is_remote(self._path)
            self._file: Any = (
                storage.RemoteFile(self._path, kept) if remote else open(self._path, "ab")  # noqa: SIM115
            )

    def write(
        self, stage: str, split: str, step: int, values: Mapping[str, float], ledger: str = ""
    ) -> None:
        """Adds one line. `values` are host numbers; one that is not finite is written as null."""
        if not self._enabled:
            return
        floats = {name: float(value) for name, value in values.items()}
        record = {"step": int(step), "stage": stage, "split": split, **floats}
        if ledger:
            record["ledger"] = ledger
        due = time.monotonic() > self._next_flush
        with disk_errors(self._path):
            self._file.write(json.dumps(json_ready(record)).encode() + b"\n")
            if due or not storage.is_remote(self._path):
                self._file.flush()
        tagged = [(f"{stage}/{split}/{name}", v) for name, v in floats.items() if math.isfinite(v)]
        scalars = [{"tag": tag, "simple_value": value} for tag, value in tagged]
        with disk_errors(self._events_dir):
            if stage not in self._events:
                # A folder for each stage, because steps, and what to forget, start again in each.
                folder = os.path.join(self._events_dir, stage)
                self._events[stage] = _open_events(folder, self._purge_from.pop(stage, None))
            self._events[stage].write(_event(step=int(step), summary={"value": scalars}))
            if due:  # it waits for the disk: not on every line
                self._events[stage].flush()
                self._next_flush = time.monotonic() + _FLUSH_SECONDS

    def sync(self) -> None:
        """Puts the lines where a kill cannot reach them: for before a state is saved."""
        if self._enabled:
            with disk_errors(self._path):
                self._file.flush()

    def rewind(self, stage: str, step: int) -> None:
        """Forgets what follows `step` of `stage`, one of `STAGES`: a resumed run repeats it.

        So is the score on the test split, which comes last. Other stages are left alone: each
        rewinds itself when it starts.
        """
        if not self._enabled:
            return
        self.close()

        def comes_before(record: dict[str, Any]) -> bool:
            earlier = record["step"] <= step and record["split"] != "test"
            return record["stage"] != stage or earlier

        self._open(comes_before)
        self._purge_from = {stage: step + 1}

    def write_once(self, stage: str, split: str, step: int, values: Mapping[str, float]) -> None:
        """Writes a record unless there is one: a kill may come between a save and its record."""
        key = {"stage": stage, "split": split, "step": step}
        self.sync()
        if not self._enabled or any(key.items() <= old.items() for old in read(self._workdir)):
            return
        self.write(stage, split, step, values)

    def close(self) -> None:
        """Flushes and closes all files."""
        if self._enabled:
            with disk_errors(self._path):
                self._file.close()
            events, self._events = self._events, {}
            with disk_errors(self._events_dir):
                for writer in events.values():
                    writer.flush()
                    writer.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Progress:
    """Step, loss, tokens per second and time left on stderr: a bar, or lines if no terminal.

    Speed and time left are measured from the end of the first update, which compiles. Every process
    may read `tokens_per_second`; only an enabled one writes. A context manager.

    Args:
      stage: shown at the front.
      total_steps: the last step of the stage.
      start_step: steps done before (a resumed run).
      enabled: whether to write.
    """

    def __init__(self, stage: str, total_steps: int, start_step: int = 0, enabled: bool = True):
        self._stage, self._total, self._enabled = stage, total_steps, enabled
        self._tokens, self._seconds, self._waited = 0, 0.0, 0.0
        self._first_step: int | None = None
        self._last_time = self._last_line = -math.inf
        self._bar = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            # Not tqdm's own rate: it counts the compilation, and evaluations.
            layout = "{desc} {n_fmt}/{total_fmt} |{bar}| {postfix}"
            shape: dict[str, Any] = {"bar_format": layout, "dynamic_ncols": True}
            self._bar = tqdm(desc=stage, total=total_steps, initial=start_step, **shape)

    @property
    def tokens_per_second(self) -> float:
        """Since the first update, without pauses; 0.0 before the second."""
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def input_wait(self) -> float:
        """Share of that time in which the host waited for a batch; 0.0 before the second update.

        The device may have had work then: what training lost is at most this.
        """
        return self._waited / self._seconds if self._seconds else 0.0

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """Yields the batches, and counts the time until each is there."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            if self._first_step is not None:
                self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def update(self, step: int, loss: float, tokens: int) -> None:
        """Shows that `step` steps of the stage are done, `tokens` more than at the last update."""
        now = time.perf_counter()
        if self._first_step is None:
            self._first_step = step
        else:
            self._tokens += tokens
            self._seconds += now - self._last_time
        self._last_time = now
        if not self._enabled:
            return
        text = f"loss {loss:.4f}"
        if self._seconds:
            left = (self._total - step) * self._seconds / max(step - self._first_step, 1)
            minutes, seconds = divmod(max(round(left), 0), 60)
            text += f", {self.tokens_per_second:,.0f} tokens/s, "
            text += f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._last_line >= _PLAIN_LINE_SECONDS or step >= self._total:
            print(f"{self._stage} {step}/{self._total} {text}", file=sys.stderr, flush=True)
            self._last_line = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training (evaluation, saving), so that the speed does not count it."""
        start = time.perf_counter()
        yield
        self._last_time += time.perf_counter() - start

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
