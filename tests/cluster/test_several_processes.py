"""Runs of several processes through `launch.py`: equal to a run of one, and ended together."""

import json
import shutil
import signal
import time

import pytest
import runs

LOST = 1


def start_all(count: int, workdir, *flags, **kwargs) -> list:
    """Starts a tiny run of both stages in several processes of this machine."""
    files = runs.files()
    linear = "--config.finetune.baseline=linear"
    command = (*runs.TINY, *files.pretrain, *files.finetune, linear, f"--workdir={workdir}", *flags)
    return runs.start_several(count, *command, **kwargs)


def losses(workdir) -> list[dict]:
    return runs.records(str(workdir))


def assert_close(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            if isinstance(x[name], str):
                assert x[name] == y[name]
            else:
                assert x[name] == pytest.approx(y[name], rel=2e-4, abs=1e-5), (x, y)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of both stages, run in one process with four devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    (result,) = (runs.finish(each, 900) for each in start_all(1, workdir, devices=4))
    assert result.code == 0, result.err
    return workdir


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_as_one_and_one_continues_them(count, alone, tmp_path):
    workdir = tmp_path / "run"
    processes = start_all(count, workdir, devices=4 // count)
    results = [runs.finish(each, 900) for each in processes]
    assert [result.code for result in results] == [0] * count, results
    assert_close(losses(workdir), losses(alone))
    assert "Saved in" in results[0].out
    assert not any("Saved in" in result.out for result in results[1:]), "process 0 alone prints"
    # One process, then two continue: they restore the last checkpoint, test it and report again.
    for others in (1, 2):
        (workdir / "summary.json").unlink()
        results = [
            runs.finish(each, 900) for each in start_all(others, workdir, devices=4 // others)
        ]
        assert [result.code for result in results] == [0] * others, results
        test = json.loads((workdir / "summary.json").read_text())["finetune"]["test"]
        expected = json.loads((alone / "summary.json").read_text())["finetune"]["test"]
        assert test == pytest.approx(expected, rel=2e-4, abs=1e-5)
    # Process 0 alone fits the linear model, and the result is that of one process.
    ours, theirs = (
        json.loads((each / "summary.json").read_text())["finetune"]["baselines"]["linear"]
        for each in (workdir, alone)
    )
    for name in ("validation", "test", "C"):
        assert ours[name] == theirs[name]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("number", "which"), [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGTERM, 1)]
)
def test_one_ended_all_end_and_the_same_command_completes(number, which, alone, tmp_path):
    workdir = tmp_path / "run"
    processes = start_all(2, workdir, devices=2)
    log = workdir / "metrics.jsonl"
    while not (log.exists() and '"finetune"' in log.read_text()):
        assert all(each.poll() is None for each in processes)
        time.sleep(0.01)
    processes[which].send_signal(number)
    results = [runs.finish(each, 300) for each in processes]
    if number == signal.SIGKILL:
        other = results[1 - which]
        assert other.code == LOST, other.err
        assert f"error: process {which} of 2 (" in other.err
    else:
        assert [result.code for result in results] == [75, 75], results
        saved = {result.err.partition("saved at step ")[2][:9] for result in results}
        assert len(saved) == 1
    results = [runs.finish(each, 900) for each in start_all(2, workdir, devices=2)]
    assert [result.code for result in results] == [0, 0], results
    assert_close(losses(workdir), losses(alone))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_another_configuration_is_named_before_anything_is_written(tmp_path):
    workdir = tmp_path / "run"
    each = lambda index: ("--config.model.width=24",) if index else ()  # noqa: E731
    for result in [runs.finish(each, 500) for each in start_all(2, workdir, each=each)]:
        assert result.code == 2, result.err
        assert "error: process 1 of 2 (" in result.err
        assert "--config.model.width 24, not 16" in result.err
    assert not workdir.exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_save_that_fails_in_one_process_ends_all(tmp_path):
    """One process cannot write its part of a checkpoint. The others do not wait for it."""
    # Not by preexec_fn: it would fork this process, which has threads of JAX.
    limited = ("sh", "-c", 'ulimit -f 2; exec "$@"', "sh")
    workdir = tmp_path / "run"
    flags = ("--config.mesh.fsdp=2", "--config.pretrain.save_every=5")
    port = runs.free_port()
    first = start_all(2, workdir, *flags, port=port, present=(0,))
    second = start_all(2, workdir, *flags, port=port, present=(1,), under=limited)
    start = time.monotonic()
    results = [runs.finish(each) for each in first + second]
    assert [result.code for result in results] == [2, 2], results
    line = "checkpoints/pretrain: File too large ("
    assert line in results[1].err.splitlines()[-1]
    assert results[0].err.splitlines()[-1].startswith("error: process 1 of 2 (")
    assert line in results[0].err.splitlines()[-1]
    assert not runs.steps(str(workdir), "pretrain")
    assert time.monotonic() - start < 120


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_damage_that_one_process_alone_reads(how, tmp_path):
    """A shard of the newest checkpoint is damaged. All continue from the checkpoint before it."""
    workdir = tmp_path / "run"
    files = runs.files()
    command = (
        *runs.TINY, *files.pretrain, "--config.finetune=none", "--config.mesh.fsdp=2",
        f"--workdir={workdir}",
    )  # fmt: skip
    assert [runs.finish(each).code for each in runs.start_several(2, *command)] == [0, 0]
    want = losses(workdir)
    for path in (workdir / "checkpoints/pretrain/20/params/ocdbt.process_1/d").iterdir():
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes(bytes(byte ^ 255 for byte in path.read_bytes()))
    results = [runs.finish(each, 120) for each in runs.start_several(2, *command)]
    assert [result.code for result in results] == [0, 0], results
    assert "pretrain: continuing at step 10 of 20" in results[0].out
    assert "checkpoints/pretrain/20 is damaged (" in results[0].err
    assert losses(workdir) == want
    assert (workdir / "checkpoints/damaged/pretrain-20").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workdirs_of_their_own_are_refused(alone, tmp_path):
    """This holds even if each workdir has a run of the same experiment."""
    for name in "ab":
        shutil.copytree(alone, tmp_path / name)
    each = lambda index: (f"--workdir={tmp_path / 'ab'[index]}",)  # noqa: E731
    for result in [runs.finish(one) for one in start_all(2, "", each=each, devices=2)]:
        assert result.code == 2, result.err
        assert "does not see what process 0 wrote there" in result.err
    assert not list(tmp_path.glob("*/.seen*"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("which", [0, 1])
def test_a_second_ctrl_c_ends_all_at_once(which, tmp_path):
    workdir = tmp_path / "run"
    processes = start_all(2, workdir, "--config.pretrain.steps=100000", devices=2)
    log, asked = workdir / "metrics.jsonl", processes[which]
    while not (log.exists() and log.stat().st_size):
        assert all(each.poll() is None for each in processes)
        time.sleep(0.01)
    asked.send_signal(signal.SIGINT)
    while "stopping after this step" not in asked.stderr.readline():
        pass
    asked.send_signal(signal.SIGINT)
    results = [runs.finish(each, 60) for each in processes]
    assert [result.code for result in results] == [130, 130], results
    assert results[which].err.endswith("error: interrupted\n")
    assert f"error: process {which} of 2 (" in results[1 - which].err
    assert "Traceback" not in results[0].err + results[1].err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_signal_during_the_rendezvous(tmp_path):
    """The others end by the code for a lost process: the next attempt may succeed."""
    processes = start_all(3, tmp_path / "run", present=(0, 1))
    time.sleep(8)
    assert all(each.poll() is None for each in processes)
    processes[0].send_signal(signal.SIGTERM)
    results = [runs.finish(each, 60) for each in processes]
    assert [result.code for result in results] == [75, LOST], results
    assert "error: process 0 of 3 at --coordinator_address=" in results[1].err
