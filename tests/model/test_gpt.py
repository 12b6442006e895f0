"""The model against the NumPy reference: states, logits, losses, gradients, and masks.

Tolerances. The model computes softmax, norms and logits in float32 whatever its dtype, so that it
cannot run in float64, and each operation loses a few units in the last place. `reference.py` in
float32 shows how much. The first test allows the model 16 times that error, and 2e-5 of the largest
value (168 eps).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small

from gptjax.config.schema import ModelConfig
from gptjax.model import gpt
from gptjax.model.gpt import GPT
from gptjax.model.objective import Objective
from gptjax.ops import attention

TOLERANCE = 2e-5


def unpacked(task):
    """Returns the examples of a task in the form that `reference.run` takes."""
    return as_sequences(task.examples)


def as_sequences(data):
    """Returns examples in the form that `reference.run` takes."""
    count = data.num_candidates
    result = []
    for i in range(len(data)):
        sequences = []
        for c in range(count):
            tokens = data.tokens[i * count + c]
            if not len(tokens):
                continue  # a window that a shorter text does not have
            types = (np.arange(len(tokens)) >= data.second_start[i * count + c]).astype(int)
            sequences.append((tokens, types))
        result.append((sequences, data.labels[i]))
    return result


def span(batch, row, slot, candidate):
    """Returns the positions in a row that one sequence occupies."""
    end = batch.extract[row, slot, candidate]
    return np.flatnonzero(batch.segment_ids[row] == batch.segment_ids[row, end])


def relative(actual, expected):
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))


@pytest.mark.parametrize("kind", small.KINDS)
def test_packed_model_equals_the_reference(kind):
    task = small.task(kind)
    batch, index = small.packed(task.examples, 128, task.shape)
    assert (index >= 0).sum(axis=1).max() > 1, "nothing is packed"
    got = jax.device_get(task.measure(task.params, batch))
    activation = task.model.config.activation
    exact = reference.cast(task.params)
    states, outputs, l2, l1 = reference.run(exact, kind, unpacked(task), activation)
    rough, _, _, _ = reference.run(
        reference.cast(task.params, np.float32), kind, unpacked(task), activation
    )
    worst = rounding = 0.0
    for row, slot in zip(*np.nonzero(index >= 0), strict=True):
        i = index[row, slot]
        for c, x in enumerate(states[i]):
            places = span(batch, row, slot, c)
            worst = max(worst, relative(got["states"][row, places], x))
            rounding = max(rounding, relative(rough[i][c], x))
            logits = reference.lm_logits(exact, x)
            assert relative(got["lm_logits"][row, places], logits) < TOLERANCE
        found = got["task_logits"][row, slot]
        assert found.shape == outputs[i].shape
        assert relative(found, outputs[i]) < TOLERANCE
    assert worst < TOLERANCE
    assert worst < 16 * rounding
    sums = got["sums"]
    assert sums.task.total / sums.task.weight == pytest.approx(l2, rel=1e-5)
    assert sums.lm.total / sums.lm.weight == pytest.approx(l1, rel=1e-5)
    assert got["loss"] == pytest.approx(l2 + 0.5 * l1, rel=1e-5)


def with_candidates(data, count):
    """Returns the same examples with more candidates, which no example has."""
    none = np.zeros(0, np.int32)
    old = data.num_candidates
    order = [i * old + c if c < old else -1 for i in range(len(data)) for c in range(count)]
    tokens = [data.tokens[i] if i >= 0 else none for i in order]
    second = np.array([data.second_start[i] if i >= 0 else 0 for i in order], np.int32)
    return dataclasses.replace(data, num_candidates=count, tokens=tokens, second_start=second)


def test_a_long_text_in_windows_is_the_mean_of_its_windows():
    """Logits, both losses and the gradient, packed and one example a row; and padding windows."""
    spec, data = small.windowed_examples(3, longest=14)
    examples = as_sequences(data)
    assert {len(sequences) for sequences, _ in examples} == {1, 2, 3}
    assert data.cut, "no text has more than three windows"
    model = gpt.make_model(small.config(num_layers=1), spec)
    params, measure = small.params(model), small.measure(model, Objective("classification", 0.5))
    exact = reference.cast(params)
    _, outputs, l2, l1 = reference.run(exact, "classification", examples)
    rng = np.random.default_rng(0)
    step = jax.tree.map(lambda x: 1e-5 * rng.normal(size=x.shape), exact)
    up, down = (
        reference.joint(jax.tree.map(moved, exact, step), "classification", examples, 0.5)
        for moved in (np.add, np.subtract)
    )
    many = with_candidates(data, 5)
    assert many.fingerprint == data.fingerprint
    found = []
    for each, one in ((data, False), (data, True), (many, False)):
        batch, index = small.packed(each, 72, (8, 72, 6), one=one)
        got = jax.device_get(measure(params, batch))
        found.append(got)
        for row, slot in np.argwhere(index >= 0):
            assert relative(got["task_logits"][row, slot], outputs[index[row, slot]]) < TOLERANCE
        assert got["sums"].task.total / got["sums"].task.weight == pytest.approx(l2, rel=1e-5)
        assert got["sums"].lm.total / got["sums"].lm.weight == pytest.approx(l1, rel=1e-5)
        products = jax.tree.map(lambda g, d: (g.astype(float) * d).sum(), got["gradients"], step)
        assert 2 * sum(jax.tree.leaves(products)) == pytest.approx(up - down, rel=2e-4)
    small.assert_trees_close(found[2]["gradients"], found[0]["gradients"], 1e-6)


@pytest.mark.parametrize("kind", ["classification", "similarity", "multiple_choice"])
def test_the_head_reads_the_mean_state_of_each_sequence(kind):
    """Logits, loss and gradient against the reference, packed and one example a row."""
    spec, data = small.examples(kind, count=6)
    spec = dataclasses.replace(spec, mean=True)
    model = gpt.make_model(small.config(num_layers=1), spec)
    params, measure = small.params(model), small.measure(model, Objective(kind, 0.5))
    exact, examples = reference.cast(params), as_sequences(data)
    _, outputs, l2, _ = reference.run(exact, kind, examples, mean=True)
    _, others, _, _ = reference.run(exact, kind, examples)
    assert relative(np.array(others), np.array(outputs)) > 0.01
    rng = np.random.default_rng(0)
    step = jax.tree.map(lambda x: 1e-5 * rng.normal(size=x.shape), exact)
    up, down = (
        reference.joint(jax.tree.map(moved, exact, step), kind, examples, 0.5, mean=True)
        for moved in (np.add, np.subtract)
    )
    for one in (False, True):
        batch, index = small.packed(data, 128, (8, 128, 6), one=one)
        got = jax.device_get(measure(params, batch))
        for row, slot in np.argwhere(index >= 0):
            assert relative(got["task_logits"][row, slot], outputs[index[row, slot]]) < TOLERANCE
        assert got["sums"].task.total / got["sums"].task.weight == pytest.approx(l2, rel=1e-5)
        products = jax.tree.map(lambda g, d: (g.astype(float) * d).sum(), got["gradients"], step)
        assert 2 * sum(jax.tree.leaves(products)) == pytest.approx(up - down, rel=2e-4)


def test_texts_of_one_window_are_read_as_they_are_cut():
    """Loss, gradient and logits with dropout are the same bits."""
    found = []
    for windows in (0, 3):
        spec, data = small.windowed_examples(windows, context=32)
        assert data.num_candidates == 1
        model = gpt.make_model(small.config(num_layers=1, head_dropout=0.4), spec)
        assert model.mean_candidates == bool(windows)
        measure = small.measure(model, Objective("classification", 0.5))
        batch, index = small.packed(data, 72, (8, 72, 6))
        got = jax.device_get(measure(small.params(model), batch, jax.random.key(3)))
        found.append((got["loss"], got["gradients"], got["task_logits"][index >= 0], batch))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize("kind", small.KINDS)
def test_gradients_equal_finite_differences_of_the_reference(kind):
    """Every array, along random directions: (f(p + h d) - f(p - h d)) / 2h in float64.

    With h = 1e-5 the difference has an error of about 1e-9. The scalar product of a float32
    gradient and a random direction has an error of a few eps times the gradient's norm. The bound's
    second term is for gradients that are 0 in exact arithmetic (the head's bias in a multiple
    choice).
    """
    task = small.task(kind)
    batch, _ = small.packed(task.examples, 128, task.shape)
    got = jax.device_get(task.measure(task.params, batch)["gradients"])
    exact, examples = reference.cast(task.params), unpacked(task)
    leaves, tree = jax.tree.flatten(exact)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(exact)]
    gradients = jax.tree.leaves(got)
    whole = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in gradients))
    rng = np.random.default_rng(0)

    def loss(i, array):
        params = jax.tree.unflatten(tree, [*leaves[:i], array, *leaves[i + 1 :]])
        return reference.joint(params, kind, examples, 0.5, task.model.config.activation)

    for i, name in enumerate(names):
        gradient = gradients[i].astype(np.float64)
        for _ in range(2):
            d = rng.normal(size=gradient.shape)
            expected = (loss(i, leaves[i] + 1e-5 * d) - loss(i, leaves[i] - 1e-5 * d)) / 2e-5
            bound = TOLERANCE * np.linalg.norm(gradient) + 1e-6 * whole
            assert abs((gradient * d).sum() - expected) < bound, name


ROW = np.array([1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 0, 0, 0], np.int32)
ROW_POSITIONS = np.array([0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 0, 0, 0], np.int32)


def test_a_state_depends_on_its_own_segment_up_to_itself_and_on_nothing_else():
    """d state[t] / d embedding of token s is exactly 0 unless s <= t in the same segment."""
    model = GPT(small.config())
    params = small.params(model)
    length = len(ROW)
    tokens = np.arange(5, 5 + length, dtype=np.int32)  # distinct: a row of the table is a place
    weights = jax.random.normal(jax.random.key(0), (model.config.width,))

    @small.fast_jit
    def sensitivity(params):
        def projections(table):
            x_BTD = gpt.run(
                model, params | {"token_embedding": table}, tokens[None], ROW[None],
                ROW_POSITIONS[None], method="hidden",
            )  # fmt: skip
            return x_BTD[0] @ weights

        _, pull = jax.vjp(projections, params["token_embedding"])
        return jax.vmap(pull)(jnp.eye(length))[0]

    gradient_TVD = np.asarray(sensitivity(params))
    depends = (gradient_TVD != 0).any(-1)
    t, s = np.indices((length, length))
    visible = (ROW[:, None] == ROW[None, :]) & (s <= t)
    np.testing.assert_array_equal(depends[:, tokens], visible)
    others = np.setdiff1d(np.arange(model.config.vocab_size), tokens)
    assert not depends[:, others].any()
    assert np.isfinite(gradient_TVD).all()


@pytest.mark.parametrize("kind", ["entailment", "multiple_choice"])
def test_what_padding_holds_changes_no_bit(kind):
    task = small.task(kind)
    batch, index = small.packed(task.examples, 128, task.shape)
    padding = batch.segment_ids == 0
    assert padding.all(axis=1).any(), "no row is all padding"
    rng = np.random.default_rng(0)
    empty = index < 0
    config = task.model.config

    def fill(x, where, high):
        return np.where(where, rng.integers(high, size=x.shape).astype(x.dtype), x)

    other = batch.replace(
        tokens=fill(batch.tokens, padding, config.vocab_size),
        positions=fill(batch.positions, padding, config.context_length),
        token_types=fill(batch.token_types, padding, 2),
        extract=fill(batch.extract, empty[..., None], task.shape[1]),
        labels=fill(batch.labels, empty, 2),
    )
    one, two = (task.measure(task.params, b) for b in (batch, other))
    for name in ("loss", "sums", "gradients"):
        for x, y in zip(jax.tree.leaves(one[name]), jax.tree.leaves(two[name]), strict=True):
            np.testing.assert_array_equal(x, y)
            assert np.isfinite(x).all()
    np.testing.assert_array_equal(
        np.asarray(one["task_logits"])[~empty], np.asarray(two["task_logits"])[~empty]
    )
    for leaf in jax.tree.leaves(two):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("kind", ["entailment", "multiple_choice"])
def test_a_batch_of_padding_alone_has_loss_and_gradient_0(kind):
    task = small.task(kind)
    batch, _ = small.packed(task.examples, 128, task.shape)
    empty = jax.tree.map(np.zeros_like, batch)
    got = jax.device_get(task.measure(task.params, empty))
    assert got["loss"] == 0
    for leaf in jax.tree.leaves(got["gradients"]):
        assert not leaf.any()
    for leaf in jax.tree.leaves(got):
        assert np.isfinite(leaf).all()


DROPOUTS = {
    "embedding_dropout": 0.2, "attention_dropout": 0.3, "residual_dropout": 0.1,
    "head_dropout": 0.25,
}  # fmt: skip


@pytest.fixture(scope="module")
def with_dropout():
    """A model with dropout: (task, model, batch, compiled measurements)."""
    task = small.task("similarity")
    model = task.model.clone(config=small.config(**DROPOUTS))
    batch, _ = small.packed(task.examples, 128, task.shape)
    return task, model, batch, small.measure(model, task.objective)


def test_dropout_is_a_function_of_the_key_and_is_off_without_one(with_dropout):
    task, _, batch, measure = with_dropout
    one, same, other = (measure(task.params, batch, jax.random.key(i)) for i in (1, 1, 2))
    for name in ("loss", "gradients", "task_logits"):
        for x, y in zip(jax.tree.leaves(one[name]), jax.tree.leaves(same[name]), strict=True):
            np.testing.assert_array_equal(x, y)
    assert abs(float(one["loss"] - other["loss"])) > 1e-3
    plain = jax.device_get(task.measure(task.params, batch))
    np.testing.assert_allclose(one["states"], plain["states"], atol=1e-5)  # key is not used there
    assert abs(float(one["loss"]) - plain["loss"]) > 1e-3


def test_mean_over_keys_of_the_dropped_embedding_is_the_embedding():
    """The mean of 2,000 inputs of the first block is within 5 standard deviations of it."""
    model = GPT(small.config(num_layers=1, embedding_dropout=0.4))
    params = small.params(model)
    tokens = jnp.arange(8, dtype=jnp.int32)[None]

    def embedded(key):
        def method(module):
            return module._embed(tokens, tokens, None, False)

        return model.apply({"params": params}, method=method, rngs={"dropout": key})

    samples = np.asarray(
        small.fast_jit(jax.vmap(embedded))(jax.random.split(jax.random.key(3), 2000))
    )
    x = np.asarray(params["token_embedding"][:8] + params["position_embedding"][:8])[None]
    sigma = np.abs(x) * np.sqrt(0.4 / 0.6 / len(samples))
    assert (np.abs(samples.mean(0) - x) < 5 * sigma).all()
    assert set(np.unique(np.round(samples / x, 4))) == {0.0, np.float32(1.6667)}


@pytest.mark.parametrize(
    ("remat", "unroll"),
    [
        ("dots", 2),
        pytest.param("full", 1, marks=pytest.mark.slow),
        pytest.param("full", 2, marks=pytest.mark.slow),
        pytest.param("none", 2, marks=pytest.mark.slow),
    ],
)
def test_remat_and_unroll_change_neither_loss_nor_gradients(with_dropout, remat, unroll):
    """Recomputed dropout has the same masks. XLA fuses other operations, hence the tolerance."""
    task, model, batch, measure = with_dropout
    config = small.config(**DROPOUTS, remat=remat, unroll=unroll)
    other = small.measure(model.clone(config=config), task.objective)
    key = jax.random.key(7)
    expected, got = (f(task.params, batch, key) for f in (measure, other))
    assert float(got["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)
    small.assert_trees_close(got["gradients"], expected["gradients"], TOLERANCE)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_needs_less_memory(remat):
    """The sizes are those of XLA's buffer assignment, for a CPU's default of `unroll`."""
    ids = jnp.ones((8, 128), jnp.int32)

    def temporary(**changes):
        model = GPT(small.config(num_layers=6, context_length=128, **changes))
        params = small.params(model)

        def total(params):
            return gpt.run(model, params, ids, ids, ids, method="hidden").sum()

        return jax.jit(jax.grad(total)).lower(params).compile().memory_analysis()

    none, less = (temporary(**changes).temp_size_in_bytes for changes in ({}, {"remat": remat}))
    assert less < {"dots": 0.8, "full": 0.5}[remat] * none


def test_inference_asks_for_no_dropout_of_the_attention_kernel(monkeypatch):
    """A kernel without our dropout can therefore run a model that was trained with dropout."""
    rates, choose = [], attention.choose
    monkeypatch.setattr(
        attention, "choose", lambda *args: (rates.append(args[-1]), choose(*args))[1]
    )
    model, ids = GPT(small.config(attention_dropout=0.3)), jnp.ones((1, 4), jnp.int32)
    params = small.params(model)
    rates.clear()
    gpt.run(model, params, ids, ids, ids, method="hidden")
    assert set(rates) == {0.0}
    key = jax.random.key(0)
    gpt.run(model, params, ids, ids, ids, None, False, method="hidden", key=key)
    assert set(rates) == {0.0, 0.3}


def test_a_seed_keeps_its_initial_values():
    """Flax's keys depend on the order in which a module creates its parameters."""
    blocks = gpt.init_params(GPT(small.config()), jax.random.key(0))["blocks"]
    drawn = (
        blocks["ffn_in"]["kernel"][0, 0, 0],
        blocks["attention"]["qkv"]["kernel"][1].reshape(-1)[-1],
        blocks["ffn_out"]["kernel"][0, -1, -1],
    )
    np.testing.assert_allclose(drawn, (-0.0386627167, -0.1641942263, 0.4214984179), rtol=1e-6)


