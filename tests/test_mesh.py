"""Eight devices compute what one computes, and every array has the layout of the table."""

import dataclasses

import jax
import numpy as np
import pytest
import small
from jax.sharding import PartitionSpec as P

from gptjax import mesh as mesh_lib
from gptjax import state
from gptjax.config.schema import MeshConfig, ModelConfig, OptimizerConfig
from gptjax.cost import compile
from gptjax.data import loader
from gptjax.errors import UserError
from gptjax.evaluate import score
from gptjax.model import gpt
from gptjax.model import objective as objective_lib
from gptjax.model.gpt import GPT
from gptjax.train.optimizer import Optimizer
from gptjax.train.step import initial_state

pytestmark = pytest.mark.devices(8)

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 2), (2, 2, 2)]

# The layout of each array of the 117M model: of a matrix one axis is sharded over fsdp, and the
# heads or the wide axis over tensor; vectors of the model's width are not sharded.
PROMISED = {
    "token_embedding": ("tensor", "fsdp"),
    "position_embedding": (None, None),
    "blocks/attention/qkv/kernel": (None, "fsdp", None, "tensor", None),
    "blocks/attention/qkv/bias": (None, None, "tensor", None),
    "blocks/attention/out/kernel": (None, "tensor", None, "fsdp"),
    "blocks/attention/out/bias": (None, None),
    "blocks/ffn_in/kernel": (None, "fsdp", "tensor"),
    "blocks/ffn_in/bias": (None, "tensor"),
    "blocks/ffn_out/kernel": (None, "tensor", "fsdp"),
    "blocks/ffn_out/bias": (None, None),
    "blocks/norm1/scale": (None, None),
    "blocks/norm1/bias": (None, None),
    "blocks/norm2/scale": (None, None),
    "blocks/norm2/bias": (None, None),
    "task_head/kernel": (None, None),
    "task_head/bias": (None,),
}
# The layout of the parameters that only some models have.
PROMISED_OTHERS = {
    "segment_embedding": (None, None),
    "lm_head/kernel": ("tensor", "fsdp"),
    "lm_head/bias": ("tensor",),
}


def full_spec(leaf, place):
    return tuple(place.spec) + (None,) * (leaf.ndim - len(place.spec))


