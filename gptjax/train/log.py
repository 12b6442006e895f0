"""The metrics of a run: metrics.jsonl, and the same numbers for TensorBoard."""

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
    """Yields the complete lines of metrics.jsonl and their records.

    A killed process may have left half a line, which is left out.
    """
    with contextlib.suppress(FileNotFoundError):
        for line in epath.Path(path).read_bytes().splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if line.endswith(b"\n") and {"step", "stage", "split"} <= set(record):
                    yield line, record


def read(workdir: PathLike) -> list[dict[str, Any]]:
    """Returns the records of ``WORKDIR/metrics.jsonl``, oldest first; [] if there is no file."""
    return [record for _, record in _lines(os.path.join(workdir, "metrics.jsonl"))]


def _event(**fields: Any) -> bytes:
    """Returns the bytes of a TensorBoard event; messages inside it are given as dicts."""
    from tensorboardX.proto import event_pb2

    return event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()


def _open_events(folder: str, purge_from: int | None) -> Any:
    """Opens a new file of events in `folder`.

    tensorboardX's SummaryWriter is not used, for two reasons: its queue blocks forever once a full
    disk has ended its thread, and two of its files that are opened within a second are one file.

    Args:
      folder: made if missing.
      purge_from: TensorBoard ignores this step and later ones in older files; None: no step.
    """
    from tensorboardX import RecordWriter, record_writer

    if remote_lib.is_remote(folder):
        record_writer.register_writer_factory("gs", remote_lib.RemoteFile)
    else:
        os.makedirs(folder, exist_ok=True)
    # The time is in the name because TensorBoard reads the files of a folder in order of name.
    writer = RecordWriter(os.path.join(folder, f"events.out.tfevents.{time.time_ns()}"))
    writer.write(_event(file_version="brain.Event:2"))
    if purge_from is not None:
        writer.write(_event(step=purge_from, session_log={"status": "START"}))
    return writer


class MetricsLog:
    """``metrics.jsonl`` in a working directory, and the same numbers under ``tensorboard/``.

    A line is ``{"step", "stage", "split", NAME: float or null, ...}``. Lines of training steps also
    have the ``"ledger"`` of the batches (see `gptjax.train.ledger`). A line is on disk when `write`
    returns. A bucket cannot append to a file, and has the line some seconds later, or when `sync`
    returns. Use it as a context manager, or call `close`.

    Args:
      workdir: folder of the run, made if missing.
      enabled: False in every process but one; all methods do nothing then.

    Raises:
      UserError: in all methods, where the disk is full or cannot be written to.
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
        # The file is rewritten even if all records stay, so that it ends with a complete line.
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
        """Adds one line.

        Args:
          stage: name of the stage.
          split: "train", "validation" or "test".
          step: number of steps done.
          values: NAME -> number on the host. A number that is not finite is written as null.
          ledger: of the batches up to this step; "" writes none.
        """
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
                # A folder for each stage: each counts its steps from 1, and TensorBoard applies
                # `purge_from` to a whole folder.
                folder = os.path.join(self._events_dir, stage)
                self._events[stage] = _open_events(folder, self._purge_from.pop(stage, None))
            self._events[stage].write(_event(step=int(step), summary={"value": scalars}))
            if due:  # not after every line, because it waits for the disk
                self._events[stage].flush()
                self._next_flush = time.monotonic() + _FLUSH_SECONDS

    def sync(self) -> None:
        """Writes all lines to the disk or bucket, so that they survive if the process is killed.

        It is called before a state is saved: a run that resumes there needs the lines before it.
        """
        if self._enabled:
            with disk_errors(self._path):
                self._file.flush()

    def rewind(self, stage: str, step: int) -> None:
        """Deletes the records of a stage that a run resumed at `step` writes again.

        These are the records of later steps, and that of the test split, which comes after the last
        step. Each stage rewinds its own records when it starts.
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
        """Writes a record unless there is one already.

        There is none where the process was killed between saving a checkpoint and writing its
        record.
        """
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
