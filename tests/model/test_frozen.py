"""Frozen blocks: the cut of the parameter tree, and the gradients of what lies above it."""

import jax
import numpy as np
import pytest
import small

from gptjax import mesh as mesh_lib
from gptjax import state as state_lib
from gptjax.config.schema import OptimizerConfig
from gptjax.model import frozen, gpt, objective
from gptjax.train.optimizer import Optimizer

EPS = 2e-5  # as in test_step: float32 rounding in another order of sums


def params_of(**changes):
    model = gpt.make_model(small.config(num_layers=3, **changes), small.examples("similarity")[0])
    return model, small.params(model)


@pytest.mark.parametrize("count", [1, 3])
def test_the_two_parts_are_the_whole(count):
    _, params = params_of(segment_types=2, tied=False)
    lower, trained = frozen.lower_params(params, count), frozen.trained_part(params, count)
    embeddings = {"token_embedding", "position_embedding", "segment_embedding"}
    assert set(lower) == embeddings | {"blocks"}
    assert set(trained) == {"lm_head", "task_head"} | ({"blocks"} if count < 3 else set())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = [part.key for part in path]
        if name[0] in embeddings:
            assert lower[name[0]] is leaf
        elif name[0] == "blocks":
            parts = [lower["blocks"], trained.get("blocks")]
            for key in name[1:]:
                parts = [part and part[key] for part in parts]
            found = [part for part in parts if part is not None]
            np.testing.assert_array_equal(np.concatenate(found), leaf)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_trained_part_is_put_back_in_its_place(count):
    _, params = params_of()
    new = jax.tree.map(lambda x: x + 1, frozen.trained_part(params, count))
    whole = frozen.with_trained_part(params, new, count)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    small.assert_trees_close(frozen.trained_part(whole, count), new, 0)
    if count:
        small.assert_trees_close(
            frozen.lower_params(whole, count), frozen.lower_params(params, count), 0
        )


def with_hidden(model, params, batch, count):
    """Returns the batch with the states that the frozen blocks compute, 0 at padding."""
    ids = (batch.tokens, batch.segment_ids, batch.positions, batch.token_types)
    lower = frozen.lower_model(model, count)
    states = gpt.run(lower, frozen.lower_params(params, count), *ids, method="hidden")
    return batch.replace(hidden=states * (batch.segment_ids > 0)[..., None])


@pytest.mark.parametrize(
    ("kind", "count", "micro"),
    [
        ("similarity", 1, 1),
        ("multiple_choice", 1, 2),
        ("entailment", 2, 1),
        pytest.param("classification", 1, 1, marks=pytest.mark.slow),
        pytest.param("regression", 1, 1, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_the_whole_model(kind, count, micro):
    """The truth is the gradient of the whole model, from which the frozen part is left out."""
    task = small.task(kind)
    batch = mesh_lib.to_devices(small.packed(task.examples, 96, task.shape)[0], small.mesh())
    expected = task.measure(task.params, batch)

    @small.fast_jit
    def run(params, batch):
        batch = with_hidden(task.model, params, batch, count)
        key = jax.random.key(0)
        return objective.gradients(task.model, task.objective, params, batch, key, micro, count)

    grads, sums = run(task.params, batch)
    truth = frozen.trained_part(expected["gradients"], count)
    if kind == "multiple_choice":
        # A number that is added to the scores of all answers changes nothing, so this gradient is 0
        # but for rounding.
        for tree in (grads, truth):
            tree["task_head"] = {"kernel": tree["task_head"]["kernel"]}
    small.assert_trees_close(sums, expected["sums"], EPS)
    small.assert_trees_close(grads, truth, EPS)


def test_the_optimizer_has_no_moments_of_the_frozen_part():
    """Adam keeps two arrays for each trained array, and nothing else but counters."""
    _, params = params_of()
    optimizer = Optimizer(OptimizerConfig(), 10, frozen=2)
    trained = frozen.trained_part(params, 2)
    state = state_lib.create(params, optimizer.transformation, trained)
    arrays = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(trained)) * 2
    assert sorted(leaf.shape for leaf in arrays) == sorted(shapes)
    assert {leaf.shape for leaf in jax.tree.leaves(trained["blocks"])} == {
        (1, *leaf.shape[1:]) for leaf in jax.tree.leaves(params["blocks"])
    }


def two_steps(sizes, **changes):
    """Trains two steps with dropout on a mesh. Returns the first parameters and the last state."""
    spec, data = small.examples("similarity", count=8)
    rates = dict.fromkeys(("attention_dropout", "residual_dropout", "head_dropout"), 0.1)
    sizes_of = {"vocab_size": 98, "width": 16, "num_heads": 4, "num_layers": 3}
    model = gpt.make_model(small.config(**sizes_of, **rates, **changes), spec)
    params = small.params(model)
    batch = with_hidden(model, params, small.packed(data, 104, (16, 104, 16))[0], 1)
    batch = jax.device_get(batch)
    optimizer = Optimizer(OptimizerConfig(learning_rate=1e-2, epsilon=1e-3), 100, frozen=1)
    trained = frozen.trained_part(params, 1)
    start = jax.device_get(state_lib.create(params, optimizer.transformation, trained))
    mesh = small.mesh(*sizes)
    model = model.clone(mesh=mesh if mesh.size > 1 else None)
    goal = objective.Objective("similarity", 0.5)
    step = small.fast_train_step(mesh, model, goal, optimizer, seed=5)
    state, rows = small.placed(start, mesh), mesh_lib.to_devices(batch, mesh)
    for _ in range(2):
        state, output = step(state, rows)
    places = mesh_lib.state_sharding(state, mesh)
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim), "the state has moved"
    kept = frozen.lower_params(state.params, 1)
    small.assert_trees_close(kept, frozen.lower_params(params, 1), 0)
    return jax.device_get((state, output))


MESHES = pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 1), (1, 1, 4)], ids=str)


@pytest.mark.slow
@MESHES
@pytest.mark.parametrize("changes", [{}, {"tied": False}], ids=str)
def test_a_mesh_trains_the_upper_blocks_as_one_device_does(sizes, changes, eight_devices):
    small.assert_trees_close(two_steps(sizes, **changes), two_steps((1, 1, 1), **changes), EPS)


@pytest.mark.slow
@MESHES
def test_in_bfloat16_a_mesh_is_as_exact_as_one_device(sizes, eight_devices):
    """Both round, in another order, so each is compared with float32.

    The distance is over whole trees. In a single array, such as the bias of the task head, the
    terms of a sum can cancel, and then one rounding is a large part of what remains.
    """
    exact, alone, mesh = (
        [state.params, state.opt_state.inner_state[1].mu]
        for state, _ in (
            two_steps((1, 1, 1)),
            two_steps((1, 1, 1), dtype="bfloat16"),
            two_steps(sizes, dtype="bfloat16"),
        )
    )
    for truth, one, several in zip(exact, alone, mesh, strict=True):
        error = distance(one, truth)
        assert 1e-4 < error / distance(truth, None) < 5e-2
        assert distance(several, truth) < 2 * error


def distance(tree, other):
    """Returns the Euclidean norm of the difference of two trees. None means zeros."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    others = jax.tree.leaves(other) or [0] * len(leaves)
    return np.sqrt(sum(((x - y) ** 2).sum() for x, y in zip(leaves, others, strict=True)))
