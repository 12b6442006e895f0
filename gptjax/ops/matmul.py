"""Matrix products whose backward pass is as fast as their forward pass.

Products of bfloat16 accumulate in float32. XLA's CPU backend has fast kernels for them (AMX,
AVX-512), but only for two matrices of which the first is contracted over its last axis: x @ w and
x @ w.T. With more axes it copies w.T first; and the gradient of a weight, x.T @ g, falls back to
products five times slower. So on a CPU the factors are made matrices, and the smaller factor of
x.T @ g is transposed in memory. Other backends choose their layouts well.

The arrays are those of one device: `gptjax.ops.sharded` is for several.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

Array = jax.Array

# Of bfloat16: products of one row take three to six times as long on a CPU as those of four.
_FEW_ROWS = 4


@jax.jit
def transposed(x: Array) -> Array:
    """Returns the transpose of the last two axes, in memory and not as another view of `x`."""
    y = x.swapaxes(-1, -2)
    return with_layout_constraint(y, Layout(tuple(range(y.ndim))))


def _dot(x: Array, y: Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return lax.dot_general(x, y, (contract, ((), ())), preferred_element_type=jnp.float32)


def _matrix(x: Array, columns: int) -> Array:
    """The last `columns` axes as one, the others as another."""
    rows = x.ndim - columns
    return x.reshape(math.prod(x.shape[:rows]), math.prod(x.shape[rows:]))


def weight_gradient(x: Array, g: Array, inputs: int) -> Array:
    """Returns x^T g, float32 [*inputs, *features], summed over the leading axes that both have.

    Args:
      x: [..., *inputs].
      g: [..., *features], of the same dtype.
      inputs: how many axes of x are not summed over.
    """
    leading = tuple(range(x.ndim - inputs))

    def on_cpu(x: Array, g: Array) -> Array:
        shape = x.shape[len(leading) :] + g.shape[len(leading) :]
        x_NI, g_NO = _matrix(x, inputs), _matrix(g, g.ndim - len(leading))
        if x_NI.shape[1] <= g_NO.shape[1]:
            return _dot(transposed(x_NI), g_NO, ((1,), (0,))).reshape(shape)
        # The barrier keeps the transpose of the result out of the product.
        flipped = lax.optimization_barrier(_dot(transposed(g_NO), x_NI, ((1,), (0,))))
        return flipped.T.reshape(shape)

    def elsewhere(x: Array, g: Array) -> Array:
        return _dot(x, g, (leading, leading))

    return lax.platform_dependent(x, g, cpu=on_cpu, default=elsewhere)


def times_transposed(x: Array, kernel: Array, outputs: int) -> Array:
    """Returns x kernel^T, float32 [..., *outputs]: summed over the last axes, which both have.

    Args:
      x: [..., *summed].
      kernel: [*outputs, *summed], of the same dtype.
      outputs: how many axes of the kernel are not summed over.
    """
    summed = kernel.ndim - outputs

    def on_cpu(x: Array, kernel: Array) -> Array:
        shape = x.shape[: x.ndim - summed] + kernel.shape[:outputs]
        x_NI, rows = _matrix(x, summed), math.prod(x.shape[: x.ndim - summed])
        if x.dtype == jnp.bfloat16 and rows < _FEW_ROWS:
            x_NI = jnp.pad(x_NI, ((0, _FEW_ROWS - rows), (0, 0)))
        y_NO = _dot(x_NI, _matrix(kernel, summed), ((1,), (1,)))
        return y_NO[:rows].reshape(shape)

    def elsewhere(x: Array, kernel: Array) -> Array:
        last = tuple(range(x.ndim - summed, x.ndim))
        return _dot(x, kernel, (last, tuple(range(outputs, kernel.ndim))))

    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: Array, kernel: Array, inputs: int) -> Array:
    """Returns x times kernel over the last `inputs` axes of x and the first of kernel, float32.

    Args:
      x: [..., *inputs], in the dtype of the product.
      kernel: [*inputs, *features], float32; its gradient is float32 too, and not rounded.
      inputs: how many axes are summed over.
    """
    return _forward(x, kernel, inputs)[0]


def _forward(x: Array, kernel: Array, inputs: int) -> tuple[Array, tuple[Array, Array]]:
    last, kernel = tuple(range(x.ndim - inputs, x.ndim)), kernel.astype(x.dtype)
    return _dot(x, kernel, (last, tuple(range(inputs)))), (x, kernel)


def _backward(inputs: int, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    g = g.astype(x.dtype)
    d_x = times_transposed(g, kernel, inputs).astype(x.dtype)
    return d_x, weight_gradient(x, g, inputs)


linear.defvjp(_forward, _backward)
