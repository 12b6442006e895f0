"""What every implementation of attention computes from."""

from typing import Any

import flax.struct

# jax.Array; or for each of them its layout, or its gradient.
Array = Any

# Ids that no segment has; segments have ids from 1, and padding has id 0.
HIDDEN_KEY = -1
"""Of a key that no query may see, such as padding inside of a sequence."""
PADDING_KEY = -2
"""Of keys that an implementation adds around a row."""
PADDING_QUERY = -3
"""Of queries that an implementation adds after a row; no key has the same id."""


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
