"""The TPU kernel: interpreted, against the plain attention and float64; and compiled for a v5e.

The compilation needs libtpu (`pip install -r requirements-tpu.txt`), but no TPU.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from gptjax import mesh as mesh_lib
from gptjax.config.schema import MeshConfig
from gptjax.cost import compile
from gptjax.ops import dropout
from gptjax.ops.attention import flash as flash_lib
from gptjax.ops.attention import plain as plain_lib
from gptjax.ops.attention.inputs import AttentionInputs
from gptjax.ops.dropout import DropoutKey

pytestmark = pytest.mark.devices(8)

BITS = np.array([0x9ABCDEF1, 0x80000003], np.uint32)
# Tolerance relative to the largest value. Both sides sum up to 160 float32 terms in different
# orders, and each rounding is 2^-24 = 6e-8. Scores are up to about 10, so that the exponential
# turns their rounding into 10 * 6e-8.
FLOAT32 = 3e-6


def packed_ids(batch, length, seed=0, segments=4):
    """Returns segment ids: segments 1, 2, ... of random lengths, then padding, id 0."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((batch, length), np.int32)
    for row in ids:
        cuts = np.sort(rng.choice(np.arange(1, length), segments, replace=False))
        for n, (start, end) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True)):
            row[start:end] = n + 1
    return ids


