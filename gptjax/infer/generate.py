"""Generation: text from a prompt, one token at a time, with a cache of keys and values.

The prompt runs through the model once and fills the cache. Then each new token runs alone. It
attends to the tokens in the cache, and its own key and value are added to the cache.

Most of the time of a token is spent on reading all parameters from memory. Therefore `prepare`
converts the parameters once to the layout that is read fastest,
`gptjax.model.gpt.KernelLayout.DECODING`.

The window is the part of the text that the model reads, at most its context length. When the window
is full, it moves: the last half of its tokens is run again at the first positions.

In the names of shapes, N is the number of sequences (the samples of a prompt). `gptjax.batch`
explains the other letters.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gptjax import mesh
from gptjax.errors import require
from gptjax.mesh import Params
from gptjax.model.gpt import GPT, decoding_layers, run
from gptjax.ops import matmul
from gptjax.ops.attention import Cache
from gptjax.parameters import PARAMETERS, Role

Array = jax.Array
# The highest temperature. All tokens are equally likely at it. Above 3.4e38 float32 would overflow.
_MAX_TEMPERATURE = 1e30
Caches = tuple[Cache, ...]
"""The keys and values of each layer, [N * H, S, K]. S is the number of entries of the cache."""


@flax.struct.dataclass
class Decoder:
    """A model and its parameters in the layout for generation. The function `prepare` makes one.

    Attributes:
      model: the model. Its task head is not used.
      embeddings: the embedding tables, float32. The keys are the paths of the parameters.
      layers: the parameters of each block, from `gptjax.model.gpt.decoding_layers`.
      lm_rows_VD: the weight matrix of the LM head, in the compute dtype.
      lm_bias_V: the bias of the LM head, float32. None means that the head has no bias.
    """

    model: GPT = flax.struct.field(pytree_node=False)
    embeddings: Params
    layers: tuple[Params, ...]
    lm_rows_VD: Array
    lm_bias_V: Array | None

    def new_cache(self, num_sequences: int, entries: int) -> Caches:
        """Returns an empty cache for `num_sequences` sequences of up to `entries` tokens."""
        config = self.model.config
        # A CPU is slow with bfloat16, because it converts each number to float32 by itself. Float32
        # holds the same numbers exactly.
        on_cpu = mesh.platform(self.model.mesh) == "cpu"
        dtype = jnp.float32 if on_cpu else config.dtype
        empty = jnp.zeros((num_sequences * config.num_heads, entries, config.head_width), dtype)
        return tuple({"key": empty, "value": empty} for _ in range(config.num_layers))

    def states(self, tokens_NT: Array, cache: Caches, offset: Array | int) -> tuple[Array, Caches]:
        """Returns the hidden states of new tokens, and the cache with their keys and values.

        The hidden states [N, T, D] are the output of the last block.

        Args:
          tokens_NT: int32, the tokens at the positions offset, ..., offset + T - 1.
          cache: the keys and values of the positions below `offset`.
          offset: int32 scalar, the position of the first new token.
        """
        return run(
            self.model, self.embeddings, tokens_NT, self.layers, cache, offset, method="decode"
        )

    def lm_logits(self, x_NTD: Array) -> Array:
        """Returns for each hidden state the logits of the next token, float32 [N, T, V]."""
        logits_NTV = matmul.matmul_transposed(x_NTD, self.lm_rows_VD, 1)
        return logits_NTV if self.lm_bias_V is None else logits_NTV + self.lm_bias_V[None, None]


@functools.partial(jax.jit, static_argnames=("model",))
def prepare(model: GPT, params: Params) -> Decoder:
    """Returns the `Decoder` of a model, with a copy of its parameters in the layout for generation.

    Args:
      model: a model with or without a task head.
      params: the parameters of the model.
    """
    layers = decoding_layers(params, model.config)
    head = run(model, params, method="lm_projection")
    embeddings = {
        path: params[path]
        for path, parameter in PARAMETERS.items()
        if parameter.role == Role.EMBEDDING and path in params
    }
    rows_VD = head.table_VD[: model.config.vocab_size].astype(model.config.dtype)
    return Decoder(model, embeddings, layers, rows_VD, head.bias_V)


@flax.struct.dataclass
class Sampler:
    """The rule for drawing the next token.

    All fields are arrays, so other values need no new compilation. `make_sampler` explains them.

    Attributes:
      temperature, top_p: float32 scalars.
      top_k: int32 scalar.
      banned_V: bool, true for the tokens that are never drawn.
      key: the random key. Draw number i uses `fold_in(key, i)`.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    banned_V: Array
    key: Array


