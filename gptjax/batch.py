"""The batch: the contract between data and model (several sequences to a row, every shape static).

B rows, T tokens a row, E example slots a row, C candidate sequences an example. All sequences of
one example lie in one row, so that the task head never gathers across rows or devices.
"""

from typing import Any

import flax.struct

# NumPy arrays on the way in, jax.Array in a step.
Array = Any


@flax.struct.dataclass
class Batch:
    """Packed rows. The last four fields are None in pretraining."""

    tokens: Array
    """int32 [B, T]"""
    segment_ids: Array
    """int32 [B, T]: 1, 2, ... for the sequences of a row, 0 is padding."""
    positions: Array
    """int32 [B, T]: restart at 0 in each sequence."""
    token_types: Array
    """int32 [B, T]: first text 0, second text 1; 2: padding inside a sequence (flattened head)."""
    lm_weights: Array
    """float32 [B, T]: weight of predicting token t + 1 at t; 0 at ends and padding."""
    extract: Array = None
    """int32 [B, E, C]: row position of the extract token of candidate c of example e."""
    candidate_mask: Array = None
    """float32 [B, E, C]: 1 for a real candidate."""
    example_mask: Array = None
    """float32 [B, E]: 1 for a real example."""
    labels: Array = None
    """int32 [B, E]: class or answer; float32 [B, E]: target of a regression."""