def draw(B=2, T=96, H=2, K=16, dtype="float32", seed=0):
    """Returns random q, k, v and gradient of y."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(1.5 * rng.normal(size=(B, T, H, K)), dtype) for _ in range(4)]


def visible(query_ids, key_ids):
    """Returns which keys a query sees, by the definition."""
    same = np.asarray(query_ids)[:, :, None] == np.asarray(key_ids)[:, None]
    return same & np.tril(np.ones(same.shape[1:], bool))


def pulled(attend):
    """Returns a function (q, k, v, g, *rest) -> y, dq, dk, dv of `attend(q, k, v, *rest)`."""

    def run(q, k, v, g, *rest):
        y, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *rest), q, k, v)
        return y, *pull(g)

    return run


@functools.cache
def flash(rate=0.1, block=32, mesh=None):
    """Returns a jitted function (q, k, v, g, query_ids, key_ids, bits) -> y, dq, dk, dv."""

    def attend(q, k, v, query_ids, key_ids, bits):
        inputs = AttentionInputs(q, k, v, query_ids, key_ids)
        key = None if bits is None else DropoutKey(bits, rate)
        return flash_lib.flash(inputs, key, mesh=mesh, interpret=True, block=block)

    return small.fast_jit(pulled(attend))


@functools.cache
def plain(rate=0.1):
    def attend(q, k, v, see, bits):
        return small.attend(q, k, v, see, DropoutKey(bits, rate))

    run = small.fast_jit(pulled(attend))
    return lambda q, k, v, g, query_ids, key_ids, bits: run(
        q, k, v, g, visible(query_ids, key_ids), bits
    )


def by_hand(q, k, v, g, see, kept, rate):
    """Returns y, dq, dk, dv by their formulas, in float64.

    Args:
      q, k, v, g: [B, T, H, K].
      see: bool [B, T, S].
      kept: bool [B, H, T, S], the dropout mask.
      rate: of the dropout.
    """
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    scale = 1 / np.sqrt(q.shape[-1])
    s = np.where(see[:, None], np.einsum("bthk,bshk->bhts", q, k) * scale, -np.inf)
    w = np.exp(s - s.max(-1, keepdims=True))
    w /= w.sum(-1, keepdims=True)
    factor = kept / (1 - rate)
    dw = np.einsum("bthk,bshk->bhts", g, v) * factor
    ds = w * (dw - (w * dw).sum(-1, keepdims=True)) * scale
    return (
        np.einsum("bhts,bshk->bthk", w * factor, v),
        np.einsum("bhts,bshk->bthk", ds, k),
        np.einsum("bhts,bthk->bshk", ds, q),
        np.einsum("bhts,bthk->bshk", w * factor, g),
    )


CASES = [
    # T, K, block, rate
    (96, 16, 48, 0.1),
    (96, 16, 96, 0.0),
    (130, 64, None, 0.2),
    (160, 16, 16, 0.5),
    (7, 5, None, 0.1),
]


@pytest.mark.parametrize(("length", "width", "block", "rate"), CASES)
def test_values_and_gradients_are_those_of_the_plain_attention(length, width, block, rate):
    """The rows have several segments and padding, and some do not fill their blocks."""
    inputs, ids = draw(T=length, K=width), packed_ids(2, length)
    got = flash(rate, block)(*inputs, ids, ids, BITS)
    small.assert_trees_close(got, plain(rate)(*inputs, ids, ids, BITS), FLOAT32)


def test_without_a_key_nothing_is_dropped():
    inputs, ids = draw(), packed_ids(2, 96)
    got = flash(0.3)(*inputs, ids, ids, None)
    small.assert_trees_close(got, plain(0.0)(*inputs, ids, ids, BITS), FLOAT32)


def test_float32_against_float64():
    inputs, ids = draw(seed=1), packed_ids(2, 96)
    kept = np.asarray(dropout.keep(DropoutKey(jnp.asarray(BITS), 0.1), (2, 2, 96, 96)))
    exact = by_hand(*inputs, visible(ids, ids), kept, 0.1)
    small.assert_trees_close(flash()(*inputs, ids, ids, BITS), exact, FLOAT32)


def test_ids_need_not_be_in_order():
    """The kernel skips blocks by the range of their ids, also if segments are scattered."""
    inputs, ids = draw(), np.random.default_rng(3).integers(-3, 3, (2, 96)).astype(np.int32)
    ids[0, 32:64] = 7
    got = flash()(*inputs, ids, ids, BITS)
    small.assert_trees_close(got, plain()(*inputs, ids, ids, BITS), FLOAT32)


def test_a_key_hidden_from_all_has_no_weight_and_no_gradient():
    """The query at the place of a hidden key still sees the keys before it."""
    ids = np.repeat(np.array([[1] * 40 + [2] * 50 + [0] * 6], np.int32), 2, 0)
    key_ids, hidden = ids.copy(), [5, 6, 32, 64]
    key_ids[:, hidden] = -1
    q, k, v, g = draw()
    y, dq, dk, dv = flash()(q, k, v, g, ids, key_ids, BITS)
    expected = plain()(q, k, v, g, ids, key_ids, BITS)
    small.assert_trees_close((y, dq, dk, dv), expected, FLOAT32)
    assert not np.any(dk[:, hidden])
    assert not np.any(dv[:, hidden])
    huge_k, huge_v = k.at[:, hidden].set(1e18), v.at[:, hidden].set(-1e30)
    got = flash()(q, huge_k, huge_v, g, ids, key_ids, BITS)[0]
    np.testing.assert_array_equal(got, y)


def test_a_query_that_sees_nothing_gets_0_and_no_gradient():
    inputs, ids = draw(), np.ones((2, 96), np.int32)
    key_ids = ids.copy()
    key_ids[:, :40] = -1
    results = flash()(*inputs, ids, key_ids, BITS)
    assert all(np.isfinite(x).all() for x in results)
    for x in results[:2]:
        assert not np.any(x[:, :40])
        assert np.any(x[:, 41])


def test_blocks_of_other_segments_are_not_read():
    """NaN in a block would reach every result that multiplies it, even with weight 0."""
    ids = np.repeat(np.array([[1, 2, 3]] * 2, np.int32), 32, 1)
    inputs = draw()
    expected = flash()(*inputs, ids, ids, BITS)
    for start in (0, 32, 64):
        spoilt = slice(start, start + 32)
        others = np.ones(96, bool)
        others[spoilt] = False
        results = flash()(*(x.at[:, spoilt].set(jnp.nan) for x in inputs), ids, ids, BITS)
        for got, want in zip(results, expected, strict=True):
            np.testing.assert_array_equal(got[:, others], want[:, others])
            assert np.isnan(got[:, spoilt]).all()


def test_blocks_above_the_diagonal_are_not_read():
    """NaN in the last keys must not reach earlier queries; in the first queries, not later keys."""
    ids = np.ones((2, 96), np.int32)
    q, k, v, g = draw()
    y, dq, dk, dv = flash()(q, k, v, g, ids, ids, BITS)
    late_k, late_v = (x.at[:, 64:].set(jnp.nan) for x in (k, v))
    results = flash()(q, late_k, late_v, g, ids, ids, BITS)
    for got, want in zip(results[:2], (y, dq), strict=True):
        np.testing.assert_array_equal(got[:, :64], want[:, :64])
        assert np.isnan(got[:, 64:]).all()
    results = flash()(q.at[:, :32].set(jnp.nan), k, v, g, ids, ids, BITS)
    for got, want in zip(results[2:], (dk, dv), strict=True):
        np.testing.assert_array_equal(got[:, 32:], want[:, 32:])
        assert np.isnan(got[:, :32]).any()


@pytest.mark.parametrize(("length", "block", "rate"), [(130, 128, 0.1), (96, 32, 0.6)])
def test_the_dropout_mask_is_that_of_keep_bit_for_bit(length, block, rate):
    """With q = k = 0 and v = g = identity, y and dv are the attention weights after dropout."""
    H, ids = 3, np.ones((2, length), np.int32)
    zeros = jnp.zeros((2, length, H, length))
    identity = zeros + jnp.eye(length)[None, :, None, :]
    y, _, _, dv = flash(rate, block)(zeros, zeros, identity, identity, ids, ids, BITS)
    kept = np.asarray(dropout.keep(DropoutKey(jnp.asarray(BITS), rate), (2, H, length, length)))
    expected = kept & np.tril(np.ones((length, length), bool))
    np.testing.assert_array_equal(np.moveaxis(y, 1, 2) > 0, expected)
    np.testing.assert_array_equal(np.moveaxis(dv, 1, 3) > 0, expected)
    weights = expected / np.arange(1, length + 1)[:, None] / (1 - rate)
    np.testing.assert_allclose(np.moveaxis(y, 1, 2), weights, rtol=1e-6)


def test_bfloat16_is_as_exact_as_the_plain_attention():
    """Compares root-mean-square errors against float64, for the same rounded inputs.

    For y and dv the kernel rounds the weights once, as the plain attention does. For dq and dk it
    also rounds ds to bfloat16, which the plain attention does not on a CPU. Two errors of the same
    size instead of one are sqrt(2) times as large; with the rounding of the weights the ratio is
    below 1.6. With a bfloat16 y in delta it would be 2.2.
    """
    T, rate = 130, 0.2
    inputs, ids = draw(T=T, K=64, dtype="bfloat16"), packed_ids(2, T)
    kept = np.asarray(dropout.keep(DropoutKey(jnp.asarray(BITS), rate), (2, 2, T, T)))
    exact = by_hand(*inputs, visible(ids, ids), kept, rate)
    got = flash(rate, None)(*inputs, ids, ids, BITS)
    want = plain(rate)(*inputs, ids, ids, BITS)
    for x, usual, y, ratio in zip(got, want, exact, (1.05, 1.6, 1.6, 1.05), strict=True):
        assert x.dtype == jnp.bfloat16
        error, error_usual = (
            np.sqrt(np.square(np.asarray(z, np.float64) - y).mean()) for z in (x, usual)
        )
        assert error < ratio * error_usual


def test_no_array_has_the_size_of_all_scores():
    """With T = 4,096 the largest arrays are a block of scores, and [T, K]."""
    x, ids = jax.ShapeDtypeStruct((1, 4096, 1, 16), jnp.float32), np.ones((1, 4096), np.int32)

    def largest(attend):
        """Returns the size of the largest array in the jaxpr, including those in kernels."""
        types = re.findall(r"\w\[([0-9,]+)\]", str(jax.make_jaxpr(pulled(attend))(x, x, x, x)))
        return max(math.prod(map(int, shape.split(","))) for shape in types)

    def flash(q, k, v):
        return flash_lib.flash(AttentionInputs(q, k, v, ids, ids), DropoutKey(BITS, 0.1))

    assert largest(flash) == 256 * 256
    see = jnp.ones((1, 4096, 4096), bool)
    assert largest(lambda q, k, v: small.attend(q, k, v, see, DropoutKey(BITS, 0.1))) == 4096**2


@pytest.mark.parametrize(
    ("sizes", "heads"),
    [((2, 1, 2), 2), ((1, 2, 2), 3)],
    ids=["data", "fsdp, heads not divided"],
)
def test_a_mesh_computes_what_one_device_computes(sizes, heads):
    """The dropout mask does not depend on the mesh either."""
    mesh = small.mesh(*sizes)
    inputs, ids = draw(B=4, T=40, H=heads), packed_ids(4, 40)
    key_ids = ids.copy()
    key_ids[:, 1:4] = np.where(ids[:, 1:4] == 1, -1, ids[:, 1:4])
    expected = flash(0.3, 16)(*inputs, ids, key_ids, BITS)
    place = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor" if heads % 2 == 0 else None))
    placed = [jax.device_put(x, place) for x in inputs]
    got = flash(0.3, 16, mesh)(*placed, ids, key_ids, BITS)
    assert all(x.sharding.is_equivalent_to(place, 4) for x in got)
    small.assert_trees_close(got, expected, FLOAT32)
    small.assert_trees_close(got, plain(0.3)(*inputs, ids, key_ids, BITS), FLOAT32)
    other = flash(0.3, 16)(*inputs, ids, key_ids, BITS + 1)
    assert np.abs(other[0] - np.asarray(got[0])).max() > 0.1, "the comparison is about masks"


B, T, H, K = 32, 512, 12, 64


@pytest.fixture(scope="module")
def chips():
    """Returns descriptions of four v5e, for which XLA can compile without having them."""
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        for name, value in compile._TPU_ENVIRONMENT.items():
            patch.setenv(name, value)
        name = "v5e:2x2"
        yield list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def compiled(function, heads, rows, whole, backward):
    """Compiles `function(q, k, v, ids, bits)` for bfloat16 [32, 512, 12, 64].

    Args:
      function: an attention.
      heads, rows, whole: layouts of q, k and v; of ids; and of bits.
      backward: compile the gradient instead.
    """
    x = jax.ShapeDtypeStruct((B, T, H, K), jnp.bfloat16, sharding=heads)
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=rows)
    bits = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole)

    def run(q, k, v, g, ids, bits):
        attend = functools.partial(function, ids=ids, bits=bits)
        return jax.vjp(attend, q, k, v)[1](g) if backward else attend(q, k, v)

    return jax.jit(run).lower(x, x, x, x, ids, bits).compile()


@pytest.mark.tpu
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_it_compiles_for_a_v5e_and_needs_no_square_memory(chips, backward):
    """The kernel needs less temporary memory than q; the plain attention needs all scores."""
    place = SingleDeviceSharding(chips[0])

    def kernel(q, k, v, ids, bits):
        return flash_lib.flash(AttentionInputs(q, k, v, ids, ids), DropoutKey(bits, 0.1))

    def usual(q, k, v, ids, bits):
        see = plain_lib.causal_segments(ids, ids)
        return small.attend(q, k, v, see, DropoutKey(bits, 0.1))

    used = {}
    for function in (kernel, usual):
        program = compiled(function, place, place, place, backward)
        used[function.__name__] = program.memory_analysis().temp_size_in_bytes
    print("temporary bytes", used)
    assert used["usual"] >= B * H * T * T * 4
    assert used["kernel"] <= B * H * T * K * 2


@pytest.mark.tpu
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_it_compiles_for_a_mesh_of_v5es_without_communication(chips, backward):
    mesh = mesh_lib.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), chips)

    def kernel(q, k, v, ids, bits):
        inputs = AttentionInputs(q, k, v, ids, ids)
        return flash_lib.flash(inputs, DropoutKey(bits, 0.1), mesh=mesh)

    specs = P(mesh_lib.BATCH_AXES, None, "tensor"), P(mesh_lib.BATCH_AXES), P()
    program = compiled(kernel, *(NamedSharding(mesh, spec) for spec in specs), backward)
    text = program.as_text()
    assert "tpu_custom_call" in text
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
    assert program.memory_analysis().temp_size_in_bytes <= B * H * T * K * 2 // 4
