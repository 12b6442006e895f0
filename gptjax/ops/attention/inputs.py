"""The arguments of all implementations of attention, and their sharding over the devices."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptjax import mesh as mesh_lib
from gptjax.ops.dropout import DropoutKey

# Usually a jax.Array. `AttentionInputs` also holds the partition specs or gradients of the arrays.
Array = Any

# These ids are used in addition to the ids of `Batch.segment_ids`. There, padding at the end of a
# row has the id 0, and the segments (sequences) of a row have positive ids.
HIDDEN_KEY = -1
"""The id of a key that no query must see, such as padding inside a sequence."""
PADDING_KEY = -2
"""The id of the keys that an implementation adds before and after a row."""
PADDING_QUERY = -3
"""The id of the queries that an implementation adds after a row. No key has this id."""


@flax.struct.dataclass
class AttentionInputs:
    """The queries, keys and values of packed rows, and the ids that define the attention mask.

    Query t sees key s (that is, attends to it) if s <= t and query_ids[t] == key_ids[s].
    """

    q_BTHK: Array
    k_BTHK: Array
    v_BTHK: Array
    query_ids_BT: Array
    """int32, the segment ids of the rows."""
    key_ids_BT: Array
    """int32, the segment ids of the rows, or `HIDDEN_KEY` for a key that no query sees."""


Kernel = Callable[[AttentionInputs, DropoutKey, jax.Array], jax.Array]


def shard_over_batch_and_heads(
    kernel: Kernel, mesh: Mesh | None, inputs: AttentionInputs, dropout_key: DropoutKey | None
) -> jax.Array:
    """Runs a kernel on each device's own part of the rows and heads; returns [B, T, H, K].

    XLA cannot divide a kernel, or a loop over rows, between devices by itself. The rows are sharded
    over `data` and `fsdp`, whose product must divide B. The heads are sharded over `tensor`. If
    `tensor` does not divide H, every device along `tensor` computes all heads.

    Args:
      kernel: the function that computes the attention [B, T, H, K] on one device. Its arguments are
        the inputs, the dropout key (with the rate 0 if there is no dropout) and heads_BH (uint32,
        the index b * H + h of each row and head in the whole arrays).
      mesh: the devices. None means a single device.
      inputs: the whole arrays.
      dropout_key: the dropout key, the same on all devices. None means no dropout.
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
