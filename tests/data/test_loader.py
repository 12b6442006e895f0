"""Batches: what an epoch visits, and that a batch depends on the seed and the step alone."""

import jax
import numpy as np
import pytest

from gptjax.data import loader
from gptjax.data.packing import Packer
from gptjax.data.tasks import Examples
from gptjax.errors import UserError


def same(left, right):
    """Whether two lists of batches are equal, bit for bit."""
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    return True


def different(left, right):
    return any(not np.array_equal(a.tokens, b.tokens) for a, b in zip(left, right, strict=True))


def numbered(count):
    """A stream in which a token is its own place."""
    return np.arange(count, dtype=np.int32)


def visited(batches, windows):
    """The first token of so many windows, in order."""
    starts = []
    step = 0
    while len(starts) < windows:
        starts += batches[step].tokens[:, 0].tolist()
        step += 1
    return starts[:windows]


# Text.


@pytest.mark.parametrize(("tokens", "window", "rows"), [(103, 10, 4), (64, 8, 3), (25, 8, 5)])
def test_every_epoch_visits_windows_that_do_not_overlap(tokens, window, rows):
    batches = loader.TextBatches(numbered(tokens), window, rows, seed=3)
    epochs, offsets, orders = 6, set(), set()
    starts = visited(batches, epochs * batches.windows)
    for epoch in range(epochs):
        own = starts[epoch * batches.windows : (epoch + 1) * batches.windows]
        covered = np.concatenate([np.arange(start, start + window) for start in own])
        assert len(set(covered.tolist())) == len(covered)
        assert covered.min() >= 0
        assert covered.max() < tokens
        assert tokens - len(covered) < 2 * window  # all but the two ends
        assert {(start - min(own)) % window for start in own} == {0}
        offsets.add(min(own))
        orders.add(tuple((start - min(own)) // window for start in own))
    assert len(offsets) > 1
    if batches.windows > 2:
        assert len(orders) > 1


@pytest.mark.parametrize(
    ("tokens", "window", "epochs"),
    [(8, 8, 1), (9, 8, 100), (15, 8, 100), (16, 8, 100), (17, 8, 100), (23, 8, 300), (31, 4, 40)],
)
def test_every_token_is_visited_in_some_epoch(tokens, window, epochs):
    batches = loader.TextBatches(numbered(tokens), window, 4, seed=0)
    seen = np.zeros(tokens, bool)
    for start in visited(batches, epochs * batches.windows):
        seen[start : start + window] = True
    assert seen.all()


def test_a_window_is_a_piece_of_the_stream():
    stream = np.random.default_rng(0).integers(0, 50, 200).astype(np.int32)
    batches = loader.TextBatches(stream, 16, 3, seed=0)
    places = loader.TextBatches(numbered(200), 16, 3, seed=0)
    for step in range(20):
        np.testing.assert_array_equal(batches[step].tokens, stream[places[step].tokens])


def text_batches(seed=1, stream=None):
    return loader.TextBatches(numbered(131) if stream is None else stream, 8, 5, seed)


def task_batches(seed=1, count=13, batch_size=4):
    examples = distinct(count)
    return loader.BalancedBatches(
        examples, Packer(examples.lengths, batch_size, 0), batch_size, seed
    )


@pytest.mark.parametrize("make", [text_batches, task_batches])
def test_a_batch_is_a_function_of_seed_and_step(make):
    whole = list(make().iterate(0, 17))
    assert len(whole) == 17
    assert same(whole, [make()[step] for step in range(17)])
    assert same(whole, make().iterate(0, 17))
    for start in (0, 1, 7, 16, 17):
        assert same(whole[start:], make().iterate(start, 17))
    batches = make()
    backwards = [batches[step] for step in reversed(range(17))]
    assert same(whole, reversed(backwards))
    assert list(make().iterate(5, 5)) == []


@pytest.mark.parametrize("make", [text_batches, task_batches])
def test_threads_do_not_matter(make, monkeypatch):
    whole = list(make().iterate(0, 12))
    for threads, buffer in ((1, 1), (8, 16)):
        options = loader.grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
        monkeypatch.setattr(loader, "_READ", options)
        assert same(whole, make().iterate(0, 12))


@pytest.mark.parametrize("make", [text_batches, task_batches])
def test_seeds_differ(make):
    first = [make(0)[step] for step in range(4)]
    for seed in (1, 2, 12345, 2**32 - 1):
        assert different(first, [make(seed)[step] for step in range(4)])
    for seed in (-1, 2**40):
        assert make(seed)[0].tokens.any()


def test_epochs_and_far_steps_of_text():
    batches = text_batches()
    assert different([batches[0]], [batches[3]])
    assert same([batches[10**7]], [text_batches()[10**7]])


def test_text_shorter_than_a_window():
    assert loader.TextBatches(numbered(8), 8, 2, 0)[0].tokens.tolist() == [list(range(8))] * 2
    with pytest.raises(UserError, match=r"has 7 tokens, fewer than one window of 8") as info:
        loader.TextBatches(numbered(7), 8, 2, 0)
    assert "`pretrain.window`" in str(info.value)


def test_lm_batch_pads_rows_and_windows():
    batch = loader.lm_batch([numbered(4) + 5, numbered(2) + 7, numbered(1) + 9], 4, 5)
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [7, 8, 0, 0], [9, 0, 0, 0], [0] * 4, [0] * 4]
    real = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0] * 4, [0] * 4]
    assert batch.segment_ids.tolist() == real
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0], [0] * 4, [0] * 4, [0] * 4]
    # A token predicts the next one: the last of a window has none.
    assert batch.lm_weights.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [0] * 4, [0] * 4, [0] * 4]
    assert not batch.token_types.any()
    types = [batch.tokens, batch.segment_ids, batch.positions, batch.token_types]
    assert {array.dtype for array in types} == {np.dtype(np.int32)}
    assert batch.lm_weights.dtype == np.float32
    assert batch.labels is batch.extract is batch.example_mask is batch.candidate_mask is None


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 40, 41, 63])
@pytest.mark.parametrize("rows", [1, 3])
def test_text_in_order_covers_every_token_once(tokens, rows):
    batches = list(loader.text_in_order(numbered(tokens), 8, rows))
    windows = -(-tokens // 8)
    assert len(batches) == -(-windows // rows)
    assert {batch.tokens.shape for batch in batches} == {(rows, 8)}
    shown = np.concatenate([batch.tokens[batch.segment_ids > 0] for batch in batches])
    assert shown.tolist() == list(range(tokens))
    # Of every window all tokens but the first are predicted.
    assert sum(batch.lm_weights.sum() for batch in batches) == tokens - windows
    for batch in batches:
        targets = np.roll(batch.tokens, -1, axis=1)[batch.lm_weights > 0]
        assert (targets == batch.tokens[batch.lm_weights > 0] + 1).all()
    limited = list(loader.text_in_order(numbered(tokens), 8, rows, limit=2))
    assert same(batches[:2], limited)


# Tasks.


def distinct(count, candidates=1):
    """Examples of different lengths whose tokens tell which sequence they are."""
    rng = np.random.default_rng(count)
    tokens = [np.full(rng.integers(3, 12), 100 + i, np.int32) for i in range(count * candidates)]
    ends = np.array([len(sequence) for sequence in tokens], np.int32)
    return Examples(candidates, tokens, ends, np.arange(count, dtype=np.int32), 0, 0)


def examples_of(batch):
    """The examples of a batch, with all that must go with each checked."""
    found = []
    for b, e in zip(*np.nonzero(batch.example_mask), strict=True):
        label = int(batch.labels[b, e])
        for c, place in enumerate(batch.extract[b, e]):
            segment = batch.segment_ids[b, place]
            tokens = batch.tokens[b][batch.segment_ids[b] == segment]
            assert set(tokens.tolist()) == {100 + label * batch.extract.shape[2] + c}
        found.append(label)
    return found


@pytest.mark.parametrize(("count", "batch_size"), [(13, 4), (12, 4), (5, 1), (3, 8), (1, 2)])
def test_each_epoch_visits_every_example_once(count, batch_size):
    batches = task_batches(count=count, batch_size=batch_size)
    epochs = 5
    found = []
    for step in range(-(-epochs * count // batch_size)):
        here = examples_of(batches[step])
        assert len(here) == batch_size
        found.append(here)
    # A batch may hold an epoch's end and the next one's beginning, packed in any order: count them.
    whole = [0] * count
    for step, here in enumerate(found):
        for i in here:
            whole[i] += 1
        seen = (step + 1) * batch_size
        assert max(whole) <= -(-seen // count)
        assert min(whole) >= seen // count
    orders = {tuple(sorted(here)) for here in found}
    assert len(orders) > 1 or count <= batch_size or count == 1


def test_the_batches_of_an_epoch_have_about_the_same_number_of_tokens():
    """And other companions in each epoch: chance, not length alone, brings examples together."""
    rng = np.random.default_rng(0)
    tokens = [np.full(n, 1, np.int32) for n in rng.integers(5, 60, 403)]
    examples = Examples(1, tokens, np.ones(403, np.int32), np.arange(403, dtype=np.int32), 0, 0)
    packer = Packer(examples.lengths, 16)
    batches = loader.BalancedBatches(examples, packer, 16, seed=3)
    chosen = [np.sort(batches.chosen(step)) for step in range(3 * 25)]
    totals = np.array([examples.lengths[c].sum() for c in chosen])
    whole = np.array([step * 16 // 403 == (step * 16 + 15) // 403 for step in range(75)])
    assert whole.sum() >= 72
    for epoch in range(3):
        mine = totals[[step for step in range(75) if whole[step] and step * 16 // 403 == epoch]]
        # Left to chance they would differ by sqrt(16) * 16 = 64 tokens (standard deviation).
        assert mine.std() < 4
    pairs = [
        {(a, b) for c in chosen[start : start + 25] for a in c for b in c if a < b}
        for start in (0, 25, 50)
    ]
    # By chance two examples meet again with probability 15 / 402.
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert len(pairs[one] & pairs[other]) < 3 * len(pairs[one]) * 15 / 402


def test_drop_last_leaves_the_order_to_chance():
    examples = distinct(40)
    packer = Packer(examples.lengths, 8)
    order = loader.grain.MapDataset.range(40).shuffle(seed=5).batch(8)
    batches = loader.WholeEpochBatches(examples, packer, 8, seed=5)
    for step in range(5):
        np.testing.assert_array_equal(batches.chosen(step), order[step])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
@pytest.mark.parametrize("candidates", [1, 2])
def test_every_example_covers_each_once_in_one_shape(batch_size, candidates, monkeypatch):
    examples = distinct(17, candidates)
    packer = Packer(examples.lengths, batch_size, 0)
    for pool in (2048, 5):
        monkeypatch.setattr(loader, "_POOL", pool)
        found, shapes = [], set()
        for batch, index in loader.every_example(examples, packer):
            shapes.add(batch.tokens.shape)
            assert index.shape == batch.example_mask.shape
            np.testing.assert_array_equal(index >= 0, batch.example_mask > 0)
            np.testing.assert_array_equal(index[index >= 0], batch.labels[index >= 0])
            found += examples_of(batch)
        assert sorted(found) == list(range(17))
        assert shapes == {(packer.rows, packer.row_length)}
