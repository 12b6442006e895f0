"""The files of the metrics, read without gptjax, and the displayed progress, by a fake clock."""

import errno
import json
import os
import re
import struct
import subprocess
import sys

import jax
import numpy as np
import pytest
from memory_runs import Recorder
from tensorboardX.proto import event_pb2

from gptjax import mesh
from gptjax.config import schema
from gptjax.errors import UserError
from gptjax.io import console, files
from gptjax.train import log as log_lib
from gptjax.train import progress as progress_lib
from gptjax.train.progress import Progress, Reporter, Scorings, TerminalReporter


def strict_json(text):
    """Parses JSON strictly, as other languages do: NaN and Infinity are errors."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def scalars(workdir):
    """Returns (tag, step) -> value as TensorBoard shows it, parsed from the TFRecord format."""
    shown = {}
    for folder, _, names in sorted(os.walk(os.path.join(workdir, "tensorboard"))):
        here = {}
        for name in sorted(names):
            assert "tfevents" in name
            with open(os.path.join(folder, name), "rb") as file:
                data = file.read()
            while data:
                (length,) = struct.unpack("<Q", data[:8])
                event = event_pb2.Event.FromString(data[12 : 12 + length])
                data = data[16 + length :]
                if event.session_log.status == event_pb2.SessionLog.START:
                    here = {key: v for key, v in here.items() if key[1] < event.step}
                for value in event.summary.value:
                    here[value.tag, event.step] = value.simple_value
        shown.update(here)
    return shown


def write_run(workdir, stages=schema.Stage, steps=(1, 2, 3)):
    with log_lib.MetricsLog(workdir) as log:
        for stage in stages:
            for step in steps:
                log.write(stage, "train", step, {"loss": 1.0 / step})


def test_log_is_strict_json_lines_and_tensorboard_events(tmp_path):
    with log_lib.MetricsLog(tmp_path / "made") as log:
        log.write("pretrain", "train", np.int32(5), {"loss": np.float32(2.5), "bad": float("nan")})
        log.write("finetune", "validation", 7, {"accuracy": 0.75, "worse": -np.inf})
        lines = (tmp_path / "made" / "metrics.jsonl").read_text().splitlines()  # before close
    assert [strict_json(line) for line in lines] == [
        {"step": 5, "stage": "pretrain", "split": "train", "loss": 2.5, "bad": None},
        {"step": 7, "stage": "finetune", "split": "validation", "accuracy": 0.75, "worse": None},
    ]
    assert log_lib.read(tmp_path / "made") == [strict_json(line) for line in lines]
    assert scalars(tmp_path / "made") == {
        ("pretrain/train/loss", 5): 2.5,
        ("finetune/validation/accuracy", 7): 0.75,
    }


def test_other_processes_write_nothing(tmp_path, capsys):
    with log_lib.MetricsLog(tmp_path / "none", enabled=False) as log:
        log.write("pretrain", "train", 1, {"loss": 1.0})
        log.rewind("pretrain", 0)
    with Progress("pretrain", 2, 0, Reporter()) as progress:
        progress.update(1, 1.0, 10)
        progress.update(2, 1.0, 10)
    assert not (tmp_path / "none").exists()
    assert log_lib.read(tmp_path / "none") == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("stage", schema.Stage)
@pytest.mark.parametrize("step", [0, 2, 9])
def test_rewind_keeps_exactly_what_came_before(tmp_path, stage, step):
    write_run(tmp_path)
    before = log_lib.read(tmp_path)

    def comes_before(record):
        return record["stage"] != stage or record["step"] <= step

    with log_lib.MetricsLog(tmp_path) as log:
        log.rewind(stage, step)
        log.write(stage, "train", step + 5, {"loss": 9.0})
    new = {"step": step + 5, "stage": stage, "split": "train", "loss": 9.0}
    after = log_lib.read(tmp_path)
    assert after == [r for r in before if comes_before(r)] + [new]
    shown = {
        tag_step: v
        for tag_step, v in scalars(tmp_path).items()
        if tag_step[0].startswith(stage + "/")
    }
    assert shown == {
        (f"{stage}/train/loss", r["step"]): pytest.approx(r["loss"])
        for r in after
        if r["stage"] == stage
    }


def test_a_record_is_written_once(tmp_path):
    with log_lib.MetricsLog(tmp_path) as log:
        for loss in (1.0, 2.0):
            log.write_once("finetune", "validation", 5, {"loss": loss})
        log.write_once("finetune", "validation", 6, {"loss": 3.0})
    assert [(r["step"], r["loss"]) for r in log_lib.read(tmp_path)] == [(5, 1.0), (6, 3.0)]


@pytest.mark.parametrize("cut", [1, 2, 20, 40])
def test_half_a_line_left_by_a_kill_harms_nothing(tmp_path, cut):
    write_run(tmp_path, ["pretrain"])
    path = tmp_path / "metrics.jsonl"
    whole = log_lib.read(tmp_path)[:2]
    path.write_bytes(path.read_bytes()[:-cut])
    assert log_lib.read(tmp_path) == whole
    with log_lib.MetricsLog(tmp_path) as log:
        log.write("pretrain", "train", 3, {"loss": 7.0})
    path.write_bytes(path.read_bytes() + b'{"step": 4, "st')
    with log_lib.MetricsLog(tmp_path) as log:
        log.rewind("pretrain", 3)
    records = [strict_json(line) for line in path.read_text().splitlines()]
    assert records == [*whole, {"step": 3, "stage": "pretrain", "split": "train", "loss": 7.0}]


def test_lines_survive_sigkill(tmp_path):
    code = (
        "import os, signal, sys, gptjax.train.log as t; log = t.MetricsLog(sys.argv[1])\n"
        "for step in range(50): log.write('pretrain', 'train', step, {'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert done.returncode == -9
    assert [r["step"] for r in log_lib.read(tmp_path)] == list(range(50))


def test_importing_the_log_loads_nothing_heavy():
    code = (
        "import sys, gptjax.train.log\n"
        "print({'tensorboardX', 'matplotlib', 'tqdm', 'sklearn', 'scipy'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "set()"


def test_write_json_round_trips_in_order(tmp_path):
    path = tmp_path / "new" / "summary.json"
    obj = {"z": {"b": 1, "a": [1.5, float("inf"), "é"]}, "a": np.float32(0.5), "n": np.arange(2)}
    files.write_json(path, obj)
    files.write_json(path, obj)
    read = strict_json(path.read_text())
    assert read == {"z": {"b": 1, "a": [1.5, None, "é"]}, "a": 0.5, "n": [0, 1]}
    assert (list(read), list(read["z"])) == (["z", "a", "n"], ["b", "a"])
    assert os.listdir(path.parent) == ["summary.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_report_is_printed_and_written(tmp_path, capsys):
    path = tmp_path / "report.json"
    console.say("a line")
    console.print_json({"speed": np.float32(0.5), "none": float("nan")}, path)
    shown = capsys.readouterr()
    assert shown.err == "a line\n"
    assert json.loads(shown.out) == json.loads(path.read_text()) == {"speed": 0.5, "none": None}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_refuses_leaves_the_old_file_and_says_why(tmp_path, monkeypatch, code):
    path = tmp_path / "summary.json"
    files.write_json(path, {"old": 1})

    def refuse(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=re.escape(f"{path}: {os.strerror(code)}")) as error:
        files.write_json(path, {"new": 2})
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["summary.json"]
    assert strict_json(path.read_text()) == {"old": 1}


def test_a_workdir_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        log_lib.MetricsLog(tmp_path / "file")
    with pytest.raises(UserError, match="cannot write"):
        files.write_json(tmp_path / "file" / "x.json", {})


class Clock:
    """A fake `time` module."""

    now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_lib, "time", clock)
    return clock


@pytest.mark.parametrize(("slow", "share"), [(0.0, 0.0), (2.0, 0.5), (6.0, 0.75)])
def test_the_wait_for_input_is_a_share_of_what_counts_as_training(clock, slow, share):
    def batches():
        for step in range(1, 8):
            clock.now += 100.0 if step == 1 else slow
            yield step

    with Progress("pretrain", 7, 0, Reporter()) as progress:
        found = []
        for step in progress.waiting(batches()):
            found.append(step)
            clock.now += 60.0 if step == 1 else 2.0
            progress.update(step, 1.0, 10)
            if step == 1:
                assert progress.input_wait == 0.0
            with progress.paused():
                clock.now += 30.0
    assert found == [*range(1, 8)]
    assert progress.input_wait == pytest.approx(share)


def test_speed_excludes_compilation_and_pauses(clock):
    with Progress("pretrain", 100, 40, Reporter()) as progress:
        clock.now += 60.0  # compiles
        progress.update(41, 3.0, 1000)
        assert progress.tokens_per_second == 0.0
        for step in (42, 43, 44):
            clock.now += 2.0
            progress.update(step, 3.0, 1000)
            with progress.paused():
                clock.now += 30.0
    assert progress.tokens_per_second == pytest.approx(1000 / 2)


def test_plain_lines_are_rare_and_the_last_step_is_shown(clock, capsys):
    with Progress("finetune", 1000, 0, TerminalReporter()) as progress:
        for step in range(1, 1001):
            clock.now += 0.1
            progress.update(step, 1.25, 50)
    lines = capsys.readouterr().err.splitlines()
    assert 9 <= len(lines) <= 12  # 100 seconds, and the end
    assert all("\r" not in line and len(line) <= 100 for line in lines)
    shown = [int(re.match(r"finetune (\d+)/1000 loss 1\.2500", line)[1]) for line in lines]
    assert (shown[0], shown[-1]) == (1, 1000)
    for step, line in zip(shown[1:], lines[1:], strict=True):
        speed, hours, minutes, seconds = re.search(
            r", (\d+) tokens/s, (\d+):(\d+):(\d+) left", line
        ).groups()
        assert int(speed) == 500
        left = int(hours) * 3600 + int(minutes) * 60 + int(seconds)
        assert left == pytest.approx((1000 - step) * 0.1, abs=1)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        # 56 steps are left. A validation reads as many tokens as 30 steps, and the test as many as
        # 15. A forward pass takes a third of a step. So all together take as long as 81 steps.
        (2.0, "finetune: about 3 min (2 s a step, 2 validations, 1 test)"),
        (0.1, "finetune: about 8 s (0.1 s a step, 2 validations, 1 test)"),
        # A long step is measured once: 58 steps are left.
        (400.0, "finetune: about 9 h 13 min (400 s a step, 2 validations, 1 test)"),
    ],
)
def test_the_time_of_a_stage_is_said_once(clock, step, expected):
    recorder = Recorder()
    with Progress("finetune", 100, 40, recorder, Scorings(2, 30.0, 15.0)) as progress:
        clock.now += 60.0  # compiles
        progress.update(41, 3.0, 1000)
        for number in range(42, 60):
            # A batch of another shape compiles once more.
            clock.now += 7.0 if number == 43 and step < 10 else step
            progress.update(number, 3.0, 1000)
            assert recorder.lines == ([expected] if number >= 44 or step > 10 else [])


def test_a_stage_of_few_steps_says_no_time(clock):
    recorder = Recorder()
    with Progress("finetune", 3, 0, recorder, Scorings(1)) as progress:
        for number in (1, 2, 3):
            clock.now += 1.0
            progress.update(number, 3.0, 1000)
    assert not recorder.lines


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("pretrain", 10, 7, TerminalReporter()) as progress:
        for step in (8, 9, 10):
            progress.update(step, 2.0, 5)
    err = capsys.readouterr().err
    assert "\r" in err
    assert re.search(r"pretrain:? +10/10 \|.*loss 2\.0000", err.split("\r")[-1])


def test_the_machine_is_named_with_what_its_memory_was_told(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    plain = mesh.describe_machine()
    assert plain.endswith(f"jax {jax.__version__}")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert mesh.describe_machine() == f"{plain}, GLIBC_TUNABLES=glibc.malloc.hugetlb=1"
