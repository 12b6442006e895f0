"""Text from a prompt, one token at a time, with a cache of keys and values.

The prompt runs through the decoder once and fills the cache. Each new token then runs alone: it
attends to the cache, and its own key and value are added.

The time to generate a token is the time to read all weights from memory: the arithmetic is small.
Before the first token the weights are therefore converted to the layout that is read fastest,
`gptjax.model.gpt.KernelLayout.DECODING`.

Letters of shapes, besides those of `gptjax.batch`: N sequences (samples of a prompt).
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
Caches = tuple[Cache, ...]
"""Keys and values of each layer, [N * H, S, K]."""


@flax.struct.dataclass
class Decoder:
    """A model and its prepared weights; `prepare` makes one.

    Attributes:
      model: its task head is not used.
      embeddings: the embedding tables by their parameter names, float32.
      layers: the parameters of each block, from `gptjax.model.gpt.decoding_layers`.
      lm_rows_VD: the kernel of the LM head, in the compute dtype.
      lm_bias_V: the bias of the LM head, float32; None where the head has none.
    """

    model: GPT = flax.struct.field(pytree_node=False)
    embeddings: Params
    layers: tuple[Params, ...]
    lm_rows_VD: Array
    lm_bias_V: Array | None

    def new_cache(self, num_sequences: int, entries: int) -> Caches:
        """Returns an empty cache for `num_sequences` sequences of up to `entries` tokens."""
        config = self.model.config
        # A CPU converts bfloat16 to float32 one number at a time. Float32 holds the same numbers.
        on_cpu = mesh.platform(self.model.mesh) == "cpu"
        dtype = jnp.float32 if on_cpu else config.dtype
        empty = jnp.zeros((num_sequences * config.num_heads, entries, config.head_width), dtype)
        return tuple({"key": empty, "value": empty} for _ in range(config.num_layers))

    def states(self, tokens_NT: Array, cache: Caches, offset: Array | int) -> tuple[Array, Caches]:
        """Returns the last block's states [N, T, D] of new tokens, and the cache with them.

        Args:
          tokens_NT: int32, the tokens at the positions offset, ..., offset + T - 1.
          cache: keys and values of the positions below `offset`.
          offset: int32 scalar.
        """
        return run(
            self.model, self.embeddings, tokens_NT, self.layers, cache, offset, method="decode"
        )

    def lm_logits(self, x_NTD: Array) -> Array:
        """Returns the logits of the token after each state, float32 [N, T, V]."""
        logits_NTV = matmul.matmul_transposed(x_NTD, self.lm_rows_VD, 1)
        return logits_NTV if self.lm_bias_V is None else logits_NTV + self.lm_bias_V[None, None]


@functools.partial(jax.jit, static_argnames=("model",))
def prepare(model: GPT, params: Params) -> Decoder:
    """Returns the decoder of a model with a prepared copy of its parameters.

    Args:
      model: with or without a task head.
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


# At this temperature all tokens are equally likely; beyond 3.4e38 float32 would overflow.
_MAX_TEMPERATURE = 1e30


@flax.struct.dataclass
class Sampler:
    """The rule by which the next token is drawn: arrays, so that no value needs a new compilation.

    Attributes:
      temperature, top_p: float32 scalars.
      top_k: int32 scalar.
      banned_V: bool, tokens that are never drawn.
      key: of the random numbers; the draw number i uses `fold_in(key, i)`.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    banned_V: Array
    key: Array


def make_sampler(
    banned: np.ndarray, seed: int = 0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Sampler:
    """Returns a rule by which tokens are drawn.

    >>> make_sampler(np.zeros(9, bool), top_p=2)
    Traceback (most recent call last):
    gptjax.errors.UserError: `top_p`=2: must be above 0 and at most 1

    Args:
      banned: bool [V], tokens that are never drawn.
      seed: equal seeds give equal draws.
      temperature: divides the logits; 0 stands for the most likely token, always.
      top_k: draw among the `top_k` most likely tokens; 0 stands for all tokens.
      top_p: draw among the fewest most likely tokens whose probabilities add up to `top_p`.

    Raises:
      UserError: a number is out of its range.
    """
    require(
        0 <= temperature <= _MAX_TEMPERATURE,
        f"`temperature`={temperature}: must be 0 to {_MAX_TEMPERATURE:g}",
    )
    require(top_k >= 0, f"`top_k`={top_k}: must not be negative")
    require(0 < top_p <= 1, f"`top_p`={top_p}: must be above 0 and at most 1")
    require(-(2**63) <= seed < 2**63, f"`seed`={seed}: must be a number of 64 bits")
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
      cache: keys and values of the tokens of the window so far.
      logits_NV: float32, logits of the next token; -inf for banned tokens.
      position: int32 scalar, position of the next token in the window.
      num_drawn: int32 scalar, number of tokens drawn so far, in all windows.
    """

    cache: Caches
    logits_NV: Array
    position: Array
    num_drawn: Array


