"""Attention kernels on a mesh: each device computes its own rows and heads."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptjax.mesh import BATCH_AXES, is_sharded
from gptjax.ops.attention.inputs import AttentionInputs
from gptjax.ops.dropout import DropoutKey

Kernel = Callable[[AttentionInputs, DropoutKey, jax.Array], jax.Array]


def shard_over_batch_and_heads(
    kernel: Kernel, mesh: Mesh | None, inputs: AttentionInputs, dropout_key: DropoutKey | None
) -> jax.Array:
    """Returns the attention [B, T, H, K], for which each device runs the kernel on its own part.

    XLA cannot divide a kernel, or a loop over rows, between devices by itself. The rows are sharded
    over `data` and `fsdp`, whose product must divide B. The heads are sharded over `tensor`; if
    that does not divide H, each of its devices computes all heads.

    Args:
      kernel: computes [B, T, H, K] from the inputs, the dropout key (of rate 0 if there is no
        dropout) and heads_BH, uint32: b * H + h of each row and head in the whole arrays.
      mesh: the devices; None: a single one.
      inputs: the whole arrays.
      dropout_key: the same on all devices; None: no dropout.
    """
    batch, _, heads, _ = inputs.q_BTHK.shape
    if dropout_key is None:
        dropout_key = DropoutKey(jnp.zeros(2, jnp.uint32), 0.0)
    heads_BH = jnp.arange(batch * heads, dtype=jnp.uint32).reshape(batch, heads)
    if is_sharded(mesh):
        tensor = "tensor" if heads % mesh.shape["tensor"] == 0 else None
        x, ids = P(BATCH_AXES, None, tensor), P(BATCH_AXES)
        specs = (AttentionInputs(x, x, x, ids, ids), P(), P(BATCH_AXES, tensor))
        # Pallas kernels do not declare over which mesh axes their results vary, so that
        # `shard_map` could not check it.
        kernel = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=x, check_vma=False)
    return kernel(inputs, dropout_key, heads_BH)
