"""Schedules against closed forms, and the optimizer against Adam in NumPy float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gptjax.config.schema import OptimizerConfig, Schedule
from gptjax.errors import UserError
from gptjax.model import gpt
from gptjax.model.gpt import GPT
from gptjax.train import optimizer as optimizer_lib
from gptjax.train.optimizer import Optimizer


def rate(step, config, total):
    """Returns the learning rate of update `step`, counted from 0, in closed form."""
    warmup = config.warmup_steps or min(math.ceil(config.warmup_fraction * total), total - 1)
    peak = config.learning_rate
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (total - warmup)
    return {
        "constant": peak,
        "linear": peak * (1 - done),
        "cosine": peak * (1 + math.cos(math.pi * done)) / 2,
    }[config.schedule]


@pytest.mark.parametrize("name", Schedule)
@pytest.mark.parametrize(
    ("warmup", "total"),
    [
        ({}, 1),
        ({}, 50),
        ({"warmup_steps": 1}, 2),
        ({"warmup_steps": 10}, 50),
        ({"warmup_steps": 49}, 50),
        ({"warmup_fraction": 0.002}, 1),
        ({"warmup_fraction": 0.002}, 345),
        ({"warmup_fraction": 0.99}, 3),
        ({"warmup_fraction": 0.5, "warmup_steps": 3}, 50),
    ],
)
def test_schedules_are_the_closed_forms(name, warmup, total):
    config = OptimizerConfig(learning_rate=3e-3, schedule=name, **warmup)
    schedule = Optimizer(config, total).learning_rate
    rates = np.array([float(schedule(step)) for step in range(total)])
    expected = [rate(step, config, total) for step in range(total)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-9)
    assert rates[0] > 0
    assert rates[-1] > 0
    assert rates.max() <= 3e-3 * (1 + 1e-6)
    if name != "constant":
        assert float(schedule(total)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("warmup", "total"), [(10, 10), (2000, 10), (1, 1)])
def test_a_warm_up_without_a_step_after_it(warmup, total):
    config = OptimizerConfig(warmup_steps=warmup)
    with pytest.raises(
        UserError, match=f"`optimizer.warmup_steps`={warmup}: must be below the {total} steps"
    ):
        Optimizer(config, total)


def test_equal_configurations_are_equal_optimizers():
    """The training loop compiles one program for all stages with equal optimizers."""
    one, other = (Optimizer(OptimizerConfig(clip_norm=0.5), 10, name) for name in "ab")
    assert one == other
    assert hash(one) == hash(other)
    assert one != Optimizer(OptimizerConfig(clip_norm=0.5), 11)
    assert one != Optimizer(OptimizerConfig(clip_norm=0.6), 10)
    assert one.transformation is one.transformation


@pytest.mark.parametrize("segment_types", [0, 2])
def test_decay_is_on_all_but_biases_and_gains(segment_types):
    config = small.config(segment_types=segment_types)
    model = GPT(config, num_outputs=3)
    shapes = jax.eval_shape(lambda key: gpt.init_params(model, key), jax.random.key(0))
    mask = optimizer_lib.decay_mask(shapes)
    assert jax.tree.structure(mask) == jax.tree.structure(shapes)
    # Counted from the architecture: matrices are decayed, vectors are not.
    w, ffn, layers = config.width, 4 * config.width, config.num_layers
    vectors = layers * (3 * w + w + ffn + w + 2 * 2 * w) + 3
    rows = config.vocab_size + config.context_length + segment_types
    matrices = layers * (3 * w * w + w * w + 2 * w * ffn) + rows * w + 3 * w
    sizes = {True: 0, False: 0}
    for decayed, leaf in zip(jax.tree.leaves(mask), jax.tree.leaves(shapes), strict=True):
        sizes[decayed] += leaf.size
    assert sizes == {True: matrices, False: vectors}


def numpy_adam(params, gradients, config, total):
    """Computes Adam with decoupled decay of kernels, clipping and schedule, in float64."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for step, gradient in enumerate(gradients):
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
        scale = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        for name, value in params.items():
            g = gradient[name].astype(np.float64) * scale
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * g
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * g * g
            mean = first[name] / (1 - config.beta1 ** (step + 1))
            square = second[name] / (1 - config.beta2 ** (step + 1))
            update = mean / (np.sqrt(square) + config.epsilon)
            if name.endswith("kernel"):
                update = update + config.weight_decay * value
            params[name] = value - rate(step, config, total) * update
    return params