def filtered(logits_NV: Array, sampler: Sampler) -> Array:
    """Returns the logits over the temperature, -inf for tokens outside of top_k or top_p.

    Of tokens with equal logits all stay or none: at the edge there may be more than `top_k`.
    """
    logits_NV = _tempered(logits_NV, sampler.temperature)
    descending_NV = -jnp.sort(-logits_NV, axis=-1)
    size, top_k = logits_NV.shape[-1], sampler.top_k
    last = jnp.where(top_k > 0, jnp.minimum(top_k, size), size) - 1
    floor_N1 = jax.lax.dynamic_slice_in_dim(descending_NV, last, 1, axis=-1)
    probabilities_NV = jax.nn.softmax(jnp.where(descending_NV < floor_N1, -jnp.inf, descending_NV))
    before_NV = jnp.cumsum(probabilities_NV, axis=-1) - probabilities_NV
    # The rounded sum of the probabilities may reach 1 before the last token, which top_p = 1 must
    # not exclude.
    inside_NV = (before_NV < sampler.top_p) | (sampler.top_p >= 1)
    kept_NV = inside_NV & (descending_NV >= floor_N1)
    floor_N1 = jnp.where(kept_NV, descending_NV, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits_NV < floor_N1, -jnp.inf, logits_NV)


def _tempered(logits_NV: Array, temperature: Array) -> Array:
    return logits_NV / jnp.maximum(temperature, 1e-6)


def draw(logits_NV: Array, key: Array, sampler: Sampler) -> Array:
    """Returns the next token of each sample, int32 [N].

    Args:
      logits_NV: float32.
      key: of this draw.
      sampler: its own key is not used.
    """

    def sampled() -> Array:
        # Without a filter nothing is sorted: on a CPU the sort takes longer than a small model.
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
    """Runs a prompt, or the end of a longer text, through the decoder.

    Args:
      decoder: the model.
      sampler: only its banned tokens are used.
      tokens_NT: int32, padded at the end: one row for all samples, or a row for each.
      length: int32 scalar, number of tokens before the padding.
      samples: their number, a multiple of the rows of `tokens_NT`.
      entries: S of the cache, at least T.

    Returns:
      The cache, and the logits of the next token of each sample.
    """
    rows = tokens_NT.shape[0]
    cache = decoder.new_cache(rows, entries)
    x_NTD, cache = decoder.states(tokens_NT, cache, 0)
    # The padding writes to the cache too. Later tokens overwrite those entries before any query
    # may attend to them.
    x_N1D = jax.lax.dynamic_slice_in_dim(x_NTD, length - 1, 1, axis=1)
    logits_NV = _next_logits(decoder, x_N1D, sampler.banned_V)

    def repeated(x: Array) -> Array:
        """Repeats each row; the leading axis of a cache holds the heads of a row together."""
        x = jnp.repeat(x.reshape(rows, -1, *x.shape[1:]), samples // rows, axis=0)
        return x.reshape(-1, *x.shape[2:])

    return jax.tree.map(repeated, (cache, logits_NV))


@jax.jit
def _decode(decoder: Decoder, sampler: Sampler, state: DecodingState, count: Array) -> Array:
    """Draws `count` tokens; returns int32 [N, S], of which the first `count` columns are valid.

    One compiled loop serves all prompts, counts and samplings whose cache has S entries.
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
    """Returns a size of at least `length`: 16 or more, a power of two or 3/4 of one.

    Few different sizes mean few compilations.

    >>> [_bucket(length, 512) for length in (5, 17, 25, 33, 500)]
    [16, 24, 32, 48, 512]

    Args:
      length: number of tokens, at most `limit`.
      limit: the largest size.
    """
    power = max(16, 1 << (length - 1).bit_length())
    return min(limit, power * 3 // 4 if power > 16 and length <= power * 3 // 4 else power)


def window_start(length: int, context_length: int) -> int:
    """Returns the index of the first token of a text that conditions the next token.

    The whole text does while it fits into the context. From then on it is the last half context,
    so that half a context can be written before the window moves again. The window cannot move by
    one token, because each token would get another learned position.

    >>> [window_start(length, context_length=20) for length in (5, 19, 20, 29)]
    [0, 0, 10, 19]

    Args:
      length: tokens of the text.
      context_length: the model's.
    """
    return 0 if length < context_length else length - max(1, context_length // 2)


def generate(
    decoder: Decoder, prompt: np.ndarray, max_new_tokens: int, num_samples: int, sampler: Sampler
) -> np.ndarray:
    """Returns continuations of one prompt, int32 [num_samples, max_new_tokens].

    Args:
      decoder: from `prepare`.
      prompt: int32 [T], at least one token. If it does not fit into the context, its end is used.
      max_new_tokens: may exceed the context (see `window_start`).
      num_samples: number of continuations.
      sampler: from `make_sampler`.
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
