"""A run that is killed at any moment and continued ends with the bits of an uninterrupted one.

GPTJAX_KILLS=N in the environment kills N times, at random moments, instead of a few chosen ones.
"""

import contextlib
import os
import pathlib
import random
import re
import signal
import subprocess
import time

import numpy as np
import pytest
import runs

from gptjax.config.schema import Stage

KILLS = int(os.environ.get("GPTJAX_KILLS", "0"))
STAGES = tuple(Stage)


def command(workdir) -> list[str]:
    """A run of all three stages, with dropout, a checkpoint every few steps, and BPE training."""
    files = runs.files()
    return [
        *runs.TINY, *files.pretrain, *files.finetune, f"--workdir={workdir}",
        "--config.model.embedding_dropout=0.1",
        "--config.pretrain.steps=40", "--config.pretrain.save_every=8",
        "--config.finetune.steps=30", "--config.finetune.save_every=6",
        "--config.finetune.compare_from_scratch=true",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> str:
    workdir = str(tmp_path_factory.mktemp("whole") / "run")
    result = runs.finish(runs.start(*command(workdir)))
    assert result.code == 0, result.err
    return workdir


def start(workdir, processes: int = 1) -> list:
    return runs.start_several(processes, *command(workdir))


def assert_same(workdir: str, expected: str) -> None:
    for stage in STAGES:
        assert runs.steps(workdir, stage) == runs.steps(expected, stage)
        for step in runs.steps(expected, stage):
            ours, theirs = (runs.arrays(each, stage, step) for each in (workdir, expected))
            assert ours.keys() == theirs.keys()
            different = [name for name in theirs if ours[name] != theirs[name]]
            assert not different, f"{stage} {step}: {different}"
    assert runs.records(workdir) == runs.records(expected)
    ours, theirs = runs.summary(workdir), runs.summary(expected)
    for values in (*ours.values(), *theirs.values()):
        assert values.pop("tokens_per_second") >= 0
        assert 0 <= values.pop("input_wait") < 1
        values.pop("mfu", None)
    assert ours == theirs


def recorded(workdir: str, stage: str) -> int:
    """Returns the last step of a stage in the log; -1 if there is none yet."""
    path = pathlib.Path(workdir, "metrics.jsonl")
    text = path.read_text() if path.exists() else ""
    found = re.findall(rf'^{{"step": (\d+), "stage": "{stage}", "split": "train"', text, re.M)
    return int(found[-1]) if found else -1


def saving(workdir: str, stage: str) -> bool:
    """Returns whether a checkpoint is being written."""
    return any(pathlib.Path(workdir, "checkpoints", stage).glob("*orbax-checkpoint-tmp*"))


def interrupt(workdir: str, number: signal.Signals, when, **kwargs) -> runs.Result:
    """Starts the run, sends it a signal as soon as `when()` is true, and waits for its end."""
    process = runs.start(*command(workdir), **kwargs)
    while process.poll() is None and not when():
        time.sleep(0.001)
    process.send_signal(number)
    return runs.finish(process)


@pytest.mark.slow
@pytest.mark.skipif(KILLS > 0, reason="GPTJAX_KILLS asks for the long version")
def test_killed_and_terminated_runs_end_like_an_uninterrupted_one(uninterrupted, tmp_path):
    workdir = str(tmp_path / "run")
    # Killed while it writes a checkpoint.
    killed = interrupt(
        workdir, signal.SIGKILL,
        lambda: recorded(workdir, "pretrain") >= 16 and saving(workdir, "pretrain"),
    )  # fmt: skip
    assert killed.code == -signal.SIGKILL
    assert max(runs.steps(workdir, "pretrain")) < 40
    # Terminated while it trains the second stage.
    asked = interrupt(workdir, signal.SIGTERM, lambda: recorded(workdir, "finetune") >= 3)
    assert asked.code == 75, asked.err
    errors = [line for line in asked.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    step = int(re.search(r"finetune: asked to stop; saved at step (\d+) of 30", errors[0])[1])
    assert 3 <= step < 30
    assert step in runs.steps(workdir, "finetune")
    assert "Traceback" not in asked.err
    # Killed while it compiles or begins the third stage.
    killed = interrupt(
        workdir, signal.SIGKILL,
        lambda: pathlib.Path(workdir, "checkpoints", STAGES[2]).exists(),
    )  # fmt: skip
    assert killed.code == -signal.SIGKILL
    result = runs.finish(runs.start(*command(workdir)))
    assert result.code == 0, result.err
    assert_same(workdir, uninterrupted)


@pytest.mark.slow
def test_another_number_of_devices_goes_on_with_the_same_batches(uninterrupted, tmp_path):
    """Ledgers are equal. Losses differ by float32 rounding, which Adam magnifies in 40 steps."""
    workdir = str(tmp_path / "run")
    four = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    asked = interrupt(
        workdir, signal.SIGTERM, lambda: recorded(workdir, "pretrain") >= 10, env=four
    )
    assert asked.code == 75, asked.err
    assert runs.steps(workdir, "pretrain")[-1] < 40
    two = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    asked = interrupt(workdir, signal.SIGTERM, lambda: recorded(workdir, "finetune") >= 10, env=two)
    assert asked.code == 75, asked.err
    result = runs.finish(runs.start(*command(workdir)))
    assert result.code == 0, result.err
    ours, theirs = runs.records(workdir), runs.records(uninterrupted)
    ledgers = [[record.get("ledger") for record in records] for records in (ours, theirs)]
    assert ledgers[0] == ledgers[1]
    assert all(
        entry
        for record, entry in zip(theirs, ledgers[1], strict=True)
        if record["split"] == "train"
    )
    losses = [[record["loss"] for record in records] for records in (ours, theirs)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.fixture(scope="module", params=[1, 2])
def several(request, tmp_path_factory):
    """Returns a number of processes, and the workdir of an uninterrupted run of so many."""
    workdir = str(tmp_path_factory.mktemp("several") / "run")
    for process in start(workdir, request.param):
        assert runs.finish(process).code == 0
    return request.param, workdir


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not KILLS, reason="set GPTJAX_KILLS to the number of kills")
def test_killed_at_random_moments(several, tmp_path):
    """A random signal ends one of the processes; the others then end by themselves."""
    count, uninterrupted = several
    rng = random.Random(time.time_ns())
    workdir = str(tmp_path / "run")
    for attempt in range(KILLS):
        processes = start(workdir, count)
        rest = max(0.0, rng.gauss(8.0 * count, 4.0 * count))
        chosen = rng.randrange(count)
        number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        with contextlib.suppress(subprocess.TimeoutExpired):
            processes[chosen].wait(rest)
        processes[chosen].send_signal(number)
        results = [runs.finish(process) for process in processes]
        tried = (attempt, rest, chosen, number, results)
        codes = {result.code for result in results}
        # Before Python has started, SIGTERM ends the process as it ends any program.
        too_early = {-signal.SIGTERM} if rest < 0.5 * count else set()
        lost = {1} if count > 1 else set()
        assert codes <= {0, 75, -signal.SIGKILL} | lost | too_early, tried
        assert not any("Traceback" in result.err for result in results), tried
        if codes == {0}:
            assert_same(workdir, uninterrupted)
            workdir = str(tmp_path / f"run{attempt}")
    for process in start(workdir, count):
        result = runs.finish(process)
        assert result.code == 0, result.err
    assert_same(workdir, uninterrupted)
