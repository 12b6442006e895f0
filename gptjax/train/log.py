"""The measurements of a run: metrics.jsonl and the events of TensorBoard."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from gptjax.io import remote as remote_lib
from gptjax.io.files import disk_errors, json_ready, write_atomically
from gptjax.io.remote import PathLike

_FLUSH_SECONDS = 10.0


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

    if remote_lib.is_remote(folder):
        record_writer.register_writer_factory("gs", remote_lib.RemoteFiles)
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
            remote = remote_lib.is_remote(self._path)
            self._file: Any = (
                remote_lib.RemoteFile(self._path, kept) if remote else open(self._path, "ab")  # noqa: SIM115
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
            if due or not remote_lib.is_remote(self._path):
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
        """Forgets what follows `step` of a stage: a resumed run repeats it.

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
