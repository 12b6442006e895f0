"""The objective does not depend on micro-batches; a step skips gradients that are not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gptjax import mesh, state
from gptjax.config.schema import OptimizerConfig
from gptjax.data import loader
from gptjax.evaluate import score
from gptjax.model import objective
from gptjax.model.losses import Sum
from gptjax.train import step as step_lib
from gptjax.train.optimizer import Optimizer

ADAM = OptimizerConfig(learning_rate=1e-2, epsilon=1e-3, schedule="constant", weight_decay=0.1)
EPS = 2e-5  # as in test_model: float32 rounding in another order of sums


def uneven(task):
    """Returns eight rows whose micro-batches differ: one is full, another nearly all padding."""
    batch, _ = small.packed(task.examples, 96, task.shape)
    real = np.flatnonzero(batch.example_mask.any(axis=1))
    # Micro-batch i has the rows i, i + micro, ...: rows 0, 4, 1, 5 are those of the first ones.
    order = np.full(8, -1)
    order[[0, 4, 1, 5, 2, 6, 3, 7][: len(real)]] = real
    order[order < 0] = np.setdiff1d(np.arange(8), real)
    batch = jax.tree.map(lambda x: x[order], batch)
    weights = batch.lm_weights.sum(1)
    sums = [weights[i::4].sum() for i in range(4)]
    assert min(sums) < 0.5 * max(sums)
    return batch


@pytest.fixture(scope="module")
def tasked():
    task = small.task("similarity")
    return task, mesh.to_devices(uneven(task), small.mesh())


def gradients(task, micro):
    @small.fast_jit
    def run(params, batch):
        key = jax.random.key(0)
        return objective.gradients(task.model, task.objective, params, batch, key, micro)

    return run


@pytest.mark.slow
@pytest.mark.usefixtures("eight_devices")
def test_class_weights_and_smoothing_do_not_depend_on_micro_batches_or_devices(tasked):
    task, batch = tasked
    changed = dataclasses.replace(
        task.objective, class_weights=(0.25, 3.0, 1.5), label_smoothing=0.2
    )
    changed = dataclasses.replace(task, objective=changed)
    count = int(np.asarray(batch.example_mask).sum())
    expected, sums = gradients(changed, 1)(task.params, batch)
    assert float(sums.task.weight) == count
    on = small.mesh(data=4, fsdp=2)
    spread = mesh.to_devices(jax.device_get(batch), on)
    for micro, params, each in (
        (4, task.params, batch), (1, small.placed(task.params, on), spread)
    ):  # fmt: skip
        grads, got = gradients(changed, micro)(params, each)
        small.assert_trees_close(grads, expected, EPS)
        assert float(got.task.total) == pytest.approx(float(sums.task.total), rel=1e-5)
        assert float(got.task.weight) == count


def test_accumulation_gives_the_gradient_and_sums_of_the_whole_batch(tasked):
    task, batch = tasked
    expected = task.measure(task.params, batch)  # micro = 1
    assert float(expected["sums"].task.weight) == 6
    for micro in (2, 4):
        grads, sums = gradients(task, micro)(task.params, batch)
        small.assert_trees_close(grads, expected["gradients"], EPS)
        small.assert_trees_close(sums, expected["sums"], 1e-6)


def test_micro_batches_hold_every_row_once(tasked):
    _, batch = tasked
    parts = objective._micro_batches(batch, 4)
    for whole, cut in zip(jax.tree.leaves(batch), jax.tree.leaves(parts), strict=True):
        assert cut.shape == (4, 2, *whole.shape[1:])
        for row in range(8):
            np.testing.assert_array_equal(
                np.asarray(cut)[row % 4, row // 4], np.asarray(whole)[row]
            )


@pytest.fixture(scope="module")
def optimizer():
    return Optimizer(ADAM, 100)


@pytest.fixture(scope="module")
def step(tasked, optimizer):
    """Returns the library's jitted step without micro-batches on one device."""
    task, _ = tasked
    step = step_lib.jit_train_step(small.mesh(), task.model, task.objective, optimizer)
    return lambda state, batch: step(state, batch, np.uint32(0))


def born(task, optimizer):
    return small.placed(state.create(task.params, optimizer.transformation), small.mesh())


@pytest.mark.slow
def test_a_step_of_four_micro_batches_is_a_step_of_one(tasked, optimizer, step):
    task, batch = tasked
    one, out_one = step(born(task, optimizer), batch)
    in_four = Optimizer(dataclasses.replace(ADAM, accumulation=4), 100)
    four, out_four = small.fast_jit(
        lambda s, b: step_lib.train_step(s, b, 0, task.model, task.objective, in_four)
    )(born(task, optimizer), batch)
    small.assert_trees_close(four, one, 2e-5)
    small.assert_trees_close(out_four, out_one, 2e-5)
    pairs = zip(jax.tree.leaves(one.params), jax.tree.leaves(task.params), strict=True)
    moved = [np.abs(a - b).max() for a, b in pairs]
    assert min(moved) > 0, "an array was not trained"
    assert int(one.step) == 1


