"""Runs with frozen blocks: equal to training without a cache, resumed, saved and used as others."""

import dataclasses
import errno
import os

import jax
import numpy as np
import optax
import pytest
import reference
import runs
import small
from memory_runs import Recorder, experiment, finetuning, tables
from refusals import fails

import gptjax
from gptjax import mesh as mesh_lib
from gptjax import state as state_lib
from gptjax.config.schema import OptimizerConfig, TokenizerConfig
from gptjax.data import states as store
from gptjax.errors import Preempted, StopRequested
from gptjax.model import frozen as frozen_lib
from gptjax.model import gpt, objective
from gptjax.train import run as run_lib
from gptjax.train import states, step
from gptjax.train.loop import Trainer

LAYERS = 3
STEPS = 6
RATE = 0.01


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache of this module."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("GPTJAX_CACHE", str(folder))
        yield folder / "data"


def planned(dtype="float32", dropout=0.1, seed=0, tokens=80, **changes):
    """An experiment with a model of three layers and dropout, from random weights."""
    optimizer = OptimizerConfig(
        learning_rate=RATE, schedule="constant", weight_decay=0.1, epsilon=1e-3, clip_norm=0.5
    )
    values = {"steps": STEPS, "save_every": 3, "optimizer": optimizer} | changes
    plan = experiment(finetune=finetuning(**values))
    rates = ("embedding_dropout", "attention_dropout", "residual_dropout", "head_dropout")
    model = dataclasses.replace(
        plan.model, num_layers=LAYERS, dtype=dtype, **dict.fromkeys(rates, dropout)
    )
    tokenizer = TokenizerConfig(vocab_size=tokens)
    return dataclasses.replace(plan, model=model, seed=seed, tokenizer=tokenizer)


def train(workdir, plan, rows=None, **options):
    recorder = Recorder()
    options = run_lib.Options(tables=rows or tables(), reporter=recorder, **options)
    summary = run_lib.run(plan, str(workdir), options)
    return summary, recorder.lines


def saved(workdir, number=STEPS):
    """The parameters of a checkpoint: path -> array."""
    found = runs.arrays(str(workdir), "finetune", number)
    return {
        name: np.frombuffer(data, dtype).reshape(shape)
        for name, (dtype, shape, data) in found.items()
        if name.startswith("params")
    }


def first_params(plan):
    """The random parameters that a run of this plan starts from, and its stage without freezing."""
    plain = dataclasses.replace(plan, finetune=dataclasses.replace(plan.finetune, freeze=0))
    mesh = mesh_lib.make_mesh(plain.mesh)
    options = run_lib.Options(tables=tables())
    _, setup, (stage,) = run_lib.prepare(plain, "nowhere", mesh, options)
    make = step.initial_state(stage.model, stage.optimizer)
    state = state_lib.born_sharded(make, mesh, jax.random.key(setup.seed))
    return stage, jax.device_get(state.params)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with one frozen block: its plan, workdir, summary and lines."""
    workdir, plan = tmp_path_factory.mktemp("frozen") / "run", planned(freeze=1)
    return plan, workdir, *train(workdir, plan)


@pytest.mark.slow
def test_it_equals_training_with_stopped_gradients_and_no_cache(whole):
    """The truth computes the frozen part in each step, in a tree of which nothing is cut off.

    It stops the gradients there, and uses optax's own AdamW.
    """
    plan, workdir, *_ = whole
    stage, params = first_params(plan)
    model, count = stage.model, 1
    upper = frozen_lib.upper_model(model, count)
    adam = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(RATE, eps=1e-3, weight_decay=0.1, mask=is_matrix),
    )

    def stopped(params):
        def cut(x):
            return jax.numpy.concatenate([jax.lax.stop_gradient(x[:count]), x[count:]])

        blocks = jax.tree.map(cut, params["blocks"])
        rest = {n: jax.lax.stop_gradient(x) for n, x in params.items() if "embedding" in n}
        return params | rest | {"blocks": blocks}

    def loss(params, batch, key):
        params = stopped(params)
        ids = (batch.tokens, batch.segment_ids, batch.positions, batch.token_types)
        lower = model.clone(config=dataclasses.replace(model.config, num_layers=count))
        below = params | {"blocks": jax.tree.map(lambda x: x[:count], params["blocks"])}
        hidden = gpt.run(lower, below, *ids, method="hidden")
        above = params | {"blocks": jax.tree.map(lambda x: x[count:], params["blocks"])}
        batch = batch.replace(hidden=hidden)
        sums, _ = objective.forward(upper, stage.objective, above, batch, key)
        return objective.joint(stage.objective, sums, objective.weights(batch))

    @small.fast_jit
    def update(params, state, batch, key):
        grads = jax.grad(loss)(params, batch, key)
        updates, state = adam.update(grads, state, params)
        # Weight decay would change the frozen part too.
        updates = jax.tree.map(lambda u, g: jax.numpy.where(g == 0, 0.0, u), updates, grads)
        return optax.apply_updates(params, updates), state

    moments = adam.init(params)
    for number in range(STEPS):
        key = jax.random.fold_in(jax.random.key(plan.seed), number)
        params, moments = update(params, moments, stage.batches[number], key)
    got = saved(workdir)
    expected = {
        "params" + jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert got.keys() == expected.keys()
    small.assert_trees_close(got, {name: expected[name] for name in got}, 5e-5)


def is_matrix(params):
    """Weight decay applies to matrices: not to biases and gains."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel" or "embedding" in path[-1].key, params
    )


