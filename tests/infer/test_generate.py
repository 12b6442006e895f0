"""Generation with a cache equals recomputing everything for every token."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gptjax.errors import UserError
from gptjax.infer import generate
from gptjax.model import gpt
from gptjax.model.gpt import GPT

CONTEXT = 20


@pytest.fixture(scope="module")
def setup():
    """(model, params, logits): logits(windows [N, T <= context]) by the uncached model."""
    model = GPT(small.config(context_length=CONTEXT, segment_types=2))
    params = small.params(model, seed=4)

    @small.fast_jit
    def run(tokens, segments, positions, last):
        x_BTD = gpt.run(
            model, params, tokens, segments, positions, jnp.zeros_like(tokens), method="hidden"
        )
        return gpt.run(model, params, x_BTD, method="lm_logits")[:, last]

    def logits(windows):
        padded = np.zeros((4, CONTEXT), np.int32)
        segments = np.zeros_like(padded)
        n, length = windows.shape
        padded[:n, :length], segments[:n, :length] = windows, 1
        positions = np.tile(np.arange(CONTEXT, dtype=np.int32), (4, 1))
        return np.asarray(run(padded, segments, positions, length - 1))[:n]

    return model, params, logits


def filter_by_hand(logits, temperature, top_k, top_p):
    """The k most likely, of them the fewest whose (renormalised) probabilities reach p."""
    result = np.full(logits.shape, -np.inf)
    for row, out in zip(logits.astype(np.float64) / temperature, result, strict=True):
        allowed = np.isfinite(row)
        if top_k:
            allowed &= row >= np.sort(row)[::-1][min(top_k, len(row)) - 1]
        p = np.where(allowed, np.exp(row - row[allowed].max()), 0)
        p /= p.sum()
        if top_p < 1:
            order = np.argsort(-p, kind="stable")
            needed = np.searchsorted(np.cumsum(p[order]), top_p) + 1
            allowed &= p >= p[order[:needed]].min()
        out[allowed] = row[allowed]
    return result


def naive(logits, prompt, count, samples, sampling, seed, banned):
    """No cache: every token from the whole window, all samples from the start."""
    texts, key = np.repeat(prompt[None], samples, axis=0), jax.random.key(seed)
    start = generate.window_start(len(prompt), CONTEXT)
    for i in range(count):
        if texts.shape[1] - start >= CONTEXT:
            start = generate.window_start(texts.shape[1], CONTEXT)
        scores = np.where(banned, -np.inf, logits(texts[:, start:]))
        if sampling.temperature == 0:
            token = scores.argmax(-1)
        else:
            kept = filter_by_hand(scores, sampling.temperature, sampling.top_k, sampling.top_p)
            step_key = jax.random.fold_in(key, i)
            token = jax.random.categorical(step_key, jnp.asarray(kept, jnp.float32))
        texts = np.concatenate([texts, np.asarray(token, np.int32)[:, None]], axis=1)
    return texts[:, len(prompt) :]


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(97, size=length).astype(np.int32)


class Rule(NamedTuple):
    """The arguments of `make_sampler` that say how a token is drawn."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


GREEDY = Rule(temperature=0.0)
NONE = np.zeros(97, bool)


def sampler(temperature=1.0, top_k=0, top_p=1.0):
    return generate.make_sampler(NONE, 0, temperature, top_k, top_p)


@pytest.mark.parametrize("sampling", [GREEDY, Rule(), Rule(0.7, 12, 0.9)])
@pytest.mark.parametrize(
    ("length", "count", "samples"),
    [(1, 6, 1), (9, 45, 1), (17, 30, 3), (19, 3, 3), (20, 25, 1), (33, 15, 3)],
)
def test_cached_equals_uncached(setup, length, count, samples, sampling):
    """Prompts shorter than, equal to and longer than the context, and far past its end."""
    model, params, logits = setup
    banned = np.zeros(97, bool)
    banned[[0, 7, 50]] = True
    prompt = prompt_of(length, length)
    rule = generate.make_sampler(banned, 11, *sampling)
    got = generate.generate(generate.prepare(model, params), prompt, count, samples, rule)
    assert got.shape == (samples, count)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, naive(logits, prompt, count, samples, sampling, 11, banned))
    assert not np.isin(got, np.flatnonzero(banned)).any()
    if samples > 1 and sampling.temperature and count > 10:
        assert len({row.tobytes() for row in got}) == samples, "samples are copies"


