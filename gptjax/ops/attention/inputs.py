"""The arguments that all implementations of attention share."""

from typing import Any

import flax.struct

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
