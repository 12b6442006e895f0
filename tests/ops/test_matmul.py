"""Matrix products and their gradients against float64 NumPy, and their layouts on a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.ops import matmul

# Leading axes, inputs and features: of a projection, a projection to heads, a projection from
# heads, a wide kernel, and a tall kernel.
CASES = [
    ((6,), (4,), (5,)),
    ((2, 3), (8,), (3, 2, 4)),
    ((2, 3), (2, 4), (8,)),
    ((2, 7), (4,), (16,)),
    ((2, 7), (16,), (4,)),
]


def draw(leading, inputs, features, dtype):
    rng = np.random.default_rng(0)
    x, kernel, g = (
        jnp.asarray(rng.normal(size=shape), kind)
        for shape, kind in (
            (leading + inputs, dtype), (inputs + features, jnp.float32), (leading + features, dtype)
        )
    )  # fmt: skip
    return x, kernel.astype(dtype).astype(jnp.float32), g


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("leading", "inputs", "features"), CASES)
def test_linear_and_its_gradients_are_their_formulas(leading, inputs, features, dtype):
    """Only d_x is rounded to the dtype of x; y and d_kernel stay float32.

    The sums have at most 16 terms, which allows for 16 eps of float32 of the largest value.
    Products of two bfloat16 numbers are exact in float32.
    """
    x, kernel, g = draw(leading, inputs, features, dtype)
    y, back = jax.vjp(lambda x, kernel: matmul.linear(x, kernel, len(inputs)), x, kernel)
    d_x, d_kernel = back(g.astype(jnp.float32))
    rows, size = int(np.prod(leading)), int(np.prod(inputs))
    x64, k64, g64 = (
        np.asarray(a, np.float64).reshape(shape)
        for a, shape in ((x, (rows, size)), (kernel, (size, -1)), (g, (rows, -1)))
    )
    exact = float(jnp.finfo(jnp.float32).eps) * 16
    for got, want, kind, tolerance in (
        (y, x64 @ k64, jnp.float32, exact),
        (d_x, g64 @ k64.T, x.dtype, float(jnp.finfo(dtype).eps) + exact),
        (d_kernel, x64.T @ g64, jnp.float32, exact),
    ):
        assert got.dtype == kind
        error = np.abs(np.asarray(got, np.float64).reshape(want.shape) - want).max()
        assert error <= tolerance * np.abs(want).max()
    assert d_kernel.shape == kernel.shape
    assert d_x.shape == x.shape


def test_other_platforms_compute_the_same(monkeypatch):
    """The products for GPUs and TPUs, which transpose nothing in memory, give the same."""
    x, kernel, g = draw((2, 3), (2, 4), (8,), "float32")
    here = matmul.weight_gradient(x, g, 2), matmul.matmul_transposed(g, kernel, 2)
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, default, **kwargs: default(*args)
    )
    there = matmul.weight_gradient(x, g, 2), matmul.matmul_transposed(g, kernel, 2)
    for one, other in zip(here, there, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("leading", [(0,), (1,), (1, 1), (3,), (4,), (1, 5)])
def test_few_rows_times_a_transposed_kernel(leading, dtype):
    """On a CPU a product of few rows is padded with rows, which the result does not have."""
    rng = np.random.default_rng(0)
    x, kernel = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((*leading, 2, 8), (3, 5, 2, 8))
    )
    y = matmul.matmul_transposed(x, kernel, 2)
    assert y.dtype == jnp.float32
    want = np.einsum("...ik,abik->...ab", *(np.asarray(a, np.float64) for a in (x, kernel)))
    assert y.shape == want.shape
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_transposed_is_the_transpose():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(jax.jit(matmul.transposed)(x), np.swapaxes(x, 1, 2))


def test_a_cpu_finds_every_product_contracted_over_the_last_axis_of_its_first_factor():
    """For other layouts XLA has slow products only, which the module is there to avoid."""
    x, kernel, g = draw((64, 4), (128,), (256,), "bfloat16")

    def backward(x, kernel, g):
        return jax.vjp(lambda x, kernel: matmul.linear(x, kernel, 1), x, kernel)[1](g)

    text = jax.jit(backward).lower(x, kernel, g.astype(jnp.float32)).compile().as_text()
    found = re.findall(r" dot\(.*?lhs_contracting_dims=\{(\d)\}, rhs_contracting", text)
    assert len(found) == 2
    assert set(found) == {"1"}
    operands = re.findall(r"= (\w+)\[[^ ]* dot\(", text)
    assert operands == ["f32", "f32"], "accumulated in float32"