def test_the_frozen_part_keeps_its_bits_and_all_else_moves(whole):
    plan, workdir, *_ = whole
    _, start = first_params(plan)
    got = saved(workdir)
    for path, leaf in jax.tree_util.tree_leaves_with_path(start):
        name = "params" + jax.tree_util.keystr(path)
        if path[0].key == "blocks":
            np.testing.assert_array_equal(got[name][:1], leaf[:1])
            assert all((got[name][i] != leaf[i]).any() for i in range(1, LAYERS)), name
        elif "embedding" in name:
            np.testing.assert_array_equal(got[name], leaf)
        else:
            assert (got[name] != leaf).any(), name


def test_the_batches_are_those_of_a_run_without_freezing(whole):
    """The ledger is the hash of the batches. It does not depend on the frozen blocks."""
    plan, workdir, *_ = whole
    stage, _ = first_params(plan)
    assert stage.batches[0].hidden is None
    frozen = runs.records(str(workdir))[0]["ledger"]
    checksum = int(small.fast_jit(step.ledger.of_batch)(stage.batches[0]))
    assert step.ledger.entry("", checksum) == frozen


def test_the_saved_model_predicts_what_the_training_scored(whole):
    """The checkpoint is a complete model: it is loaded and evaluated without any cache."""
    _, workdir, summary, _ = whole
    loaded = gptjax.load(str(workdir))
    rows = tables()["finetune"]["test"]
    answers = loaded.predict([{"text": row["text"]} for row in rows])
    right = np.mean([a == row["label"] for a, row in zip(answers.labels, rows, strict=True)])
    assert right == pytest.approx(summary["finetune"]["test"]["accuracy"])
    index = [answers.label_names.index(row["label"]) for row in rows]
    nats = -np.log(answers.probabilities[np.arange(len(rows)), index]).mean()
    assert nats == pytest.approx(summary["finetune"]["test"]["calibrated_task_loss"], rel=1e-5)


def test_the_user_is_told(whole):
    lines = whole[-1]
    assert any("the frozen layers have random weights" in line for line in lines)
    (line,) = (line for line in lines if "are frozen" in line)
    assert "the first 1 of 3 layers are frozen; their states (1 MB) are computed once" in line


def test_a_resumed_run_is_the_uninterrupted_one(whole, tmp_path, monkeypatch):
    """It is stopped after step 3. The cache is lost meanwhile, and computed again."""
    plan, workdir, *_ = whole
    calls = []

    def stop():
        calls.append(None)
        if len(calls) > 3:
            raise StopRequested

    original = Trainer.train
    monkeypatch.setattr(run_lib, "make_check", lambda _: lambda: None)

    def stopping(trainer):
        setup = dataclasses.replace(trainer._context.setup, check_stop=stop)
        trainer._context = dataclasses.replace(trainer._context, setup=setup)
        return original(trainer)

    monkeypatch.setattr(Trainer, "train", stopping)
    with pytest.raises(Preempted):
        train(tmp_path / "run", plan)
    monkeypatch.setattr(Trainer, "train", original)
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "new"))
    _, lines = train(tmp_path / "run", plan)
    assert any("continuing at step 3 of 6" in line for line in lines)
    ours, theirs = str(tmp_path / "run"), str(workdir)
    assert runs.arrays(ours, "finetune", STEPS) == runs.arrays(theirs, "finetune", STEPS)
    assert runs.records(ours) == runs.records(theirs)


