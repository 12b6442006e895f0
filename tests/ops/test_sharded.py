"""Operations on several devices against those on one, and the bytes that they communicate."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import small
from jax.sharding import NamedSharding

from gptjax import mesh as mesh_lib
from gptjax.batch import Batch
from gptjax.model import losses
from gptjax.ops.cross_entropy import LMHeadWeights
from gptjax.ops.sharded import ShardedOps

pytestmark = pytest.mark.devices(8)

MESHES = [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)]
LAYERS, WIDTH, LENGTH, VOCABULARY, ROWS = 3, 16, 16, 96, 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize(
    ("name", "inputs", "shape"),
    [
        ("blocks/ffn_in/kernel", 1, (16, 32)),
        ("blocks/ffn_out/kernel", 1, (32, 16)),
        ("blocks/attention/out/kernel", 2, (4, 4, 16)),
        ("blocks/attention/qkv/kernel", 1, (16, 3, 3, 8)),  # tensor does not divide three heads
        ("task_head/kernel", 1, (16, 3)),
    ],
    ids=["ffn_in", "ffn_out", "out", "qkv, 3 heads", "head"],
)
def test_a_product_and_its_gradients_are_those_of_one_device(name, inputs, shape, sizes, dtype):
    """Compares with float64. Up to four devices round their bfloat16 part of a sum, and the sum."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 5, *shape[:inputs]))
    kernel, g = rng.normal(size=shape), rng.normal(size=(8, 5, *shape[inputs:]))
    x, kernel, g = jnp.asarray(x, dtype), jnp.asarray(kernel, jnp.float32), jnp.asarray(g, dtype)
    rounded = kernel.astype(dtype)
    y, d_x = (
        np.tensordot(np.asarray(a, np.float64), np.asarray(b, np.float64), inputs_or_axes)
        for a, b, inputs_or_axes in (
            (x, rounded, inputs),
            (g, np.moveaxis(np.asarray(rounded, np.float64), range(inputs), range(-inputs, 0)),
             len(shape) - inputs),
        )
    )  # fmt: skip
    d_kernel = np.tensordot(np.asarray(x, np.float64), np.asarray(g, np.float64), ((0, 1), (0, 1)))
    mesh = small.mesh(*sizes)
    spec = mesh_lib.parameter_spec(name, shape, mesh)
    kernel = jax.device_put(kernel, NamedSharding(mesh, spec))

    @small.fast_jit
    def run(x, kernel, g):
        y, back = jax.vjp(lambda x, k: ShardedOps(mesh).linear(x, k, inputs, name), x, kernel)
        return y, *back(g.astype(y.dtype))

    got = run(x, kernel, g)
    assert got[2].sharding.is_equivalent_to(NamedSharding(mesh, spec), len(shape))
    tolerance = 2e-6 if dtype == "float32" else 2**-7
    small.assert_trees_close(got, (y, d_x, d_kernel), tolerance)
    small.assert_trees_close(got[2], d_kernel, 2e-6)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("vocabulary", [97, 96], ids=["odd", "even"])
@pytest.mark.parametrize("bias", [False, True], ids=["tied", "bias"])
def test_the_table_s_gradient_of_both_uses_is_that_of_one_device(vocabulary, sizes, bias):
    """A look-up and the LM loss use one table; 97 rows must be padded for an even `tensor`."""
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.normal(size=(vocabulary, 16)), jnp.float32)
    offset = jnp.asarray(rng.normal(size=vocabulary), jnp.float32) if bias else None
    tokens = rng.integers(vocabulary, size=(8, 6)).astype(np.int32)
    tokens[0] = vocabulary - 1  # in the last part, and more than once
    weights = rng.random((8, 6)).astype(np.float32)
    batch = Batch(tokens, tokens, tokens, tokens, weights)

    def loss(table, offset, mesh=None):
        ops = ShardedOps(mesh)
        copies = None if mesh is None else ops.replicate_table(table)
        x = table[tokens] if mesh is None else ops.lookup(copies, tokens)
        return losses.lm_loss(jnp.tanh(x), LMHeadWeights(table, offset, copies), batch, ops).total

    arguments = (0, 1) if bias else (0,)
    expected = jax.value_and_grad(loss, arguments)(table, offset)
    mesh = small.mesh(*sizes)
    step = small.fast_jit(jax.value_and_grad(functools.partial(loss, mesh=mesh), arguments))
    spec = mesh_lib.parameter_spec("token_embedding", table.shape, mesh)
    got = step(jax.device_put(table, NamedSharding(mesh, spec)), offset)
    small.assert_trees_close(got, expected, 5e-6)
    alone = small.fast_jit(functools.partial(loss, mesh=mesh))(table, offset)
    assert float(alone) == pytest.approx(float(expected[0]), rel=2e-6)


