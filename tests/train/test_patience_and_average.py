"""Training that ends early, and averaged weights: their formulas, and continued runs."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import small
from memory_runs import Recorder, experiment, finetuning, tables

import gptjax
from gptjax import state as state_lib
from gptjax.checkpoint.memory import MemoryStore
from gptjax.config.schema import CheckpointConfig, OptimizerConfig
from gptjax.errors import Preempted, StopRequested
from gptjax.model import gpt
from gptjax.train import run as run_lib
from gptjax.train import step as step_lib
from gptjax.train.loop import has_ended
from gptjax.train.optimizer import Optimizer, averaged

DECAY = 0.8
STEPS = 6


def planned(rate=0.01, keep=10, layers=1, **changes):
    """An experiment that validates after every second step and keeps its checkpoints."""
    optimizer = OptimizerConfig(learning_rate=rate, schedule="constant", epsilon=1e-3)
    values = {"steps": STEPS, "evals_per_epoch": 4.0, "save_every": 1, "optimizer": optimizer}
    plan = experiment(finetune=finetuning(**values | {"baseline": "none"} | changes))
    policy = CheckpointConfig(keep_newest=keep, keep_best=0)
    model = dataclasses.replace(plan.model, num_layers=layers)
    return dataclasses.replace(plan, checkpoint=policy, model=model)


def train(workdir, plan, **options):
    recorder = Recorder()
    options = run_lib.Options(tables=tables(), reporter=recorder, **options)
    return run_lib.run(plan, str(workdir), options)["finetune"], recorder.lines


def saved(workdir, step):
    """The arrays of a checkpoint: path -> array."""
    found = runs.arrays(str(workdir), "finetune", step)
    return {
        name: np.frombuffer(data, dtype).reshape(shape)
        for name, (dtype, shape, data) in found.items()
    }


def interrupted(workdir, plan, after, monkeypatch):
    """Stops a run after so many looks at the request to stop, and then continues it."""
    calls = []

    def stop():
        calls.append(None)
        if len(calls) > after:
            raise StopRequested

    with monkeypatch.context() as patch:
        patch.setattr(run_lib, "make_check", lambda _: stop)
        with pytest.raises(Preempted):
            train(workdir, plan)
    return train(workdir, plan)


def assert_same(ours, theirs):
    """Compares the checkpoints and the records of two workdirs."""
    steps = runs.steps(str(theirs), "finetune")
    assert runs.steps(str(ours), "finetune") == steps
    for step in steps:
        assert runs.arrays(str(ours), "finetune", step) == runs.arrays(
            str(theirs), "finetune", step
        )
    assert runs.records(str(ours)) == runs.records(str(theirs))


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_average_is_the_weighted_mean_of_all_updates(decay):
    """The weight of update i after t updates is decay^(t - i), in float64."""
    values = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    average = {"w": jnp.full(3, 1e6)}  # the first parameters have no weight
    step = jax.jit(averaged, static_argnums=2)
    for t in range(1, len(values) + 1):
        average = step(average, {"w": jnp.asarray(values[t - 1])}, decay, jnp.int32(t))
        weights = decay ** np.arange(t - 1, -1, -1.0)
        expected = (weights[:, None] * values[:t]).sum(axis=0) / weights.sum()
        np.testing.assert_allclose(average["w"], expected, rtol=2e-5, atol=1e-6)


@pytest.fixture(scope="module")
def average_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("average") / "run"
    return workdir, *train(workdir, planned(average=DECAY))


def test_a_run_saves_scores_and_tests_the_average_and_trains_the_raw_weights(average_run, tmp_path):
    """The raw weights are those of a run without an average, of which the average is computed."""
    workdir, summary, _ = average_run
    train(tmp_path / "plain", planned())
    history = [saved(tmp_path / "plain", step) for step in range(1, STEPS + 1)]
    assert not any("raw_params" in name for name in history[0])
    got = saved(workdir, STEPS)
    names = [name for name in history[0] if name.startswith("params")]
    weights = DECAY ** np.arange(STEPS - 1, -1, -1.0)
    for name in names:
        raw = got[name.replace("params", "optimizer['raw_params']", 1)]
        np.testing.assert_allclose(raw, history[-1][name], atol=2e-5)
        values = np.stack([each[name] for each in history])
        expected = np.tensordot(weights / weights.sum(), values, 1)
        np.testing.assert_allclose(got[name], expected, atol=2e-5)
    assert np.abs(got[names[0]] - history[-1][names[0]]).max() > 1e-3
    rows = tables()["finetune"]
    loaded = gptjax.load(workdir)
    best = int(loaded.path.rsplit("/", 1)[1])
    (record,) = [
        each for each in runs.records(str(workdir))
        if (each["step"], each["split"]) == (best, "validation")
    ]  # fmt: skip
    assert loaded.score(rows["validation"])["task_loss"] == pytest.approx(record["task_loss"])
    assert loaded.score(rows["test"])["task_loss"] == pytest.approx(summary["test"]["task_loss"])
    # A trial, which keeps its weights in memory, gives the same.
    trial, _ = train(tmp_path / "trial", planned(average=DECAY), trial=True)
    assert trial["test"] == summary["test"]


@pytest.mark.slow
def test_a_continued_average_is_the_uninterrupted_one(tmp_path, monkeypatch):
    """Blocks are frozen too. Only what is trained has a second copy."""
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    plan = planned(average=DECAY, freeze=1, layers=2)
    whole, _ = train(tmp_path / "whole", plan)
    found = saved(tmp_path / "whole", STEPS)
    raw = [name for name in found if "raw_params" in name]
    assert raw
    assert not any("embedding" in name for name in raw)
    assert {found[name].shape[0] for name in raw if "blocks" in name} == {1}
    # The validations and the computation of the states look at the request too.
    again, lines = interrupted(tmp_path / "again", plan, 12, monkeypatch)
    assert any("continuing at step" in line for line in lines)
    assert_same(tmp_path / "again", tmp_path / "whole")
    assert again["test"] == whole["test"]


def store(values, metric="accuracy", every=2):
    """A store with a validation after every second step."""
    found = MemoryStore("nowhere", metric)
    for n, value in enumerate(values, 1):
        found.set_metrics(every * n, {metric: value})
    return found


@pytest.mark.parametrize(
    ("values", "metric", "end"),
    [
        ([0.5, 0.6, 0.6, 0.5], "accuracy", 8),
        ([0.5, 0.4, 0.6, 0.5, 0.7, 0.7, 0.6], "accuracy", 14),
        ([0.5, 0.4, 0.3, 0.4], "mse", None),
        ([0.3, 0.4, 0.5], "mse", 6),
        ([float("nan"), None, 0.5], "accuracy", None),
        ([0.5, float("nan"), None], "accuracy", 6),
    ],
)
def test_the_training_ends_after_two_validations_without_a_better_score(values, metric, end):
    stage = types.SimpleNamespace(total_steps=100, patience=2, metric=metric)
    ended = [step for step in range(101) if has_ended(stage, store(values, metric), step)]
    assert ended[0] == (end or 100)
    assert ended[-1] == 100
    without = types.SimpleNamespace(total_steps=100, patience=0, metric=metric)
    assert [s for s in range(101) if has_ended(without, store(values, metric), s)] == [100]


@pytest.mark.slow
def test_a_run_without_progress_ends_early_and_is_continued_as_one_that_has_ended(
    tmp_path, monkeypatch
):
    """The rate is too small to change an answer, so the first of the validations stays the best."""
    plan = planned(rate=1e-9, keep=1, steps=40, patience=3)
    looks = []
    with monkeypatch.context() as patch:
        patch.setattr(run_lib, "make_check", lambda _: lambda: looks.append(None))
        summary, lines = train(tmp_path / "whole", plan)
    assert (summary["steps"], summary["stopped_early"]) == (8, True)
    assert any(
        "stopped at step 8 of 40, because accuracy has not improved for 3" in line for line in lines
    )
    assert runs.steps(str(tmp_path / "whole"), "finetune") == [8]
    (tested,) = [each for each in runs.records(str(tmp_path / "whole")) if each["split"] == "test"]
    assert tested["step"] == 8
    before = runs.snapshot(tmp_path / "whole" / "checkpoints")
    records = runs.records(str(tmp_path / "whole"))
    again, _ = train(tmp_path / "whole", plan)
    assert again == summary
    assert runs.snapshot(tmp_path / "whole" / "checkpoints") == before
    assert runs.records(str(tmp_path / "whole")) == records
    # The first stop is in the training. The second is in the test, after the training has ended.
    for n, after in enumerate((7, len(looks) - 1)):
        found, _ = interrupted(tmp_path / str(n), plan, after, monkeypatch)
        assert found["steps"] == 8
        assert_same(tmp_path / str(n), tmp_path / "whole")


@pytest.mark.usefixtures("eight_devices")
def test_the_second_copy_is_sharded_like_the_parameters():
    model = gpt.make_model(small.config(), None)
    optimizer = Optimizer(OptimizerConfig(), 10, average=DECAY)
    make = step_lib.initial_state(model, optimizer)
    state = state_lib.abstract(make, small.mesh(2, 2, 2), jax.random.key(0))
    places = [
        jax.tree.map(lambda x: (x.shape, x.sharding), tree)
        for tree in (state.params, state.raw_params)
    ]
    assert places[0] == places[1]
    assert not all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state.raw_params))
