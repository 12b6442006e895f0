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

    A process that was killed may have written only a part of a line. Such a line is left out.
    """
    with contextlib.suppress(FileNotFoundError):
        for line in epath.Path(path).read_bytes().splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if line.endswith(b"\n") and {"step", "stage", "split"} <= set(record):
                    yield line, record


def read(workdir: PathLike) -> list[dict[str, Any]]:
    """Returns the records of ``WORKDIR/metrics.jsonl``, oldest first. Without a file: []."""
    return [record for _, record in _lines(os.path.join(workdir, "metrics.jsonl"))]


def _event(**fields: Any) -> bytes:
    """Returns the bytes of a TensorBoard event.

    Args:
      **fields: the fields of the event. A dictionary stands for a protobuf message.
    """
    from tensorboardX.proto import event_pb2

    return event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()


def _open_events(folder: str, purge_from: int | None) -> Any:
    """Opens a new file of TensorBoard events.

    tensorboardX's `SummaryWriter` is not used, for two reasons. A full disk ends its thread, and
    then its queue blocks forever. Two writers that are opened in the same second write to the same
    file.

    Args:
      folder: the folder of the file. It is made if it is missing.
      purge_from: the first step that TensorBoard ignores in older files of the folder. It ignores
        all later steps too. None means that it ignores no step.
    """
    from tensorboardX import RecordWriter, record_writer

    if remote_lib.is_remote(folder):
        record_writer.register_writer_factory("gs", remote_lib.RemoteFile)
    else:
        os.makedirs(folder, exist_ok=True)
    # The name contains the time, because TensorBoard reads the files of a folder sorted by name.
    writer = RecordWriter(os.path.join(folder, f"events.out.tfevents.{time.time_ns()}"))
    writer.write(_event(file_version="brain.Event:2"))
    if purge_from is not None:
        writer.write(_event(step=purge_from, session_log={"status": "START"}))
    return writer


class MetricsLog:
    """``metrics.jsonl`` in a workdir, and the same numbers under ``tensorboard/``.

    A line is ``{"step", "stage", "split", NAME: float or null, ...}``. Lines of training steps also
    have the ``"ledger"``, a running hash of the batches (`gptjax.train.ledger`). On a disk, the
    line is in the file when `write` returns. A bucket cannot append to a file, so there the line is
    in the file some seconds later, or when `sync` returns. Use the log as a context manager, or
    call `close`.

    Args:
      workdir: the folder of the run. It is made if it is missing.
      enabled: whether this process writes. It is True in only one process of a run. If it is False,
        all methods do nothing.

    Raises:
      UserError: a file cannot be written, for example because the disk is full. All methods can
        raise it.
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
        # The file is written again even if all records stay, because it must end with a complete
        # line.
        with disk_errors(self._path):
            kept = b"".join(line for line, record in _lines(self._path) if keep(record))
        write_atomically(self._path, kept)
        with disk_errors(self._path):
            remote = remote_lib.is_remote(self._path)
            self._file: Any = (
                remote_lib.RemoteFile(self._path, kept) if remote else open(self._path, "ab")  # noqa: SIM115
            )

    def begin(self, stage: str) -> None:
        """Opens the TensorBoard file of a stage, if it is not open. `write` would do it too.

        At first this imports tensorboardX, which takes seconds.
        """
        if not self._enabled or stage in self._events:
            return
        with disk_errors(self._events_dir):
            # Each stage has its own folder, because each stage counts its steps from 1 and
            # TensorBoard applies `purge_from` to a whole folder.
            folder = os.path.join(self._events_dir, stage)
            self._events[stage] = _open_events(folder, self._purge_from.pop(stage, None))

    def write(
        self, stage: str, split: str, step: int, values: Mapping[str, float], ledger: str = ""
    ) -> None:
        """Adds one line.

        Args:
          stage: the name of the stage.
          split: "train", "validation" or "test".
          step: the number of steps that are done.
          values: NAME -> a number on the host. A number that is not finite is written as null.
          ledger: the ledger of the batches up to this step. "" means that none is written.
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
        self.begin(stage)
        with disk_errors(self._events_dir):
            self._events[stage].write(_event(step=int(step), summary={"value": scalars}))
            if due:  # flushing after every line would be slow, because it waits for the disk
                self._events[stage].flush()
                self._next_flush = time.monotonic() + _FLUSH_SECONDS

    def sync(self) -> None:
        """Writes all lines to the disk or bucket, so that they remain if the process is killed.

        The training calls this before it saves a state, because a run that resumes from this state
        needs the lines of the earlier steps.
        """
        if self._enabled:
            with disk_errors(self._path):
                self._file.flush()

    def rewind(self, stage: str, step: int) -> None:
        """Deletes the records of `stage` that a run resumed at `step` will write again.

        These are all records of later steps, and the record of the test split, which is written
        after the last step. Each stage rewinds only its own records, when it starts.
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
        """Writes a record unless the file has a record of the same stage, split and step.

        The record is missing if an earlier process was killed after it had saved a checkpoint and
        before it wrote the record.
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
