"""Packing: several examples to a row of fixed length, so that short texts waste no compute.

Whatever the packing, losses, gradients and predictions are those of one sequence per row: segments
separate the attention, positions restart, and sums are divided by their weights once, globally.
"""

import math
from collections.abc import Sequence

import numpy as np

from gptjax.batch import Batch
from gptjax.data.tasks import Examples


def first_fit(lengths: Sequence[int], row_length: int, max_per_row: int) -> list[list[int]]:
    """First-fit decreasing: the longest example first, each into the first row with room.

    >>> first_fit([4, 3, 5, 2], row_length=8, max_per_row=4)
    [[2, 1], [0, 3]]

    Args:
      lengths: tokens of each example, none above `row_length`.
      row_length: tokens of a row.
      max_per_row: examples of a row.

    Returns:
      The examples (indices into `lengths`) of each row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row, free in enumerate(room):
            if free >= lengths[i] and len(rows[row]) < max_per_row:
                rows[row].append(i)
                room[row] -= lengths[i]
                break
        else:
            rows.append([i])
            room.append(row_length - lengths[i])
    return rows


class Packer:
    """Examples -> batches whose shapes are few: row length and slots fixed, rows in steps.

    Attributes:
      row_length: T, at least the longest example.
      slots: E, examples of a row at most.
      row_step: the number of rows of a batch is a multiple of this.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        row_length: int,
        divisor: int = 1,
        sequence_means: bool = False,
    ):
        """Chooses the shapes.

        Args:
          lengths: int [n], tokens of the examples to come.
          batch_size: examples of a batch.
          row_length: wanted T, or 0: room for about eight examples (first-fit then wastes little),
            but no longer than lets a batch fill eight rows (so that as many devices can share it).
          divisor: B is a multiple of this (devices along the batch, micro-batches). Rows of padding
            are added for it and nothing else changes: the examples lie where they lay, so that
            another number of devices sees the same dropout masks.
          sequence_means: the LM weights of each sequence add up to 1 instead of being 1.
        """
        self._sequence_means = sequence_means
        longest, mean = int(lengths.max()), float(lengths.mean())
        # A quarter of slack: a batch a little above the average must not need more rows.
        wanted = row_length or math.ceil(min(8, 1.25 * batch_size / 8) * mean)
        self.row_length = _round_up(max(longest, wanted), 8 if row_length else 64)
        # A power of two, so that other data of about the same lengths has the same shape.
        slots = 1 << max(2, math.ceil(math.log2(2 * self.row_length / mean)))
        self.slots = min(batch_size, slots)
        # Each number of rows is compiled: steps of two standard deviations leave two or three.
        deviation = math.sqrt(batch_size) * float(lengths.std()) / self.row_length
        self.row_step = _round_up(max(1, math.ceil(2 * deviation)), divisor)

    def pack(self, examples: Examples, chosen: np.ndarray) -> tuple[Batch, np.ndarray]:
        """Packs the examples with the indices `chosen` (int [n]).

        Returns:
          The batch, and int32 [B, E]: which example (index) lies in each slot, -1 for none.
        """
        rows = first_fit(examples.lengths[chosen].tolist(), self.row_length, self.slots)
        height = _round_up(len(rows), self.row_step)
        batch = _empty(height, self.row_length, self.slots, examples)
        index = np.full((height, self.slots), -1, np.int32)
        for b, row in enumerate(rows):
            cursor = _Cursor()
            for e, position in enumerate(row):
                index[b, e] = chosen[position]
                _place(batch, examples, int(chosen[position]), b, e, cursor, self._sequence_means)
        return batch, index


class _Cursor:
    """Where the next sequence of a row goes."""

    def __init__(self) -> None:
        self.offset = 0
        self.segment = 0


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _empty(height: int, length: int, slots: int, examples: Examples) -> Batch:
    tokens = np.zeros((height, length), np.int32)
    candidates = examples.num_candidates
    dtype = np.int32 if examples.labels is None else examples.labels.dtype
    return Batch(
        tokens=tokens,
        segment_ids=np.zeros_like(tokens),
        positions=np.zeros_like(tokens),
        token_types=np.zeros_like(tokens),
        lm_weights=np.zeros(tokens.shape, np.float32),
        extract=np.zeros((height, slots, candidates), np.int32),
        candidate_mask=np.zeros((height, slots, candidates), np.float32),
        example_mask=np.zeros((height, slots), np.float32),
        labels=np.zeros((height, slots), dtype),
    )


def _place(
    batch: Batch,
    examples: Examples,
    i: int,
    b: int,
    e: int,
    cursor: _Cursor,
    sequence_means: bool,
) -> None:
    """Writes example `i` into slot `e` of row `b`."""
    for c in range(examples.num_candidates):
        sequence = i * examples.num_candidates + c
        tokens = examples.tokens[sequence]
        length, start = len(tokens), cursor.offset
        cursor.offset += length
        cursor.segment += 1
        span = slice(start, start + length)
        batch.tokens[b, span] = tokens
        batch.segment_ids[b, span] = cursor.segment
        batch.positions[b, span] = np.arange(length)
        batch.token_types[b, start + examples.second_start[sequence] : start + length] = 1
        end = length
        if examples.padding_start is not None:
            end = int(examples.padding_start[sequence])
            batch.token_types[b, start + end : start + length] = 2
        batch.lm_weights[b, start : start + end - 1] = 1 / (end - 1) if sequence_means else 1.0
        batch.extract[b, e, c] = start + length - 1
        batch.candidate_mask[b, e, c] = 1.0
    batch.example_mask[b, e] = 1.0
    if examples.labels is not None:
        batch.labels[b, e] = examples.labels[i]