def names(tree):
    return [
        "/".join(k.key for k in path if hasattr(k, "key"))
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


@pytest.fixture(scope="module")
def large():
    """Returns the shapes of the 117M model's training state."""
    model = GPT(ModelConfig(vocab_size=40478), num_outputs=3)
    optimizer = Optimizer(OptimizerConfig(), 10)
    return jax.eval_shape(initial_state(model, optimizer), jax.random.key(0))


def layouts(params):
    """Returns the layout of each parameter on a 2 x 2 x 2 mesh."""
    places = mesh_lib.state_sharding(params, small.mesh(2, 2, 2))
    return {
        name: full_spec(leaf, place)
        for name, leaf, place in zip(
            names(params), jax.tree.leaves(params), jax.tree.leaves(places), strict=True
        )
    }


def test_every_array_of_the_full_size_model_has_its_layout(large):
    assert layouts(large.params) == PROMISED


def test_every_array_of_other_models_has_its_layout():
    config = ModelConfig(vocab_size=40478, tied=False, segment_types=3)
    model = GPT(config, num_outputs=3)
    shapes = jax.eval_shape(lambda key: gpt.init_params(model, key), jax.random.key(0))
    assert layouts(shapes) == PROMISED | PROMISED_OTHERS


def test_the_optimizer_state_has_the_layout_of_the_parameters(large):
    places = mesh_lib.state_sharding(large, small.mesh(2, 2, 2))
    adam = next(
        part for part in jax.tree.leaves(places.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    )  # fmt: skip
    for moments in (adam.mu, adam.nu):
        assert jax.tree.structure(moments) == jax.tree.structure(places.params)
        assert jax.tree.leaves(moments) == jax.tree.leaves(places.params)
    assert places.step.spec == P()
    assert adam.count.spec == P()


def test_nearly_all_of_the_state_is_sharded(large):
    """On a 2 x 2 x 2 mesh a device has 1/4 of every matrix, because data does not shard them."""
    places = mesh_lib.state_sharding(large, small.mesh(2, 2, 2))
    held = sum(
        np.prod(place.shard_shape(leaf.shape), dtype=np.int64)
        for leaf, place in zip(jax.tree.leaves(large), jax.tree.leaves(places), strict=True)
    )
    assert held / sum(leaf.size for leaf in jax.tree.leaves(large)) < 0.255


def test_axes_that_do_not_divide_are_dropped(large):
    """40,478 rows are not a multiple of 4, and 12 heads are not a multiple of 8."""

    def spec(mesh, name):
        places = mesh_lib.state_sharding(large.params, mesh)
        index = names(large.params).index(name)
        return full_spec(jax.tree.leaves(large.params)[index], jax.tree.leaves(places)[index])

    four, eight = small.mesh(1, 2, 4), small.mesh(1, 1, 8)
    assert spec(four, "token_embedding") == (None, "fsdp")
    assert spec(four, "blocks/attention/qkv/kernel") == (None, "fsdp", None, "tensor", None)
    assert spec(eight, "blocks/attention/qkv/kernel") == (None, "fsdp", None, None, None)
    assert spec(eight, "blocks/ffn_in/kernel") == (None, "fsdp", "tensor")
    for mesh in (four, eight):
        for leaf, place in zip(
            jax.tree.leaves(large), jax.tree.leaves(mesh_lib.state_sharding(large, mesh)),
            strict=True,
        ):  # fmt: skip
            place.shard_shape(leaf.shape)  # raises where an axis does not divide


def test_a_mesh_takes_the_devices_that_are_left():
    devices = jax.devices()
    mesh = mesh_lib.make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2), devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh_lib.batch_divisor(mesh) == 4
    with pytest.raises(UserError, match="does not divide"):
        mesh_lib.make_mesh(MeshConfig(data=-1, fsdp=3), devices)
    with pytest.raises(UserError, match="not the number"):
        mesh_lib.make_mesh(MeshConfig(data=2, fsdp=2), devices)


def test_the_data_axis_goes_across_slices():
    """fsdp follows if data is too short; tensor never goes across slices."""
    assert mesh_lib._over_slices([8, 4, 1], 2) == [2, 1, 1]
    assert mesh_lib._over_slices([4, 4, 4], 4) == [4, 1, 1]
    assert mesh_lib._over_slices([2, 8, 1], 4) == [2, 2, 1]
    assert mesh_lib._over_slices([1, 8, 2], 2) == [1, 2, 1]
    with pytest.raises(UserError, match="multiple of the 2 slices"):
        mesh_lib._over_slices([1, 1, 8], 2)


@pytest.fixture(scope="module")
def two_slices():
    """Returns descriptions of two slices of 16 v5e."""
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        for name, value in compile._TPU_ENVIRONMENT.items():
            patch.setenv(name, value)
        bounds = {"chips_per_host_bounds": [2, 2, 1]}
        yield topologies.get_topology_desc("v5e:4x4", "tpu", num_slices=2, **bounds).devices


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("sizes", "across"),
    [((-1, 1, 1), 0), ((-1, 4, 2), 0), ((2, -1, 1), 0), ((-1, 2, 4), 0), ((1, -1, 2), 1)],
    ids=str,
)
def test_a_mesh_of_two_slices(two_slices, sizes, across):
    """The two halves of the axis `across` are in different slices."""
    data, fsdp, tensor = sizes
    mesh = mesh_lib.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), two_slices)
    assert mesh.size == 32
    slices = np.moveaxis(np.vectorize(lambda device: device.slice_index)(mesh.devices), across, 0)
    half = len(slices) // 2
    assert set(slices[:half].flat) != set(slices[half:].flat)
    assert len(set(slices[:half].flat)) == len(set(slices[half:].flat)) == 1


@pytest.mark.tpu
def test_an_axis_may_be_a_part_of_a_torus_s(two_slices):
    """4 x 4 chips also make a mesh of 2 x 4 x 2."""
    one = [device for device in two_slices if device.slice_index == 0]
    mesh = mesh_lib.make_mesh(MeshConfig(data=2, fsdp=4, tensor=2), one)
    assert set(mesh.devices.flat) == set(one)


