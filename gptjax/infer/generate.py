"""Text from a prompt: prefill once, then one token at a time against the key/value cache.

Letters of shapes: N samples, T tokens, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import mesh
from gptjax.errors import require
from gptjax.infer import decoder as decoder_lib
from gptjax.infer.decoder import Caches, Decoder, Weights
from gptjax.model.gpt import GPT

Array = jax.Array


# All tokens are as likely there; float32 reaches 3.4e38.
_HOTTEST = 1e30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0
    """0: always the most likely token."""
    top_k: int = 0
    """Draw among the k most likely; 0: all."""
    top_p: float = 1.0
    """Draw among the fewest most likely tokens whose probabilities reach top_p."""

    def __post_init__(self) -> None:
        require(
            0 <= self.temperature <= _HOTTEST,
            f"`temperature`={self.temperature}: must be 0 to {_HOTTEST:g}",
        )
        require(self.top_k >= 0, f"`top_k`={self.top_k}: must not be negative")
        require(0 < self.top_p <= 1, f"`top_p`={self.top_p}: must be above 0 and at most 1")


def _tempered(logits_NV: Array, temperature: Array) -> Array:
    return logits_NV / jnp.maximum(temperature, 1e-6)


def filtered(logits_NV: Array, temperature: Array, top_k: Array, top_p: Array) -> Array:
    """Returns the logits over the temperature, -inf where top_k or top_p leaves a token out.

    Equal logits share their fate: a tie at the edge keeps all of its tokens.
    """
    logits_NV = _tempered(logits_NV, temperature)
    descending_NV = -jnp.sort(-logits_NV, axis=-1)
    size = logits_NV.shape[-1]
    last = jnp.where(top_k > 0, jnp.minimum(top_k, size), size) - 1
    floor_N1 = jax.lax.dynamic_slice_in_dim(descending_NV, last, 1, axis=-1)
    probabilities_NV = jax.nn.softmax(jnp.where(descending_NV < floor_N1, -jnp.inf, descending_NV))
    before_NV = jnp.cumsum(probabilities_NV, axis=-1) - probabilities_NV
    # Rounded sums reach 1 before the last token does: top_p = 1 must keep it all the same.
    kept_NV = ((before_NV < top_p) | (top_p >= 1)) & (descending_NV >= floor_N1)
    floor_N1 = jnp.where(kept_NV, descending_NV, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits_NV < floor_N1, -jnp.inf, logits_NV)


def draw(logits_NV: Array, key: Array, temperature: Array, top_k: Array, top_p: Array) -> Array:
    """Returns int32 [N]: the next token of each sample."""

    def greedy() -> Array:
        return logits_NV.argmax(-1)

    def sampled() -> Array:
        # Sorting a vocabulary takes a CPU longer than a small model's step.
        whole = (top_k == 0) & (top_p >= 1)
        kept_NV = jax.lax.cond(
            whole,
            lambda: _tempered(logits_NV, temperature),
            lambda: filtered(logits_NV, temperature, top_k, top_p),
        )
        return jax.random.categorical(key, kept_NV)

    return jax.lax.cond(temperature == 0, greedy, sampled).astype(jnp.int32)


def _next_logits(weights: Weights, x_N1D: Array, banned_V: Array) -> Array:
    return jnp.where(banned_V[None], -jnp.inf, decoder_lib.lm_logits(weights, x_N1D)[:, 0])


@functools.partial(jax.jit, static_argnames=("model", "samples", "entries"))
def _prefill(
    model: GPT,
    weights: Weights,
    prompt_NT: Array,
    length: Array,
    banned_V: Array,
    samples: int,
    entries: int,
) -> tuple[Caches, Array]:
    """Runs the prompt (padded at its end) once; returns cache and logits of `samples` copies."""
    # A CPU reads bfloat16 one by one: it has the same numbers as float32.
    on_cpu = mesh.platform(model.mesh) == "cpu"
    dtype = jnp.float32 if on_cpu else model.config.dtype
    cache = decoder_lib.new_cache(model.config, prompt_NT.shape[0], entries, dtype)
    x_NTD, cache = decoder_lib.decode(model, weights, prompt_NT, cache, 0)
    # What the padding wrote is overwritten by later tokens before any query can see it.
    x_N1D = jax.lax.dynamic_slice_in_dim(x_NTD, length - 1, 1, axis=1)
    logits_NV = _next_logits(weights, x_N1D, banned_V)
    rows = prompt_NT.shape[0]

    def copied(x: Array) -> Array:
        """Of the leading axis, rows times something: all of a row, then all of its copy."""
        x = jnp.repeat(x.reshape(rows, -1, *x.shape[1:]), samples // rows, axis=0)
        return x.reshape(-1, *x.shape[2:])

    return jax.tree.map(copied, (cache, logits_NV))


@functools.partial(jax.jit, static_argnames=("model",))
def _decode(
    model: GPT,
    weights: Weights,
    cache: Caches,
    logits_NV: Array,
    banned_V: Array,
    start: Array,
    count: Array,
    drawn: Array,
    key: Array,
    sampling: tuple[Array, Array, Array],
) -> Array:
    """Draws `count` tokens from position `start` on; returns int32 [N, S] (the first count).

    One compiled loop for any prompt, count and sampling that fit a cache of S entries. `drawn`
    tokens came before (in earlier windows): the key of a draw is its index among all draws.
    """
    entries = cache[0]["key"].shape[1]
    out_NS = jnp.zeros((logits_NV.shape[0], entries), jnp.int32)

    def body(i: Array, carry: tuple[Array, Caches, Array]) -> tuple[Array, Caches, Array]:
        out_NS, cache, logits_NV = carry
        token_N = draw(logits_NV, jax.random.fold_in(key, drawn + i), *sampling)
        out_NS = jax.lax.dynamic_update_slice_in_dim(out_NS, token_N[:, None], i, axis=1)
        x_N1D, cache = decoder_lib.decode(model, weights, token_N[:, None], cache, start + i)
        return out_NS, cache, _next_logits(weights, x_N1D, banned_V)

    return jax.lax.fori_loop(0, count, body, (out_NS, cache, logits_NV))[0]


def _bucket(length: int, limit: int) -> int:
    """The next power of two, or one and a half of one, at least 16: few shapes are compiled."""
    power = max(16, 1 << (length - 1).bit_length())
    return min(limit, power * 3 // 4 if power > 16 and length <= power * 3 // 4 else power)


def window_start(length: int, context_length: int) -> int:
    """Returns from which token on a text of `length` tokens conditions the next one.

    All of it while it fits; then the last half context, so that half a context can be written
    before the window moves again (learned positions do not allow it to slide).
    """
    return 0 if length < context_length else length - max(1, context_length // 2)


def generate(
    decoder: Decoder,
    prompt: np.ndarray,
    max_new_tokens: int,
    num_samples: int,
    sampling: Sampling,
    seed: int,
    banned: np.ndarray,
) -> np.ndarray:
    """Returns int32 [N, max_new_tokens]: continuations of one prompt.

    Args:
      decoder: of a model.
      prompt: int32 [T], at least one token; its end counts where it exceeds the context.
      max_new_tokens: may exceed the context (see `window_start`).
      num_samples: N.
      sampling: how tokens are drawn.
      seed: of the draws.
      banned: bool [V], tokens never drawn.
    """
    require(-(2**63) <= seed < 2**63, f"`seed`={seed}: must be a number of 64 bits")
    key = jax.random.key(seed)
    numbers = (
        jnp.float32(sampling.temperature),
        jnp.int32(min(sampling.top_k, len(banned))),
        jnp.float32(sampling.top_p),
    )
    context = decoder.model.config.context_length
    texts = prompt[None].astype(np.int32)
    done = 0
    while done < max_new_tokens:
        window = texts[:, window_start(texts.shape[1], context) :]
        length = window.shape[1]
        count = min(max_new_tokens - done, context - length)
        padded = np.zeros((window.shape[0], _bucket(length, context)), np.int32)
        padded[:, :length] = window
        cache, logits = _prefill(
            decoder.model, decoder.weights, padded, length, banned, num_samples,
            _bucket(length + count, context),
        )  # fmt: skip
        out = _decode(
            decoder.model, decoder.weights, cache, logits, banned, jnp.int32(length),
            jnp.int32(count), jnp.int32(done), key, numbers,
        )  # fmt: skip
        texts = np.repeat(texts, num_samples // texts.shape[0], axis=0)
        texts = np.concatenate([texts, np.asarray(out)[:, :count]], axis=1)
        done += count
    return np.broadcast_to(texts, (num_samples, texts.shape[1]))[:, len(prompt) :]
