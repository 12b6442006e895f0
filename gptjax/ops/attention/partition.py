"""Attention kernels on a mesh: each device runs its own rows and heads."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptjax.mesh import BATCH_AXES, several


def shard_over_batch_and_heads(
    kernel: Callable[..., jax.Array],
    mesh: Mesh | None,
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    query_ids_BT: jax.Array,
    key_ids_BT: jax.Array,
    words: jax.Array | None,
) -> jax.Array:
    """Returns the attention [B, T, H, K], each device running the kernel on its rows and heads.

    XLA cannot cut up a kernel, or a loop over rows, by itself. Rows lie over the axes data and
    fsdp, whose product must divide B; heads over tensor, or on every device of it where it does not
    divide H.

    Args:
      kernel: a function of the arrays below and of uint32 [B, H], b * H + h in the whole array,
        of which a device has a part.
      mesh: of a jit whose arrays are sharded; None: one device.
      q_BTHK, k_BTHK, v_BTHK, query_ids_BT, key_ids_BT: the whole arrays.
      words: uint32 [2], for all devices the same; None: zeros.
    """
    batch, _, heads, _ = q_BTHK.shape
    words = jnp.zeros(2, jnp.uint32) if words is None else words
    heads_BH = jnp.arange(batch * heads, dtype=jnp.uint32).reshape(batch, heads)
    if several(mesh):
        tensor = "tensor" if heads % mesh.shape["tensor"] == 0 else None
        x, ids = P(BATCH_AXES, None, tensor), P(BATCH_AXES)
        # Kernels do not say over which axes their results vary, so that there is nothing to check.
        kernel = jax.shard_map(
            kernel, mesh=mesh, in_specs=(x, x, x, ids, ids, P(), P(BATCH_AXES, tensor)),
            out_specs=x, check_vma=False,
        )  # fmt: skip
    return kernel(q_BTHK, k_BTHK, v_BTHK, query_ids_BT, key_ids_BT, words, heads_BH)