def test_window_start_is_its_rule():
    for context in (2, 5, 20):
        for length in range(1, 70):
            start = generate.window_start(length, context)
            kept = length - start
            assert 1 <= kept < context, "no room for a token"
            assert kept == (length if length < context else max(1, context // 2))


def test_prompts_of_a_bucket_and_any_sampling_share_one_compilation(setup):
    model, params, _ = setup
    decoder = generate.prepare(model, params)

    def run(length, count, sampling, seed):
        rule = generate.make_sampler(NONE, seed, *sampling)
        generate.generate(decoder, prompt_of(length), count, 2, rule)

    run(3, 2, GREEDY, 0)
    sizes = generate._prefill._cache_size(), generate._decode._cache_size()
    for length in (1, 2, 8, 11, 12):
        run(length, 1 + length % 4, Rule(0.5 + length / 10, length, 0.9), length)
    assert (generate._prefill._cache_size(), generate._decode._cache_size()) == sizes
    run(16, 2, GREEDY, 0)  # a larger cache
    assert generate._prefill._cache_size() == sizes[0] + 1
    assert generate._decode._cache_size() == sizes[1] + 1
    run(17, 2, GREEDY, 0)  # a longer prompt in a cache of that size: the same decode
    assert generate._prefill._cache_size() == sizes[0] + 2
    assert generate._decode._cache_size() == sizes[1] + 1


def test_buckets_hold_what_they_must_with_little_waste():
    for limit in (5, 20, 512, 600):
        sizes = [generate._bucket(length, limit) for length in range(1, limit + 1)]
        assert all(length <= size <= limit for length, size in enumerate(sizes, 1))
        assert all(size <= max(16, 1.5 * length) for length, size in enumerate(sizes, 1))
        assert len(set(sizes)) <= 2 * max(1, limit // 16).bit_length()


@pytest.mark.parametrize("prompts", [1, 3])
def test_samples_of_a_prompt_get_its_cache(setup, prompts):
    """As many rows as samples, a row's copies side by side, heads of a row together."""
    model, params, _ = setup
    decoder = generate.prepare(model, params)
    rows = np.stack([prompt_of(16, seed) for seed in range(prompts)])

    def prefill(rows, samples):
        return generate._prefill(
            decoder, sampler(), jnp.asarray(rows), jnp.int32(9), samples, entries=16
        )

    cache, logits = prefill(rows, 2 * prompts)
    alone = [prefill(row[None], 1) for row in rows]
    for sample in range(2 * prompts):
        own_cache, own_logits = alone[sample // 2]
        np.testing.assert_allclose(logits[sample], own_logits[0], rtol=1e-5, atol=1e-6)
        for layer, own in zip(cache, own_cache, strict=True):
            heads = layer["key"].reshape(2 * prompts, *own["key"].shape)[sample]
            np.testing.assert_allclose(heads, own["key"], rtol=1e-5, atol=1e-6)


def test_bfloat16_generates_what_its_logits_say():
    """Greedy tokens are the most likely ones of the uncached model, to the rounding of bfloat16."""
    model = GPT(small.config(context_length=CONTEXT, dtype="bfloat16"))
    params = small.params(model, seed=4)
    got = generate.generate(generate.prepare(model, params), prompt_of(5), 12, 1, sampler(*GREEDY))
    tokens = np.concatenate([prompt_of(5), got[0]])[None]
    ones, positions = np.ones_like(tokens), np.arange(17, dtype=np.int32)[None]
    x = gpt.run(model, params, tokens, ones, positions, method="hidden")
    logits = np.asarray(gpt.run(model, params, x, method="lm_logits"))[0, 4:-1]
    chosen = logits[np.arange(12), got[0]]
    assert (chosen >= logits.max(-1) - 0.02 * logits.std()).all()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 96, 97, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.5, 1e-6])
def test_filters_equal_their_definition(temperature, top_k, top_p):
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(4, 97)).astype(np.float32)
    logits[:, :5] = -np.inf  # banned
    logits[1, 20] = 40.0  # nearly all the probability
    got = np.asarray(generate.filtered(jnp.asarray(logits), sampler(temperature, top_k, top_p)))
    want = filter_by_hand(logits, temperature, top_k, top_p)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    np.testing.assert_allclose(got[np.isfinite(got)], want[np.isfinite(want)], rtol=1e-6)


def test_top_p_1_keeps_every_token_of_a_large_vocabulary():
    """Float32 sums of 40,478 probabilities pass 1 before the end: the tail must stay."""
    logits = 4 * np.random.default_rng(0).normal(size=(3, 40478)).astype(np.float32)
    got = generate.filtered(jnp.asarray(logits), sampler())
    assert np.isfinite(got).all()


def test_ties_at_the_edge_share_their_fate():
    logits = jnp.array([[2.0, 1.0, 1.0, 0.0]])
    got = generate.filtered(logits, sampler(top_k=2))
    np.testing.assert_array_equal(np.isfinite(got), [[True, True, True, False]])


def test_top_k_1_is_greedy(setup):
    model, params, _ = setup
    decoder = generate.prepare(model, params)
    one, greedy = (
        generate.generate(decoder, prompt_of(9), 12, 1, generate.make_sampler(NONE, 5, *rule))
        for rule in (Rule(1.3, top_k=1), GREEDY)
    )
    np.testing.assert_array_equal(one, greedy)


def test_draws_follow_the_probabilities():
    """20,000 draws of 4 tokens: each share within 5 standard deviations."""
    logits = np.log([0.5, 0.3, 0.15, 0.05]).astype(np.float32)
    rows = jnp.tile(logits, (20_000, 1))
    drawn = generate.draw(rows, jax.random.key(0), sampler())
    p = np.exp(logits)
    share = np.bincount(drawn, minlength=4) / 20_000
    assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / 20_000)).all()


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": 1e39},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
    ],
)
def test_sampling_out_of_range_is_a_user_error(values):
    with pytest.raises(UserError, match=next(iter(values))):
        generate.make_sampler(NONE, **values)