def test_a_step_reports_the_loss_and_gradient_norm_before_it(tasked, optimizer, step):
    task, batch = tasked
    expected = jax.device_get(
        task.measure(task.params, small.packed(task.examples, 128, task.shape)[0])
    )
    _, output = step(born(task, optimizer), batch)
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum()
                       for g in jax.tree.leaves(expected["gradients"])))  # fmt: skip
    assert float(output.gradient_norm) == pytest.approx(norm, rel=1e-5)
    small.assert_trees_close(output.losses, expected["sums"], 1e-5)
    assert int(output.bad_steps) == 0


def test_steps_lower_the_loss(tasked, optimizer, step):
    task, batch = tasked
    current, losses = born(task, optimizer), []
    for _ in range(10):
        current, output = step(current, batch)
        losses.append(
            float(objective.joint(task.objective, output.losses, objective.weights(batch)))
        )
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tasked, optimizer, step, bad):
    task, batch = tasked
    before, _ = step(born(task, optimizer), batch)  # so that the moments are not 0
    before = jax.device_get(before)
    poisoned = batch.replace(lm_weights=jnp.where(batch.lm_weights > 0, bad, batch.lm_weights))
    after, output = step(small.placed(before, small.mesh()), poisoned)
    assert int(output.bad_steps) == 1
    assert int(after.step) == 2
    for x, y in zip(jax.tree.leaves(after.params), jax.tree.leaves(before.params), strict=True):
        np.testing.assert_array_equal(x, y)
    inner = zip(
        jax.tree.leaves(after.opt_state.inner_state), jax.tree.leaves(before.opt_state.inner_state),
        strict=True,
    )  # fmt: skip
    for x, y in inner:
        np.testing.assert_array_equal(x, y)
    after, output = step(after, poisoned)
    assert int(output.bad_steps) == 2
    # The next finite step does what it would have done without them.
    expected, _ = step(small.placed(before, small.mesh()), batch)
    after, output = step(after, batch)
    assert int(output.bad_steps) == 0
    assert int(after.opt_state.total_notfinite) == 2
    assert int(after.step) == 4
    small.assert_trees_close(after.params, expected.params, 0.0)


def test_dropout_keys_follow_the_step_and_the_seed(tasked):
    """The same seed and step give the same bits; another seed or step gives another mask."""
    task, batch = tasked
    config = dataclasses.replace(task.model.config, residual_dropout=0.5)
    model = task.model.clone(config=config)

    @small.fast_jit
    def loss(seed, step):
        key = jax.random.fold_in(jax.random.key(seed), step)
        sums, _ = objective.forward(model, task.objective, task.params, batch, key)
        return sums.lm.total

    values = [float(loss(seed, i)) for seed in range(2) for i in range(3)]
    assert len(set(values)) == 6
    assert values[4] == float(loss(1, 1))


def test_eval_step_is_the_forward_without_dropout(tasked):
    task, _ = tasked
    config = dataclasses.replace(
        task.model.config, residual_dropout=0.5, attention_dropout=0.5, embedding_dropout=0.5,
        head_dropout=0.5,
    )  # fmt: skip
    batch, index = small.packed(task.examples, 128, task.shape)
    run = score.jit_eval_step(small.mesh(), task.model.clone(config=config), task.objective)
    sums, logits = run(task.params, batch)
    expected = task.measure(task.params, batch)
    small.assert_trees_close(sums, expected["sums"], 1e-6)
    real = index >= 0
    np.testing.assert_allclose(logits[real], expected["task_logits"][real], atol=1e-5)


def test_objective_without_lm_or_without_task():
    """Lambda 0 leaves the task loss, pretraining has the LM loss, joint training adds both."""
    lm = Sum(jnp.float32(6), jnp.float32(3))
    task = Sum(jnp.float32(5), jnp.float32(2))
    sums = objective.Losses(lm, task)
    assert float(objective.joint(objective.Objective("similarity", 0.5), sums, sums)) == 3.5
    assert float(objective.joint(objective.Objective("similarity", 0.0), sums, sums)) == 2.5
    assert float(objective.joint(objective.Objective(), sums, sums)) == 2.0


def test_pretraining_rows_of_any_length_share_one_mean():
    """Short windows leave padding, and the loss is the mean over the predicted tokens only."""
    model = small.GPT(small.config(num_layers=1))
    params = small.params(model)
    rng = np.random.default_rng(0)
    windows = [rng.integers(97, size=n).astype(np.int32) for n in (32, 5, 1, 17)]
    run = small.measure(model, objective.Objective())
    whole = run(params, loader.lm_batch(windows, 32, 4))
    assert float(whole["sums"].lm.weight) == 31 + 4 + 0 + 16
    total, weight, grads = 0.0, 0.0, None
    for window in windows:
        part = run(params, loader.lm_batch([window], 32, 4))
        n = float(part["sums"].lm.weight)
        total, weight = total + n * float(part["loss"]), weight + n
        scaled = jax.tree.map(lambda g, n=n: np.asarray(g, np.float64) * n, part["gradients"])
        grads = scaled if grads is None else jax.tree.map(np.add, grads, scaled)
    assert float(whole["loss"]) == pytest.approx(total / weight, rel=1e-6)
    mean = jax.tree.map(lambda g: g / weight, grads)
    small.assert_trees_close(whole["gradients"], mean, EPS)
