"""The batch: the data format that the data pipeline writes and the model reads.

Rows are packed, that is, several token sequences share a row. A sequence in a packed row is also
called a segment. All shapes are static. All sequences of one example are in the same row, so that
the task head never gathers hidden states across rows or devices.

The name of an array ends in one letter for each of its axes, for example `q_BTHK` is [B, T, H, K].
These letters are the same in the whole project:

  B  rows of a batch                      D  width of the model
  T  tokens in a row (or queries)         H  attention heads
  S  keys                                 K  width of a head
  E  slots for examples in a row          F  width inside the feed-forward layer
  C  candidates of an example             V  size of the vocabulary
  L  layers                               O  outputs of the task head

The candidates of an example are its sequences. A multiple choice has one candidate for each answer,
and other tasks have one or two candidates. If a long text is read in windows, it has one candidate
for each window, and `candidate_mask` is 0 for the windows that a shorter text does not have. A file
that needs more letters defines them in its docstring.
"""

import enum
from typing import Any

import flax.struct

# A NumPy array in the data pipeline, a jax.Array in a training step.
Array = Any


class TokenType(enum.IntEnum):
    """The values of `Batch.token_types`."""

    FIRST_TEXT = 0
    SECOND_TEXT = 1
    PADDING = 2
    """Padding inside a sequence. It is used if the task head needs sequences of equal length."""


@flax.struct.dataclass
class Batch:
    """Packed rows. The last five fields are None in pretraining.

    The row below holds three sequences, which are three examples of a classification (C = 1). Token
    1 is the start token. Token 2 is the extract token, which ends a sequence and whose hidden state
    the task head reads. The fourth slot is not used, and the last token of the row is padding.

    >>> import numpy as np
    >>> batch = Batch(                  # B = 1, T = 12, E = 4, C = 1
    ...     tokens=np.array(     [[1, 7, 8, 9, 2,  1, 5, 2,  1, 6, 2,  0]]),
    ...     segment_ids=np.array([[1, 1, 1, 1, 1,  2, 2, 2,  3, 3, 3,  0]]),
    ...     positions=np.array(  [[0, 1, 2, 3, 4,  0, 1, 2,  0, 1, 2,  0]]),
    ...     token_types=np.array([[0, 0, 0, 0, 0,  0, 0, 0,  0, 0, 0,  0]]),
    ...     lm_weights=np.array( [[1, 1, 1, 1, 0,  1, 1, 0,  1, 1, 0,  0]], np.float32),
    ...     extract=np.array([[[4], [7], [10], [0]]]),
    ...     candidate_mask=np.array([[[1], [1], [1], [0]]], np.float32),
    ...     example_mask=np.array([[1, 1, 1, 0]], np.float32),
    ...     labels=np.array([[1, 0, 1, 0]]),
    ... )

    The task head reads the hidden states at the extract tokens:

    >>> batch.tokens[0, batch.extract[0, :3, 0]]
    array([2, 2, 2])

    At token t the language model predicts token t + 1, but not across the end of a sequence:

    >>> weighted = np.flatnonzero(batch.lm_weights[0])
    >>> [(int(batch.tokens[0, t]), int(batch.tokens[0, t + 1])) for t in weighted]
    [(1, 7), (7, 8), (8, 9), (9, 2), (1, 5), (5, 2), (1, 6), (6, 2)]

    A token attends to itself and to the earlier tokens of its segment. Token 6 attends to:

    >>> same_segment = batch.segment_ids[0] == batch.segment_ids[0, 6]
    >>> np.flatnonzero(same_segment & (np.arange(12) <= 6))
    array([5, 6])
    """

    tokens: Array
    """int32 [B, T]"""
    segment_ids: Array
    """int32 [B, T]: 1, 2, ... for the sequences of a row. 0 means padding."""
    positions: Array
    """int32 [B, T]: 0, 1, ... in each sequence."""
    token_types: Array
    """int32 [B, T]: values of `TokenType`."""
    lm_weights: Array
    """float32 [B, T]: the weight of the prediction of token t + 1 in the LM loss. It is 0 at the
    last token of a sequence and at padding."""
    extract: Array = None
    """int32 [B, E, C]: the index in the row of the extract token of candidate c of example e."""
    candidate_mask: Array = None
    """float32 [B, E, C]: 1 for a candidate; 0 for one that the example does not have, or for an
    empty slot."""
    example_mask: Array = None
    """float32 [B, E]: 1 for an example, 0 for an empty slot."""
    labels: Array = None
    """int32 [B, E], the class or the right answer. In a regression: float32 [B, E], the target."""
    hidden: Array = None
    """[B, T, D] in the compute dtype: the hidden states after the frozen blocks, 0 at padding. None
    means that no block is frozen (see `gptjax.model.frozen`)."""