def test_another_run_reads_the_states(whole, tmp_path, monkeypatch):
    plan, workdir, *_ = whole
    monkeypatch.setattr(states.Frozen, "_compute", lambda *_: pytest.fail("computed again"))
    _, lines = train(tmp_path / "again", plan)
    assert any("are read from" in line for line in lines)
    assert runs.records(str(tmp_path / "again")) == runs.records(str(workdir))


def test_the_states_are_computed_again_if_something_changes_them(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path))
    computed = []

    def compute(self, lower, examples):
        computed.append(self)
        yield 0, np.zeros((int(examples.lengths.sum()), self.model.config.width), np.float32)

    monkeypatch.setattr(states.Frozen, "_compute", compute)
    spec, data = small.examples("entailment", count=6)

    def computations(data=data, seed=0, count=1, mesh=None, changed_block=None, **changes):
        """Returns the number of computations of a run."""
        computed.clear()
        model = gpt.make_model(small.config(**changes), spec)
        params = small.params(model, seed)
        if changed_block is not None:
            blocks = params["blocks"]
            scale = blocks["norm1"]["scale"].at[changed_block, 0].add(1e-6)
            norm = blocks["norm1"] | {"scale": scale}
            params = params | {"blocks": blocks | {"norm1": norm}}
        frozen = states.Frozen(model, count, mesh or small.mesh())
        frozen.with_states(params, {"train": data}, str)
        return len(computed)

    assert computations() == 1
    assert computations() == 0
    # These change only what lies above the frozen block, or the training.
    assert computations(changed_block=1) == 0
    assert computations(embedding_dropout=0.1, residual_dropout=0.1, remat="full") == 0
    assert computations(data=dataclasses.replace(data, labels=data.labels[::-1])) == 0
    tokens = [*data.tokens[:-1], data.tokens[-1][::-1]]
    later = data.second_start + np.arange(len(data.tokens), dtype=np.int32)
    for changes in (
        {"seed": 1}, {"count": 2}, {"changed_block": 0}, {"layer_norm_epsilon": 1e-6},
        {"activation": "relu"}, {"num_heads": 2}, {"attention": "plain"},
        {"data": dataclasses.replace(data, tokens=tokens)},
        {"data": dataclasses.replace(data, second_start=later)},
    ):  # fmt: skip
        assert computations(**changes) == 1, changes
    with monkeypatch.context() as patch:
        patch.setattr(jax, "__version__", "99")
        assert computations() == 1


@pytest.mark.parametrize(("dtype", "lm_weight"), [("float32", 0.5), ("bfloat16", 0.0)])
def test_only_the_head_is_trained_above_all_blocks(tmp_path, dtype, lm_weight):
    plan = planned(freeze=LAYERS, dtype=dtype, lm_weight=lm_weight, steps=3)
    summary, _ = train(tmp_path / "run", plan)
    _, start = first_params(plan)
    got = saved(tmp_path / "run", 3)
    moved = {
        name
        for path, leaf in jax.tree_util.tree_leaves_with_path(start)
        if (got[name := "params" + jax.tree_util.keystr(path)] != leaf).any()
    }
    assert moved == {"params['task_head']['kernel']", "params['task_head']['bias']"}
    assert np.isfinite(summary["finetune"]["validation"]["loss"])


