"""Matrix products whose backward pass is as fast as their forward pass, on a single device.

The factors are float32 or bfloat16, and the sums are always float32. A `kernel` is the weight
matrix of a linear layer, as in Flax.

XLA's CPU backend has fast routines (AMX, AVX-512) for a product of two matrices that sums over the
last axis of the first factor: x @ w and x @ w.T. All other products are slower. For arrays with
more than two axes XLA first copies w.T. The gradient of a weight matrix, x.T @ g, takes five times
as long. Therefore on a CPU the factors are reshaped to matrices, and for x.T @ g the smaller factor
is transposed in memory. Other backends choose good memory layouts by themselves.

`gptjax.ops.sharded` has the same operations for arrays that are sharded over several devices.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

Array = jax.Array

# The smallest number of rows of a fast bfloat16 product on a CPU. With fewer rows the product takes
# three to six times as long as with this number of rows.
_MIN_ROWS = 4


@jax.jit
def transposed(x: Array) -> Array:
    """Swaps the last two axes of `x`, and returns a new array in memory, not a view of `x`."""
    y = x.swapaxes(-1, -2)
    return with_layout_constraint(y, Layout(tuple(range(y.ndim))))


def _dot(
    x: Array, y: Array, summed: tuple[tuple[int, ...], tuple[int, ...]], batch: tuple[int, ...] = ()
) -> Array:
    """Returns the float32 product of x and y, summed over the axes `summed` (of x, of y)."""
    return lax.dot_general(x, y, (summed, (batch, batch)), preferred_element_type=jnp.float32)


def product(x: Array, y: Array, x_axis: int, y_axis: int, batch: tuple[int, ...] = ()) -> Array:
    """Returns the batched matrix product of x and y, in float32.

    Args:
      x, y: the factors.
      x_axis, y_axis: the axis of x and the axis of y that are summed over.
      batch: the batch axes, which have the same indices in x and y.
    """
    return _dot(x, y, ((x_axis,), (y_axis,)), batch)


def _as_matrix(x: Array, columns: int) -> Array:
    """Reshapes x to a matrix. The last `columns` axes become the columns, the others the rows."""
    rows = x.ndim - columns
    return x.reshape(math.prod(x.shape[:rows]), math.prod(x.shape[rows:]))


def weight_gradient(x: Array, g: Array, inputs: int) -> Array:
    """Returns x^T g, which is the gradient of the kernel in y = x kernel.

    Args:
      x: the input of the layer, [..., *inputs].
      g: the gradient of y, [..., *features], in the dtype of x. Its leading axes are the leading
        axes of x.
      inputs: the number of trailing axes of x that the kernel has too.

    Returns:
      float32 [*inputs, *features], summed over the leading axes.
    """
    leading = tuple(range(x.ndim - inputs))

    def on_cpu(x: Array, g: Array) -> Array:
        shape = x.shape[len(leading) :] + g.shape[len(leading) :]
        x_NI, g_NO = _as_matrix(x, inputs), _as_matrix(g, g.ndim - len(leading))
        if x_NI.shape[1] <= g_NO.shape[1]:
            return _dot(transposed(x_NI), g_NO, ((1,), (0,))).reshape(shape)
        # Without the barrier XLA would move the transpose of the result into the product.
        flipped = lax.optimization_barrier(_dot(transposed(g_NO), x_NI, ((1,), (0,))))
        return flipped.T.reshape(shape)

    def elsewhere(x: Array, g: Array) -> Array:
        return _dot(x, g, (leading, leading))

    return lax.platform_dependent(x, g, cpu=on_cpu, default=elsewhere)


def matmul_transposed(x: Array, kernel: Array, outputs: int) -> Array:
    """Returns x kernel^T, float32 [..., *outputs].

    Args:
      x: the first factor, [..., *inputs].
      kernel: [*outputs, *inputs], in the dtype of x. The input axes are summed over.
      outputs: the number of leading axes of the kernel, which the result has too.
    """
    inputs = kernel.ndim - outputs

    def on_cpu(x: Array, kernel: Array) -> Array:
        shape = x.shape[: x.ndim - inputs] + kernel.shape[:outputs]
        x_NI, rows = _as_matrix(x, inputs), math.prod(x.shape[: x.ndim - inputs])
        if x.dtype == jnp.bfloat16 and rows < _MIN_ROWS:
            x_NI = jnp.pad(x_NI, ((0, _MIN_ROWS - rows), (0, 0)))
        y_NO = _dot(x_NI, _as_matrix(kernel, inputs), ((1,), (1,)))
        return y_NO[:rows].reshape(shape)

    def elsewhere(x: Array, kernel: Array) -> Array:
        last = tuple(range(x.ndim - inputs, x.ndim))
        return _dot(x, kernel, (last, tuple(range(outputs, kernel.ndim))))

    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: Array, kernel: Array, inputs: int) -> Array:
    """Returns x kernel, float32 [..., *features].

    Args:
      x: [..., *inputs], in the dtype of the product.
      kernel: float32 [*inputs, *features]. For the product it is cast to the dtype of x, but its
        gradient is float32 and is not rounded to the dtype of x.
      inputs: the number of axes that are summed over: the last axes of x and the first axes of the
        kernel.
    """
    return _forward(x, kernel, inputs)[0]


def _forward(x: Array, kernel: Array, inputs: int) -> tuple[Array, tuple[Array, Array]]:
    last, kernel = tuple(range(x.ndim - inputs, x.ndim)), kernel.astype(x.dtype)
    return _dot(x, kernel, (last, tuple(range(inputs)))), (x, kernel)


def _backward(inputs: int, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    g = g.astype(x.dtype)
    d_x = matmul_transposed(g, kernel, inputs).astype(x.dtype)
    return d_x, weight_gradient(x, g, inputs)


linear.defvjp(_forward, _backward)
