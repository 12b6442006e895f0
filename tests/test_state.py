"""A state is created sharded; loaded weights either fit, or the error names all that do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gptjax import mesh as mesh_lib
from gptjax import state
from gptjax.config.schema import OptimizerConfig
from gptjax.model.gpt import GPT
from gptjax.train.optimizer import Optimizer
from gptjax.train.step import initial_state

pytestmark = pytest.mark.devices(8)


def tree(**changes):
    params = {"a": {"kernel": np.ones((2, 3)), "bias": np.zeros(3)}, "b": np.zeros(4)}
    return params | changes


def test_merge_takes_every_loaded_array():
    loaded = jax.tree.map(lambda x: x + 5, tree())
    merged = state.merge_params(loaded, tree())
    for x, y in zip(jax.tree.leaves(merged), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(x, y)


def test_merge_names_every_missing_extra_and_misshapen_array():
    loaded = {
        "a": {"kernel": np.ones((3, 2)), "other": np.zeros(1)},
        "b": np.zeros(5),
        "extra": {"scale": np.zeros(2)},
    }
    with pytest.raises(ValueError, match="weights do not fit the model") as caught:
        state.merge_params(loaded, tree(new=np.zeros(1)))
    message = str(caught.value)
    for part in (
        "missing ['a']['bias']", "missing ['new']", "extra ['a']['other']",
        "extra ['extra']['scale']", "['a']['kernel'] is (3, 2), not (2, 3)",
        "['b'] is (5,), not (4,)",
    ):  # fmt: skip
        assert part in message
    assert message.count(";") == 5, "something else is named"


def test_merge_leaves_what_may_be_new_as_it_is():
    fresh = tree(task_head={"kernel": np.full((2, 2), 7.0)})
    lacking = state.merge_params(tree(), fresh, ("task_head",))
    np.testing.assert_array_equal(lacking["task_head"]["kernel"], fresh["task_head"]["kernel"])
    other = tree(task_head={"kernel": np.zeros((2, 9))})
    assert state.merge_params(other, fresh, ("task_head",))["task_head"]["kernel"].shape == (2, 2)
    assert "task_head" not in state.merge_params(fresh, tree(), ("task_head",))
    with pytest.raises(ValueError, match="task_head"):
        state.merge_params(tree(), fresh)


@pytest.fixture(scope="module")
def maker():
    model = GPT(small.config(num_layers=1, vocab_size=98, num_heads=4), num_outputs=2)
    return initial_state(model, Optimizer(OptimizerConfig(), 10))


@pytest.mark.slow
def test_born_sharded_creates_each_array_in_its_pieces_and_with_the_same_values(maker):
    """The initial weights on eight devices are those on one, bit for bit."""
    mesh = small.mesh(2, 2, 2)
    born = state.born_sharded(maker, mesh, jax.random.key(3))
    places = mesh_lib.state_sharding(born, mesh)
    for leaf, place in zip(jax.tree.leaves(born), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            assert shard.data.shape == place.shard_shape(leaf.shape)
    kernel = born.params["blocks"]["attention"]["qkv"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    table = born.params["token_embedding"]
    assert table.addressable_shards[0].data.size == table.size // 4
    alone = state.born_sharded(maker, small.mesh(), jax.random.key(3))
    for x, y in zip(jax.tree.leaves(born), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(x, y)
    assert int(born.step) == 0
    assert not any(np.any(x) for x in jax.tree.leaves(born.opt_state.inner_state))


def test_abstract_is_the_state_without_its_values(maker):
    mesh = small.mesh(2, 2, 2)
    described = state.abstract(maker, mesh, jax.random.key(0))
    shapes = jax.eval_shape(maker, jax.random.key(0))
    places = mesh_lib.state_sharding(shapes, mesh)
    assert jax.tree.structure(described) == jax.tree.structure(shapes)
    for leaf, shape, place in zip(*map(jax.tree.leaves, (described, shapes, places)), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (shape.shape, shape.dtype, place)
    assert described.step.dtype == jnp.int32


@pytest.mark.parametrize("count", [0, 1, 2])
def test_layers_after_the_transferred_ones_are_the_new_ones(count):
    model = GPT(small.config())
    loaded, fresh = small.params(model, 1), small.params(model, 2)
    kept = state.transfer_layers(loaded, fresh, count)
    for name in ("token_embedding", "position_embedding"):
        np.testing.assert_array_equal(kept[name], loaded[name])
    for ours, old, new in zip(
        *(jax.tree.leaves(params["blocks"]) for params in (kept, loaded, fresh)), strict=True
    ):
        np.testing.assert_array_equal(ours[:count], old[:count])
        np.testing.assert_array_equal(ours[count:], new[count:])