def test_logits_of_a_mesh_are_those_of_one_device():
    rng = np.random.default_rng(2)
    x, table = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 3, 16), (97, 16)))
    for sizes in MESHES:
        mesh = small.mesh(*sizes)
        got = small.fast_jit(ShardedOps(mesh).logits)(x, table)
        small.assert_trees_close(got, x @ table.T, 2e-6)


BLOCKS = LAYERS * 12 * WIDTH**2
TABLE = VOCABULARY * WIDTH
VECTORS = LENGTH * WIDTH + LAYERS * (3 + 1 + 4 + 1 + 4) * WIDTH


@functools.cache
def collectives(data: int, fsdp: int, tensor: int, *more: str) -> dict[str, int]:
    """Returns the bytes that a device sends in a float32 train step, by collective."""
    result = runs.main(
        "--mode=compile", f"--topology=cpu:{data * fsdp * tensor}", *runs.TINY,
        f"--config.model.num_layers={LAYERS}", f"--config.pretrain.batch_size={ROWS}",
        "--config.model.residual_dropout=0.1", "--config.model.unroll=1",
        f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}",
        f"--config.mesh.tensor={tensor}", *more,
    )  # fmt: skip
    assert result.code == 0, result.err
    found = json.loads(result.out)["collectives"]
    return {name: each["bytes"] for name, each in found.items()}


TINY = 200  # bytes of the losses, the gradient norm, and whether the gradients are finite


@pytest.mark.slow
def test_fsdp_gathers_weights_and_scatters_gradients_and_nothing_else():
    found = collectives(1, 8, 1)
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}
    # The blocks' weights are gathered in the forward and in the backward pass, the embedding once
    # for both of its uses.
    assert found["all-gather"] == 4 * (2 * BLOCKS + TABLE)
    assert found["reduce-scatter"] == 4 * (BLOCKS + TABLE)
    assert 0 <= found["all-reduce"] - 4 * VECTORS < TINY


@pytest.mark.slow
def test_data_and_fsdp_sum_what_fsdp_has_cut():
    found = collectives(4, 2, 1)
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert found["all-gather"] == 4 * (2 * BLOCKS + TABLE)
    assert found["reduce-scatter"] == 4 * (BLOCKS + TABLE)
    assert 0 <= found["all-reduce"] - 4 * ((BLOCKS + TABLE) / 2 + VECTORS) < TINY


@pytest.mark.slow
def test_tensor_sums_the_activations_four_times_a_layer():
    """Besides these sums there are one for look-ups, one for d_x of the loss, and the softmax."""
    found = collectives(1, 1, 2)
    assert set(found) == {"all-reduce"}
    states = 4 * ROWS * LENGTH * WIDTH
    softmax = 3 * 4 * ROWS * LENGTH
    assert 0 <= found["all-reduce"] - (4 * LAYERS + 2) * states - softmax < TINY


@pytest.mark.slow
def test_full_remat_gathers_no_weight_more_often_than_none():
    """The recomputed forward pass uses the weights that are gathered for the gradients."""
    found = collectives(1, 8, 1, "--config.model.remat=full")["all-gather"]
    assert found == 4 * (2 * BLOCKS + TABLE)