def test_to_devices_gives_each_device_its_rows():
    mesh = small.mesh(2, 2, 2)
    windows = [np.full(4, i, np.int32) for i in range(8)]
    batch = loader.lm_batch(windows, 4, 8)
    placed = mesh_lib.to_devices(batch, mesh)
    assert placed.extract is None
    for leaf, host in zip(jax.tree.leaves(placed), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(leaf, host)
        for shard in leaf.addressable_shards:
            assert shard.data.shape[0] == 2
            np.testing.assert_array_equal(shard.data, host[shard.index])


DROPOUT = {
    "embedding_dropout": 0.2, "attention_dropout": 0.3, "residual_dropout": 0.1,
    "head_dropout": 0.25,
}  # fmt: skip
# Epsilon is far above the smallest gradients, so that a small difference of gradients remains small
# in Adam's update. There is no clipping, so that the moments show each array's own gradient.
ADAM = OptimizerConfig(
    learning_rate=1e-2, epsilon=1e-2, schedule="constant", weight_decay=0.1, clip_norm=0.0
)


# Changes of the configuration in `problem`. In "odd" tensor divides neither the heads nor the
# vocabulary.
CHANGES = {
    "": {},
    "odd": {"vocab_size": 97, "num_heads": 1},
    "not tied": {"tied": False, "vocab_size": 97, "segment_types": 2, "remat": "full"},
    "one matrix": {"one_matrix": True, "remat": "dots"},
    "clipped, in two": {},
    "bfloat16": {"dtype": "bfloat16"},
    "mean of all states": {},
}


def problem(kind, changes=""):
    """Returns (model, objective, params, batch), with dropout and sizes that the meshes divide."""
    values = {"vocab_size": 98, "width": 16, "num_heads": 4} | DROPOUT | CHANGES[changes]
    config = small.config(**values)
    if not kind:
        model, objective = GPT(config), objective_lib.Objective()
        rng = np.random.default_rng(0)
        windows = [
            rng.integers(values["vocab_size"], size=n).astype(np.int32)
            for n in (32, 9, 32, 5, 20, 32, 2, 30, 31)
        ]
        batch = loader.lm_batch(windows, 32, 16)
    else:
        spec, data = small.examples(kind, count=8)
        spec = dataclasses.replace(spec, mean=changes == "mean of all states")
        model, objective = gpt.make_model(config, spec), objective_lib.Objective(kind, 0.5)
        batch, _ = small.packed(data, 104, (16, 104, 16))
    return model, objective, small.params(model), batch


PROBLEMS = [
    ("", ""),
    *(
        pytest.param(each, marks=pytest.mark.slow)
        for each in (
            ("similarity", ""), ("", "odd"), ("similarity", "odd"), ("", "not tied"),
            ("entailment", "not tied"), ("", "one matrix"), ("similarity", "one matrix"),
            ("", "clipped, in two"), ("similarity", "clipped, in two"), ("", "bfloat16"),
            ("similarity", "mean of all states"),
        )
    ),
]  # fmt: skip


@pytest.fixture(
    scope="module", params=PROBLEMS, ids=lambda each: f"{each[0] or 'pretrain'} {each[1]}".strip()
)
def alone(request):
    """Returns a function that takes two steps on a mesh, and its result on one device."""
    model, objective, params, batch = problem(*request.param)
    micro, clip = (2, 0.5) if request.param[1] == "clipped, in two" else (1, 0.0)
    config = dataclasses.replace(ADAM, clip_norm=clip, accumulation=micro)
    optimizer = Optimizer(config, 100)
    start = jax.device_get(state.create(params, optimizer.transformation))

    def train(mesh):
        step = small.fast_train_step(mesh, model, objective, optimizer, seed=5)
        current, rows = small.placed(start, mesh), mesh_lib.to_devices(batch, mesh)
        results = []
        for _ in range(2):
            current, output = step(current, rows)
            results.append(jax.device_get((current, output)))
        places = mesh_lib.state_sharding(current, mesh)
        for leaf, place in zip(jax.tree.leaves(current), jax.tree.leaves(places), strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim), "the state has moved"
        return results

    return train, train(small.mesh())


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_mesh_computes_what_one_device_computes(alone, sizes):
    """Compares two updates with dropout, whose masks must not depend on the mesh.

    After one step Adam's first moment is 0.1 times the gradient, so that the gradients are compared
    too. The order of float32 sums depends on the mesh: the tolerance is 2e-5 of the largest value.
    """
    train, expected = alone
    got = train(small.mesh(*sizes))
    for (state_got, out_got), (state_want, out_want) in zip(got, expected, strict=True):
        small.assert_trees_close(out_got, out_want, 2e-5)
        small.assert_trees_close(state_got, state_want, 2e-5)


def test_dropout_was_on(alone):
    """The loss of the first step differs from that of the second, whose masks are others."""
    _, expected = alone
    (_, first), (_, second) = expected
    assert first.losses.lm.total != second.losses.lm.total


def test_eval_on_a_mesh_equals_one_device():
    model, objective, params, batch = problem("entailment")
    results = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = small.mesh(*sizes)
        run = score.jit_eval_step(mesh, model, objective)
        sums, logits = run(small.placed(params, mesh), mesh_lib.to_devices(batch, mesh))
        assert logits.sharding.is_fully_replicated
        results.append(jax.device_get((sums, logits)))
    small.assert_trees_close(results[1], results[0], 2e-5)
