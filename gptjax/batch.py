"""The batch: the contract between data and model (several sequences to a row, every shape static).

All sequences of one example are in one row, so that the task head never gathers across rows or
devices.

Letters of shapes. The name of an array ends in one letter for each of its axes: `q_BTHK` is
[B, T, H, K]. In the whole project:

  B  rows of a batch                      D  width of the model
  T  tokens of a row (or queries)         H  heads of attention
  S  keys that a query may see            K  width of a head
  E  example slots of a row               F  width inside the feed-forward layer
  C  candidate sequences of an example    V  vocabulary
  L  layers                               O  outputs of the task head

A file that needs others defines them in its docstring.
"""

import enum
from typing import Any

import flax.struct

# NumPy arrays on the way in, jax.Array in a step.
Array = Any


class TokenType(enum.IntEnum):
    """The values of `Batch.token_types`."""

    FIRST_TEXT = 0
    SECOND_TEXT = 1
    PADDING = 2
    """Padding inside of a sequence, for a task head that reads sequences of one length."""


@flax.struct.dataclass
class Batch:
    """Packed rows. The last four fields are None in pretraining."""

    tokens: Array
    """int32 [B, T]"""
    segment_ids: Array
    """int32 [B, T]: 1, 2, ... for the sequences of a row, 0 for padding after them."""
    positions: Array
    """int32 [B, T]: restart at 0 in each sequence."""
    token_types: Array
    """int32 [B, T]: values of `TokenType`."""
    lm_weights: Array
    """float32 [B, T]: weight of predicting token t + 1 at t; 0 at ends and padding."""
    extract: Array = None
    """int32 [B, E, C]: row position of the extract token of candidate c of example e."""
    candidate_mask: Array = None
    """float32 [B, E, C]: 1 for a real candidate."""
    example_mask: Array = None
    """float32 [B, E]: 1 for a real example."""
    labels: Array = None
    """int32 [B, E]: class or answer; float32 [B, E]: target of a regression. None where the
    examples are not labelled, as in prediction."""