def test_every_layer_draws_its_own_mask():
    """Each block adds a dropped vector of ones and normalises.

    If both blocks dropped the same elements, a state would have two different values only.
    """
    model = GPT(small.config(residual_dropout=0.5))

    def plain(path, x):
        one = path[-1].key == "scale" or (path[-2].key, path[-1].key) == ("ffn_out", "bias")
        return jnp.full_like(x, one)

    params = jax.tree_util.tree_map_with_path(plain, small.params(model)["blocks"])
    ids = (jnp.ones((1, 4), jnp.int32),) * 2
    x_BTD = model.apply(
        {"params": small.params(model) | {"blocks": params}},
        jnp.zeros((1, 4, 24)),
        method=lambda m, x: m.blocks(x, ids, False)[0],
        rngs={"dropout": jax.random.key(0)},
    )
    for row in np.round(np.asarray(x_BTD[0]), 4):
        assert len(np.unique(row)) > 2


def test_the_full_size_model_has_the_released_number_of_parameters():
    """116,534,784 is the number in OpenAI's release, and follows from the architecture."""
    model = GPT(ModelConfig(vocab_size=40478))
    shapes = jax.eval_shape(lambda key: gpt.init_params(model, key), jax.random.key(0))
    d, f = 768, 3072
    block = (d * 3 * d + 3 * d) + (d * d + d) + (d * f + f) + (f * d + d) + 4 * d
    assert 40478 * d + 512 * d + 12 * block == 116_534_784
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 116_534_784
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_initial_values_are_those_of_the_paper():
    model = GPT(small.config(init_std=0.02, width=96, segment_types=3), num_outputs=2)
    params = small.fast_jit(lambda key: gpt.init_params(model, key))(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name == "bias":
            assert not np.any(leaf)
        elif name == "scale":
            assert (np.asarray(leaf) == 1).all()
        else:
            error = 5 / np.sqrt(leaf.size)
            assert abs(np.mean(leaf) / 0.02) < error
            assert abs(np.std(leaf) / 0.02 - 1) < error
    kernel = np.asarray(params["blocks"]["ffn_in"]["kernel"])
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.05, "layers are copies"


def test_bfloat16_states_are_near_the_reference():
    """Each operation rounds to eps / 2 = 2^-9; a block has about 20 of them in a row.

    The errors are independent, so that the standard deviation of their sum is sqrt(40) * 2^-9, 1.2%
    of a state of size 1. The root of the mean square is allowed twice that, the largest error of
    thousands five times.
    """
    task = small.task("entailment")
    config = small.config(segment_types=2, dtype="bfloat16")
    model = task.model.clone(config=config)
    sequences, _ = unpacked(task)[0]
    tokens, types = sequences[0]
    ones = np.ones((1, len(tokens)), np.int32)
    x_BTD = small.fast_jit(lambda p, *a: gpt.run(model, p, *a, method="hidden"))(
        task.params, tokens[None], ones, np.arange(len(tokens))[None], types[None]
    )
    assert x_BTD.dtype == jnp.bfloat16
    expected = reference.hidden(reference.cast(task.params), tokens, types)
    error = np.asarray(x_BTD[0], np.float64) - expected
    size = np.sqrt(np.mean(expected**2))
    assert np.sqrt(np.mean(error**2)) < 2 * np.sqrt(40) * 2**-9 * size
    assert np.abs(error).max() < 5 * np.sqrt(40) * 2**-9 * size