def problem(steps, scale=1.0):
    rng = np.random.default_rng(0)
    shapes = {"lm_head/kernel": (3, 4), "lm_head/bias": (4,), "blocks/norm1/scale": (4,)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    gradients = [
        {name: (scale * rng.normal(size=s)).astype(np.float32) for name, s in shapes.items()}
        for _ in range(steps)
    ]
    return params, gradients


def stepper(config, total):
    """Returns (initial state of params, run(params, gradients, state) -> params, state)."""
    optimizer = Optimizer(config, total).transformation

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    def run(params, gradients, state):
        for gradient in gradients:
            params, state = step(params, state, gradient)
        return params, state

    return jax.jit(optimizer.init), run


def assert_twenty_steps_are_those_of(reference, config):
    """Returns the reference's parameters, and the optimizer's state."""
    params, gradients = problem(20)
    expected = reference(params, gradients, config, 25)
    init, run = stepper(config, 25)
    found, state = run(params, gradients, init(params))
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-6, atol=1e-6)
    return expected, state


@pytest.mark.parametrize("name", Schedule)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_norm": 0.0},
        {"clip_norm": 100.0, "weight_decay": 0.0},
        {"beta1": 0.5, "beta2": 0.98, "epsilon": 1e-3, "weight_decay": 0.3},
    ],
)
def test_twenty_steps_are_those_of_numpy_in_float64(name, changes):
    config = OptimizerConfig(
        **({"learning_rate": 1e-2, "schedule": name, "warmup_steps": 5} | changes)
    )
    _, state = assert_twenty_steps_are_those_of(numpy_adam, config)
    assert int(state.total_notfinite) == 0