def make_sampler(
    banned: np.ndarray, seed: int = 0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Sampler:
    """Returns a rule for drawing tokens.

    >>> make_sampler(np.zeros(9, bool), top_p=2)
    Traceback (most recent call last):
    gptjax.errors.UserError: `top_p`=2: must be above 0 and at most 1

    Args:
      banned: bool [V], true for the tokens that are never drawn.
      seed: the seed of the random numbers, 0 to 2**32 - 1. Equal seeds give equal draws.
      temperature: a divisor of the logits. 0 means that the most likely token is always taken.
      top_k: the number of most likely tokens to draw from. 0 means all tokens.
      top_p: a probability. The draw is limited to the smallest set of most likely tokens whose
        probabilities add up to at least `top_p`.

    Raises:
      UserError: a number is out of its range.
    """
    require(
        0 <= temperature <= _MAX_TEMPERATURE,
        f"`temperature`={temperature}: must be 0 to {_MAX_TEMPERATURE:g}",
    )
    require(top_k >= 0, f"`top_k`={top_k}: must not be negative")
    require(0 < top_p <= 1, f"`top_p`={top_p}: must be above 0 and at most 1")
    # JAX keeps only 32 bits of a seed, so larger seeds would repeat the draws of smaller ones.
    require(0 <= seed < 2**32, f"`seed`={seed}: must be 0 to {2**32 - 1}")
    return Sampler(
        temperature=jnp.float32(temperature),
        top_k=jnp.int32(min(top_k, len(banned))),
        top_p=jnp.float32(top_p),
        banned_V=jnp.asarray(banned),
        key=jax.random.key(seed),
    )


@flax.struct.dataclass
class DecodingState:
    """The state of the generation between two tokens.

    Attributes:
      cache: the keys and values of the window's tokens so far.
      logits_NV: float32, the logits of the next token; -inf for banned tokens.
      position: int32 scalar, the position of the next token in the window.
      num_drawn: int32 scalar, the number of tokens drawn so far, in all windows.
    """

    cache: Caches
    logits_NV: Array
    position: Array
    num_drawn: Array


def filtered(logits_NV: Array, sampler: Sampler) -> Array:
    """Returns the logits divided by the temperature, and -inf for tokens outside top_k or top_p.

    Tokens with equal logits are treated alike, so more than `top_k` tokens can remain.
    """
    logits_NV = _tempered(logits_NV, sampler.temperature)
    descending_NV = -jnp.sort(-logits_NV, axis=-1)
    size, top_k = logits_NV.shape[-1], sampler.top_k
    last = jnp.where(top_k > 0, jnp.minimum(top_k, size), size) - 1
    floor_N1 = jax.lax.dynamic_slice_in_dim(descending_NV, last, 1, axis=-1)
    probabilities_NV = jax.nn.softmax(jnp.where(descending_NV < floor_N1, -jnp.inf, descending_NV))
    before_NV = jnp.cumsum(probabilities_NV, axis=-1) - probabilities_NV
    # Because of rounding, the sum of the probabilities can reach 1 before the last token. If top_p
    # is 1, no token must be excluded.
    inside_NV = (before_NV < sampler.top_p) | (sampler.top_p >= 1)
    kept_NV = inside_NV & (descending_NV >= floor_N1)
    floor_N1 = jnp.where(kept_NV, descending_NV, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits_NV < floor_N1, -jnp.inf, logits_NV)


def _tempered(logits_NV: Array, temperature: Array) -> Array:
    return logits_NV / jnp.maximum(temperature, 1e-6)


def draw(logits_NV: Array, key: Array, sampler: Sampler) -> Array:
    """Returns the next token of each sample, int32 [N].

    Args:
      logits_NV: float32, the logits of the next token.
      key: the random key of this draw.
      sampler: the rule. Its own key is not used.
    """

    def sampled() -> Array:
        # Without top_k and top_p the logits are not sorted, because on a CPU the sort takes longer
        # than a small model.
        unfiltered = (sampler.top_k == 0) & (sampler.top_p >= 1)
        kept_NV = jax.lax.cond(
            unfiltered,
            lambda: _tempered(logits_NV, sampler.temperature),
            lambda: filtered(logits_NV, sampler),
        )
        return jax.random.categorical(key, kept_NV)

    greedy = sampler.temperature == 0
    return jax.lax.cond(greedy, lambda: logits_NV.argmax(-1), sampled).astype(jnp.int32)


def _next_logits(decoder: Decoder, x_N1D: Array, banned_V: Array) -> Array:
    return jnp.where(banned_V[None], -jnp.inf, decoder.lm_logits(x_N1D)[:, 0])


@functools.partial(jax.jit, static_argnames=("samples", "entries"))
def _prefill(
    decoder: Decoder, sampler: Sampler, tokens_NT: Array, length: Array, samples: int, entries: int
) -> tuple[Caches, Array]:
    """Runs a prompt, or the last tokens of a longer text, through the model.

    Args:
      decoder: the model.
      sampler: the rule for drawing. Only its banned tokens are used.
      tokens_NT: int32, padded at the end. It has one row for all samples, or a row for each sample.
      length: int32 scalar, the number of tokens before the padding.
      samples: the number of samples, a multiple of the number of rows of `tokens_NT`.
      entries: S, the number of entries of the new cache, at least T.

    Returns:
      The cache and the logits of the next token, both with a row for each sample.
    """
    rows = tokens_NT.shape[0]
    cache = decoder.new_cache(rows, entries)
    x_NTD, cache = decoder.states(tokens_NT, cache, 0)
    # The padding is written to the cache too. New tokens overwrite these entries before any query
    # attends to them.
    x_N1D = jax.lax.dynamic_slice_in_dim(x_NTD, length - 1, 1, axis=1)
    logits_NV = _next_logits(decoder, x_N1D, sampler.banned_V)

    def repeated(x: Array) -> Array:
        """Repeats each row. In a cache, a row is H adjacent entries of the leading axis."""
        x = jnp.repeat(x.reshape(rows, -1, *x.shape[1:]), samples // rows, axis=0)
        return x.reshape(-1, *x.shape[2:])

    return jax.tree.map(repeated, (cache, logits_NV))


@jax.jit
def _decode(decoder: Decoder, sampler: Sampler, state: DecodingState, count: Array) -> Array:
    """Draws `count` tokens; returns int32 [N, S], of which only the first `count` columns are used.

    The loop is compiled once for each N and S, and serves all prompts, counts and samplers.
    """
    entries = state.cache[0]["key"].shape[1]
    out_NS = jnp.zeros((state.logits_NV.shape[0], entries), jnp.int32)

    def body(i: Array, carry: tuple[Array, DecodingState]) -> tuple[Array, DecodingState]:
        out_NS, state = carry
        key = jax.random.fold_in(sampler.key, state.num_drawn)
        token_N1 = draw(state.logits_NV, key, sampler)[:, None]
        out_NS = jax.lax.dynamic_update_slice_in_dim(out_NS, token_N1, i, axis=1)
        x_N1D, cache = decoder.states(token_N1, state.cache, state.position)
        logits_NV = _next_logits(decoder, x_N1D, sampler.banned_V)
        return out_NS, DecodingState(cache, logits_NV, state.position + 1, state.num_drawn + 1)

    return jax.lax.fori_loop(0, count, body, (out_NS, state))[0]


def _bucket(length: int, limit: int) -> int:
    """Returns a size of at least `length` and at least 16, which is 2^n, 3/4 * 2^n or `limit`.

    Few different sizes mean few compilations.

    >>> [_bucket(length, 512) for length in (5, 17, 25, 33, 500)]
    [16, 24, 32, 48, 512]

    Args:
      length: the number of tokens, at most `limit`.
      limit: the largest size.
    """
    power = max(16, 1 << (length - 1).bit_length())
    return min(limit, power * 3 // 4 if power > 16 and length <= power * 3 // 4 else power)


def window_start(length: int, context_length: int) -> int:
    """Returns the index of the first token of a text that the model reads.

    If the text is shorter than the context, the model reads the whole text. Otherwise it reads the
    last context_length / 2 tokens, so that as many new tokens fit before the window must move
    again. Moving the window by one token for each new token would be slow, because all tokens would
    get other positions and the cache could not be used again.

    >>> [window_start(length, context_length=20) for length in (5, 19, 20, 29)]
    [0, 0, 10, 19]

    Args:
      length: the number of tokens of the text.
      context_length: the context length of the model.
    """
    return 0 if length < context_length else length - max(1, context_length // 2)


def generate(
    decoder: Decoder, prompt: np.ndarray, max_new_tokens: int, num_samples: int, sampler: Sampler
) -> np.ndarray:
    """Returns continuations of one prompt, int32 [num_samples, max_new_tokens].

    Args:
      decoder: the model, from `prepare`.
      prompt: int32 [T], at least one token. If the prompt is not shorter than the context, only its
        end is read.
      max_new_tokens: the number of new tokens. It can exceed the context length, because the window
        moves (see `window_start`).
      num_samples: the number of continuations.
      sampler: the rule for drawing, from `make_sampler`.
    """
    context = decoder.model.config.context_length
    texts = prompt[None].astype(np.int32)
    done = 0
    while done < max_new_tokens:
        window = texts[:, window_start(texts.shape[1], context) :]
        length = window.shape[1]
        count = min(max_new_tokens - done, context - length)
        padding = _bucket(length, context) - length
        tokens_NT = jnp.asarray(np.pad(window, ((0, 0), (0, padding))))
        entries = _bucket(length + count, context)
        position = jnp.int32(length)
        cache, logits_NV = _prefill(decoder, sampler, tokens_NT, position, num_samples, entries)
        state = DecodingState(cache, logits_NV, position, jnp.int32(done))
        out = _decode(decoder, sampler, state, jnp.int32(count))
        texts = np.repeat(texts, num_samples // texts.shape[0], axis=0)
        texts = np.concatenate([texts, np.asarray(out)[:, :count]], axis=1)
        done += count
    return np.broadcast_to(texts, (num_samples, texts.shape[1]))[:, len(prompt) :]
