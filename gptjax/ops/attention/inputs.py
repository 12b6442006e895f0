"""The arguments that all implementations of attention share, and their parts on each device."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptjax import mesh as mesh_lib
from gptjax.ops.dropout import DropoutKey

# Usually jax.Array. The same class also has the layouts, or the gradients, of the arrays.
Array = Any

# Ids besides those of `Batch.segment_ids`, which are 0 for padding and above 0 for segments.
HIDDEN_KEY = -1
"""Id of a key that no query may see, such as padding inside of a sequence."""
PADDING_KEY = -2
"""Id of the keys that an implementation adds around a row."""
PADDING_QUERY = -3
"""Id of the queries that an implementation adds after a row. No key has it."""


@flax.struct.dataclass
class AttentionInputs:
    """Queries, keys and values of packed rows, and which keys a query sees.

    Query t sees key s if s <= t and query_ids[t] == key_ids[s].
    """

    q_BTHK: Array
    k_BTHK: Array
    v_BTHK: Array
    query_ids_BT: Array
    """int32, the segment ids of the rows."""
    key_ids_BT: Array
    """int32, the same, except for keys that are hidden from all queries (`HIDDEN_KEY`)."""


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
    if mesh_lib.is_sharded(mesh):
        tensor = "tensor" if heads % mesh.shape["tensor"] == 0 else None
        x, ids = P(mesh_lib.BATCH_AXES, None, tensor), P(mesh_lib.BATCH_AXES)
        specs = (AttentionInputs(x, x, x, ids, ids), P(), P(mesh_lib.BATCH_AXES, tensor))
        kernel = mesh_lib.on_each_device(kernel, mesh, specs, x)
    return kernel(inputs, dropout_key, heads_BH)
