"""A signal to stop takes effect between two steps, and costs nothing but time."""

import os
import pathlib
import pty
import re
import select
import shutil
import signal
import subprocess
import sys

import pytest
import runs

from gptjax.cli import malloc
from gptjax.cluster.stop import StopRequest
from gptjax.errors import StopRequested
from gptjax.evaluate.score import Evaluator
from gptjax.train import run

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_request_is_noted_and_the_second_acts_as_usual(number):
    seen = []

    def usual(*_):
        seen.append(number)

    previous = signal.signal(number, usual)
    try:
        with StopRequest() as stop:
            assert not stop()
            signal.raise_signal(number)
            assert stop()
            assert seen == []
            signal.raise_signal(number)
            assert seen == [number]
        assert signal.getsignal(number) is usual
        with StopRequest() as stop:
            pass
        assert signal.getsignal(number) is usual
        assert not stop()
    finally:
        signal.signal(number, previous)


@pytest.mark.parametrize("number", SIGNALS)
def test_what_is_ignored_stays_so(number):
    """So it is under nohup, and in a background job of a script."""
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(number)
            assert not stop()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, previous)


@pytest.fixture
def usual_ctrl_c():
    """Python's usual handler of Ctrl-C, which is missing if a shell runs tests in background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_interrupts(usual_ctrl_c):
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_second_sigterm_ends_the_process():
    code = (
        "import signal; from gptjax.cluster.stop import StopRequest\n"
        "with StopRequest():\n"
        "    signal.raise_signal(signal.SIGTERM); print('alive', flush=True)\n"
        "    signal.raise_signal(signal.SIGTERM); print('never')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "alive\n")


class StopAfter(StopRequest):
    """A request to stop that becomes true after `left` calls."""

    left = 0

    def __call__(self) -> bool:
        StopAfter.left -= 1
        return StopAfter.left < 0


def command(workdir) -> list[str]:
    return [*runs.TINY, *runs.files().pretrain, "--config.finetune=none", f"--workdir={workdir}"]


def assert_continues_as_if_nothing_had_happened(workdir):
    done = runs.main(*command(workdir))
    assert done.code == 0, done.err
    assert "pretrain: continuing at step" in done.out
    expected = runs.trained()
    assert runs.steps(workdir, "pretrain")[-2:] == runs.steps(expected, "pretrain") == [10, 20]
    for step in (10, 20):
        ours, theirs = (runs.arrays(each, "pretrain", step) for each in (workdir, expected))
        assert ours == theirs
    whole = [each for each in runs.records(expected) if each["stage"] == "pretrain"]
    assert runs.records(workdir) == whole


@pytest.mark.parametrize("before", [0, 5])
def test_asked_between_steps(tmp_path, monkeypatch, before):
    StopAfter.left = before
    with monkeypatch.context() as patch:
        patch.setattr(run, "StopRequest", StopAfter)
        stopped = runs.main(*command(tmp_path))
    assert stopped.code == 75
    line = stopped.err.splitlines()[-1]
    assert line == (
        f"error: pretrain: asked to stop; saved at step {before} of 20; "
        "the same command continues there"
    )
    assert runs.steps(str(tmp_path), "pretrain") == [before]
    assert_continues_as_if_nothing_had_happened(str(tmp_path))


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_signal_while_modules_load(tmp_path):
    """The exit code is 75, as at any other moment, so that a scheduler starts it again."""
    process = runs.start(*command(tmp_path / "w"))
    status = pathlib.Path(f"/proc/{process.pid}/status")
    caught = 0
    while not caught & 1 << (signal.SIGTERM - 1):
        assert process.poll() is None
        caught = int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16)
    variables = pathlib.Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, "")
    assert err == "error: asked to stop; the same command starts again\n"
    if malloc.is_available():  # the program has started itself again by then
        assert any(each.startswith(b"GLIBC_TUNABLES=") for each in variables)
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("setsid") is None, reason="needs setsid of util-linux")
@pytest.mark.parametrize("output", ["terminal", "pipe"])
def test_output_that_nobody_reads_any_more_changes_nothing(tmp_path, output):
    """The terminal was closed, or Ctrl-C has ended the `tee` that reads the pipe too."""
    ours, theirs = pty.openpty() if output == "terminal" else os.pipe()
    under = ("setsid", "--ctty") if output == "terminal" else ()
    flags = [each for each in command(tmp_path) if not each.startswith("--config.pretrain.steps=")]
    process = runs.start(
        *flags, "--config.pretrain.steps=1000000", "--config.pretrain.eval_every=400000",
        under=under, stdin=theirs if under else None, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    log = tmp_path / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None
        if select.select([ours], [], [], 0.1)[0]:
            os.read(ours, 1 << 16)
    os.close(ours)  # a terminal's end also sends SIGHUP
    if not under:
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    (step,) = runs.steps(str(tmp_path), "pretrain")
    assert step > 0


def test_a_signal_during_an_evaluation(tmp_path, monkeypatch):
    evaluated = Evaluator.language_model

    def terminated(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StopRequested) as stopped:  # it does not keep the scheduler waiting
            evaluated(*args, **kwargs)
        raise stopped.value

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "language_model", terminated)
        stopped = runs.main(*command(tmp_path))
    assert stopped.code == 75
    assert "saved at step 10 of 20" in stopped.err.splitlines()[-1]
    assert runs.steps(str(tmp_path), "pretrain") == [10]
    assert {each["split"] for each in runs.records(str(tmp_path))} == {"train"}
    assert_continues_as_if_nothing_had_happened(str(tmp_path))


@pytest.mark.slow
def test_a_signal_during_the_test(tmp_path, monkeypatch):
    """The run stops during the test as well. The same command then tests and reports."""
    flags = [*runs.TINY, *runs.files().finetune, "--config.pretrain=none", f"--workdir={tmp_path}"]
    evaluated = Evaluator.task_with_outputs
    asked = []

    def terminated(*args, **kwargs):
        if runs.steps(str(tmp_path), "finetune")[-1:] == [40]:
            asked.append(signal.raise_signal(signal.SIGTERM))
        return evaluated(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "task_with_outputs", terminated)
        stopped = runs.main(*flags)
    assert (stopped.code, len(asked)) == (75, 1)
    last = stopped.err.splitlines()[-1]
    assert last == "error: finetune: asked to stop; saved; the same command tests it"
    assert not (tmp_path / "summary.json").exists()
    done = runs.main(*flags)
    assert done.code == 0, done.err
    assert runs.summary(str(tmp_path))["finetune"]["test"]["accuracy"] >= 0