def test_the_states_are_those_of_each_text_alone():
    """The truth is the NumPy model in float64, which knows neither packing nor the cache."""
    for kind in ("multiple_choice", "entailment"):
        task = small.task(kind)
        frozen = states.Frozen(task.model, 1, small.mesh())
        (split,) = frozen.with_states(task.params, {"train": task.examples}, str).values()
        params = reference.cast(frozen_lib.lower_params(task.params, 1))
        place = 0
        for n, tokens in enumerate(split.tokens):
            types = (np.arange(len(tokens)) >= split.second_start[n]).astype(int)
            types = types if task.model.config.segment_types else None
            activation = task.model.config.activation
            expected = reference.hidden(params, tokens, types, activation)
            got = split.hidden[place : place + len(tokens)]
            np.testing.assert_allclose(got, expected, atol=2e-5)
            place += len(tokens)
        assert place == len(split.hidden)


def test_a_model_in_bfloat16_keeps_its_states_in_two_bytes(cache):
    spec, data = small.examples("entailment", count=6)
    model = gpt.make_model(small.config(dtype="bfloat16"), spec)
    before = set(os.listdir(cache)) if cache.exists() else set()
    frozen = states.Frozen(model, 2, small.mesh())
    for _ in range(2):  # computed, then read
        (split,) = frozen.with_states(small.params(model), {"train": data}, str).values()
        assert split.hidden.dtype == jax.numpy.bfloat16
        assert 0.5 < np.abs(split.hidden.astype(np.float32)).mean() < 1.5  # after a layer norm
    (name,) = set(os.listdir(cache)) - before
    assert os.path.getsize(cache / name) == pytest.approx(split.hidden.size * 2, abs=200)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    task = small.task("entailment")
    frozen = states.Frozen(task.model, 1, small.mesh())

    def load():
        frozen.with_states(task.params, {"train": task.examples}, str)

    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 1000})
        patch.setattr(store.shutil, "disk_usage", lambda _: usage)
        message = fails(load)
        assert "hidden states for `finetune.freeze` there (1 MB are free)" in message
        assert "set GPTJAX_CACHE" in message
    original = states._unpacked

    def fills(*args):
        yield next(original(*args))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(states, "_unpacked", fills)
        message = fails(load)
        assert "No space left on device" in message
        assert "`finetune.freeze`=0" in message
    assert os.listdir(tmp_path / "cache" / "data") == []
    load()
    assert len(os.listdir(tmp_path / "cache" / "data")) == 1


def test_without_a_cache_the_states_are_in_memory(whole, tmp_path, monkeypatch):
    plan, workdir, *_ = whole
    monkeypatch.setenv("GPTJAX_CACHE", "")
    _, lines = train(tmp_path / "run", plan)
    assert any("computed once and kept in memory" in line for line in lines)
    assert runs.records(str(tmp_path / "run")) == runs.records(str(workdir))


def test_more_blocks_than_there_are(tmp_path):
    message = fails(train, tmp_path / "run", planned(freeze=4))
    assert "`finetune.freeze`=4: the model has 3 layers" in message
    message = fails(train, tmp_path / "run", planned(freeze=-1))
    assert message == "`finetune.freeze`=-1: must not be negative"
    assert not (tmp_path / "run").exists()


def test_the_comparison_from_scratch_trains_everything():
    """Random blocks that are frozen would be no fair comparison."""
    plan = planned(freeze=1, compare_from_scratch=True)
    options = run_lib.Options(tables=tables())
    *_, stages = run_lib.prepare(plan, "nowhere", small.mesh(), options)
    assert [stage.frozen for stage in stages] == [1, 0]
    assert [stage.read_states is None for stage in stages] == [False, True]
    assert [stage.name for stage in stages] == ["finetune", "finetune_from_scratch"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_train_as_one(tmp_path):
    files, flags = runs.files(), ("--config.finetune.freeze=1", "--config.pretrain=none")
    for count in (1, 2):
        command = (*runs.TINY, *files.finetune, *flags, f"--workdir={tmp_path}/{count}")
        started = runs.start_several(count, *command, devices=2 // count)
        results = [runs.finish(each, 900) for each in started]
        assert [result.code for result in results] == [0] * count, results
    ours, theirs = (runs.records(f"{tmp_path}/{count}") for count in (1, 2))
    for x, y in zip(ours, theirs, strict=True):
        assert x.pop("ledger", "") == y.pop("ledger", "")
        assert x.pop("split") == y.pop("split")
        assert x.pop("stage") == y.pop("stage")
        assert x == pytest.approx(y, rel=2e-4, abs=1e-5)