@pytest.mark.parametrize("layers", [3, 2])
@pytest.mark.parametrize("algorithm", ["adamw", "openai"])
def test_each_layer_has_its_own_learning_rate(layers, algorithm):
    """The truth trains each block, the embeddings and the head alone, with their own rates.

    Two of the three blocks, without embeddings, are what is trained above one frozen block.
    """
    rng = np.random.default_rng(0)
    shapes = {
        "blocks": {"norm1": {"scale": (layers, 4)}, "ffn_in": {"kernel": (layers, 4, 5)}},
        "task_head": {"kernel": (4, 2)}, "lm_head": {"bias": (7,)},
    }  # fmt: skip
    factors = {"task_head": 1.0, "lm_head": 1.0}
    if layers == 3:
        shapes |= {"token_embedding": (7, 4), "position_embedding": (5, 4)}
        factors |= dict.fromkeys(("token_embedding", "position_embedding"), 0.5**3)
    draw = [
        jax.tree.map(
            lambda shape: rng.normal(size=shape).astype(np.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        for _ in range(6)
    ]
    values = {"algorithm": algorithm, "schedule": "constant", "clip_norm": 0.0}
    values |= {"weight_decay": 0.3, "epsilon": 1e-3}

    def trained(part, rate, **changes):
        config = OptimizerConfig(learning_rate=rate, **values | changes)
        init, run = stepper(config, 25)
        params, *gradients = map(part, draw)
        return run(params, gradients, init(params))[0]

    found = trained(lambda tree: tree, 0.1, layer_decay=0.5)
    for name, factor in factors.items():
        alone = trained(lambda tree, name=name: {name: tree[name]}, 0.1 * factor)
        small.assert_trees_close(found[name], alone[name], 1e-6)
    for layer in range(layers):

        def block(tree, layer=layer):
            return {"blocks": jax.tree.map(lambda x: x[layer : layer + 1], tree["blocks"])}

        alone = trained(block, 0.1 * 0.5 ** (layers - 1 - layer))
        small.assert_trees_close(block(found), alone, 1e-6)


def test_equal_rates_change_no_program():
    params, (gradient,) = problem(1)

    def program(**changes):
        update = Optimizer(OptimizerConfig(**changes), 10).transformation
        return str(jax.make_jaxpr(update.update)(gradient, update.init(params), params))

    assert program() == program(layer_decay=1.0)


def openai_rate(step, config, total):
    """Returns the rate of the authors' `opt.py`, which computes x before it counts the step."""
    x = step / total
    w = config.warmup_steps / total or config.warmup_fraction
    if w and x <= w:
        factor = x / w
    else:
        factor = (1 + math.cos(math.pi * x)) / 2 if config.schedule == "cosine" else 1.0
    if config.schedule == "linear":
        factor *= 1 - x
    return config.learning_rate * factor


def numpy_openai_adam(params, gradients, config, total):
    """Computes `adam` of the authors' `opt.py` from its formula, in float64."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in params.items()}
    v = {name: np.zeros_like(value) for name, value in params.items()}
    for step, gradient in enumerate(gradients):
        t = step + 1
        correction = math.sqrt(1 - config.beta2**t) / (1 - config.beta1**t)
        rate_t = openai_rate(step, config, total) * correction
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
        for name, p in params.items():
            g = gradient[name].astype(np.float64)
            if config.clip_norm:
                g = g * config.clip_norm / max(norm, config.clip_norm)
            m[name] = config.beta1 * m[name] + (1 - config.beta1) * g
            v[name] = config.beta2 * v[name] + (1 - config.beta2) * g * g
            direction = m[name] / (np.sqrt(v[name]) + config.epsilon)
            if p.ndim > 1:
                direction = direction + config.weight_decay * p
            params[name] = p - rate_t * direction
    return params


@pytest.mark.parametrize("name", Schedule)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"warmup_fraction": 0.002},
        {"warmup_steps": 5, "clip_norm": 0.0},
        {"warmup_steps": 5, "clip_norm": 100.0, "weight_decay": 0.0},
        {"warmup_steps": 7, "beta1": 0.5, "beta2": 0.98, "epsilon": 1e-3, "weight_decay": 0.3},
        {"beta1": 0.0, "beta2": 0.9},
    ],
)
def test_twenty_steps_of_the_authors_adam(name, changes):
    config = OptimizerConfig(
        **({"algorithm": "openai", "learning_rate": 1e-2, "schedule": name} | changes)
    )
    expected, _ = assert_twenty_steps_are_those_of(numpy_openai_adam, config)
    other = numpy_adam(*problem(20), config, 25)
    assert np.abs(other["lm_head/kernel"] - expected["lm_head/kernel"]).max() > 1e-4, (
        "and not those of AdamW"
    )
    rates = [float(Optimizer(config, 25).learning_rate(step)) for step in range(25)]
    closed = [openai_rate(step, config, 25) for step in range(25)]
    np.testing.assert_allclose(rates, closed, rtol=1e-5, atol=1e-9)


def test_the_first_update_of_the_authors_adam_is_none():
    config = OptimizerConfig(algorithm="openai", schedule="linear", warmup_fraction=0.002)
    params, gradients = problem(1)
    init, run = stepper(config, 25)
    found, _ = run(params, gradients, init(params))
    for name, value in params.items():
        assert np.array_equal(found[name], value)


def test_clipping_is_global():
    """A gradient a thousand times larger, clipped to the same norm, gives the same update."""
    config = OptimizerConfig(learning_rate=1e-2, clip_norm=1.0, epsilon=1e-2)
    params, gradients = problem(5, scale=10.0)
    larger = [{name: 1000 * g for name, g in gradient.items()} for gradient in gradients]
    init, run = stepper(config, 10)
    one, _ = run(params, gradients, init(params))
    two, _ = run(params, larger, init(params))
    for name in params:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing(clip_norm):
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=3, clip_norm=clip_norm)
    params, gradients = problem(8)
    init, run = stepper(config, 20)
    before, state = run(params, gradients[:4], init(params))
    straight, _ = run(before, gradients[4:], state)
    for bad in (np.nan, np.inf, -np.inf):
        poisoned = {name: gradient.copy() for name, gradient in gradients[0].items()}
        poisoned["lm_head/bias"][2] = bad
        after, skipped = run(before, [poisoned] * 3, state)
        jax.tree.map(np.testing.assert_array_equal, before, after)
        jax.tree.map(np.testing.assert_array_equal, state.inner_state, skipped.inner_state)
        assert (int(skipped.notfinite_count), int(skipped.total_notfinite)) == (3, 3)
        # The next updates are those of a run without bad steps: schedule and moments stayed.
        found, good = run(after, gradients[4:], skipped)
        assert (int(good.notfinite_count), int(good.total_notfinite)) == (0, 3)
        jax.tree.map(np.testing.assert_array_equal, found, straight)


def test_gradients_whose_squares_overflow_are_skipped_too():
    optimizer = Optimizer(OptimizerConfig(), 10).transformation
    params = {"lm_head/kernel": jnp.ones(3)}
    state = optimizer.init(params)
    updates, after = optimizer.update({"lm_head/kernel": jnp.full(3, 1e30)}, state, params)
    np.testing.assert_array_equal(updates["lm_head/kernel"], 0)
    assert int(after.notfinite_count) == 1
    np.testing.assert_array_equal(
        jax.tree.leaves(after.inner_state)[0], jax.tree.leaves(state.inner_state)[0]
    )
