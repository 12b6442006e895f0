"""A look inside the model: named activations, changes to the computation, lens and attribution.

There is one model code. The modules of `gptjax.model.gpt` name their activations with Flax's `sow`,
and nothing is kept unless this file asks for it. The attention is then computed by its definition
(`ops.attention.plain`), so that its scores and weights exist as arrays.

The letters of shapes are defined in `gptjax.batch`. Everything here is about one row, so the
axis B is left out. N is the number of states in the residual stream: the embedding and the output
of each block, so N = L + 1.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.batch import Batch, TokenType
from gptjax.config.schema import AttentionKind, Remat
from gptjax.errors import nearest, require
from gptjax.mesh import Params
from gptjax.model.gpt import CHANGES, GPT, INSIDE, run
from gptjax.parameters import TOKEN_EMBEDDING

AXES = {
    "embedding": "TD", "qkv": "LT3HK", "scores": "LHTS", "attention": "LHTS", "heads": "LTHK",
    "attention_out": "LTD", "norm1": "LTD", "ffn": "LTF", "ffn_out": "LTD", "blocks": "LTD",
    "logits": "TV", "task_logits": "O",
}  # fmt: skip
"""Name of an activation -> its axes, one letter each.

embedding      the sum of the embeddings, which is the input of the first block
qkv            the queries, keys and values, before they are scaled
scores         q k^T / sqrt(K); `ops.attention.plain.HIDDEN_SCORE` where a query does not see a key
attention      the softmax of the scores: what a query takes from each key
heads          the weighted sums of the values, before the output layer of the attention
attention_out  the result of the attention, which is added to the residual stream
norm1          the residual stream after the attention and its layer norm
ffn            the hidden units of the feed-forward layer, after the activation function
ffn_out        the result of the feed-forward layer, which is added to the residual stream
blocks         the output of the block: the residual stream after the second layer norm
logits         the logits of the next token
task_logits    the outputs of the task head; in a multiple choice one for each answer
"""

# Our names of the arrays that the modules keep -> the paths below "blocks" in the collection.
_KEPT = {
    "qkv": ("attention", "kept_qkv"), "scores": ("attention", "kept_scores"),
    "attention": ("attention", "kept_weights"), "heads": ("attention", "kept_heads"),
    "attention_out": ("kept_attention_out",), "norm1": ("kept_norm1",), "ffn": ("kept_ffn",),
    "ffn_out": ("kept_ffn_out",), "blocks": ("kept_block",),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Changes:
    """Changes to the computation of one row. Without arguments nothing is changed."""

    heads_off: Sequence[tuple[int, int]] = ()
    """The heads (layer, head), both from 0, whose result is replaced by 0."""
    hidden_tokens: Sequence[int] = ()
    """The tokens that no other token sees, and that see only themselves. A task head that reads
    the mean of all states leaves them out, and a flattened one reads zeros in their place."""
    states: Mapping[tuple[int, int], np.ndarray] = dataclasses.field(default_factory=dict)
    """(n, token) -> the state [D] that replaces state n of the residual stream at this token. State
    0 is the embedding, and state i is the output of block i, counted from 1."""

    def head_factors(self, model: GPT) -> np.ndarray:
        """Returns the factor of each head, float32 [L, H].

        Raises:
          UserError: a head does not exist.
        """
        layers, heads = model.config.num_layers, model.config.num_heads
        factors_LH = np.ones((layers, heads), np.float32)
        for layer, head in self.heads_off:
            require(
                0 <= layer < layers and 0 <= head < heads,
                f"`heads_off`: there is no head ({layer}, {head}); layers are 0 to {layers - 1}, "
                f"heads 0 to {heads - 1}",
            )
            factors_LH[layer, head] = 0
        return factors_LH

    def batch(self, batch: Batch) -> Batch:
        """Returns a row in which each hidden token is a segment of its own.

        Raises:
          UserError: there is no such token.
        """
        segments_BT = np.array(batch.segment_ids)
        length = segments_BT.shape[1]
        for token in self.hidden_tokens:
            require(
                0 <= token < length,
                f"`hidden_tokens`: there is no token {token}; they are 0 to {length - 1}",
            )
            # A task head of all states finds its sequence by the extract token. Padding inside a
            # sequence sees the tokens before it, but not itself.
            is_extract = batch.extract is not None and token in batch.extract[0]
            is_padding = batch.token_types[0, token] == TokenType.PADDING
            require(
                not (is_extract or is_padding),
                f"`hidden_tokens`: token {token} is {'padding' if is_padding else 'the extract'}; "
                "only other tokens can be hidden",
            )
            segments_BT[0, token] = segments_BT.max() + 1
        return dataclasses.replace(batch, segment_ids=segments_BT)

    def new_states(self, model: GPT, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the new states, float32 [N, B, T, D], and where they are, bool [N, B, T].

        Raises:
          UserError: a state does not exist or has a wrong shape.
        """
        layers, width = model.config.num_layers, model.config.width
        new_NBTD = np.zeros((layers + 1, 1, length, width), np.float32)
        is_new_NBT = np.zeros((layers + 1, 1, length), bool)
        for (n, token), state_D in self.states.items():
            require(
                0 <= n <= layers and 0 <= token < length,
                f"`states`: there is no state ({n}, {token}); states are 0 to {layers}, tokens 0 "
                f"to {length - 1}",
            )
            require(
                np.shape(state_D) == (width,),
                f"`states`: the state ({n}, {token}) must be [{width}], not {np.shape(state_D)}",
            )
            new_NBTD[n, 0, token], is_new_NBT[n, 0, token] = state_D, True
        return new_NBTD, is_new_NBT


def open_model(model: GPT) -> GPT:
    """Returns the model for a look inside: plain attention, nothing recomputed, one device."""
    plain = dataclasses.replace(
        model.config, attention=AttentionKind.PLAIN, remat=Remat.NONE, unroll=1
    )
    return model.clone(config=plain, mesh=None)


def activations(
    model: GPT,
    params: Params,
    batch: Batch,
    keep: Sequence[str] = tuple(AXES),
    changes: Changes = Changes(),
) -> dict[str, np.ndarray]:
    """Returns named activations of one row, as NumPy arrays with the axes of `AXES`.

    Args:
      model: the model, from `open_model`.
      params: the parameters of the model.
      batch: one row. `task_logits` needs `Batch.extract`.
      keep: the names of the activations.
      changes: the changes to the computation.

    Raises:
      UserError: there is no activation of a name, or a change does not fit the row.
    """
    for name in keep:
        require(name in AXES, f"`keep`: there is no {name!r}{nearest(name, AXES)}")
    batch, x_BTD = changes.batch(batch), embed(model, params, batch)
    blocks: dict[str, Any] = {}
    if changes.heads_off:
        blocks["attention"] = {"head_factors": changes.head_factors(model)}
    if changes.states:
        new_NBTD, is_new_NBT = changes.new_states(model, batch.tokens.shape[1])
        x_BTD = jnp.where(is_new_NBT[0][..., None], new_NBTD[0].astype(x_BTD.dtype), x_BTD)
        blocks |= {"states": new_NBTD[1:], "is_changed": is_new_NBT[1:]}
    arrays = {"blocks": blocks} if blocks else {}
    found = _activations(model, params, batch, x_BTD, arrays, tuple(dict.fromkeys(keep)))
    # bfloat16 is not a type of NumPy.
    return {
        name: np.asarray(x, np.float32 if x.dtype == jnp.bfloat16 else x.dtype)
        for name, x in jax.device_get(found).items()
    }


@functools.partial(jax.jit, static_argnames=("model", "keep"))
def _activations(
    model: GPT,
    params: Params,
    batch: Batch,
    x_BTD: jax.Array,
    changes: dict[str, Any],
    keep: tuple[str, ...],
) -> dict[str, jax.Array]:
    variables = {"params": params} | ({CHANGES: changes} if changes else {})
    last_BTD, collections = model.apply(
        variables, x_BTD, batch.segment_ids, batch.token_types, method="apply_blocks",
        mutable=[INSIDE],
    )  # fmt: skip
    found: dict[str, jax.Array] = {"embedding": x_BTD[0]}
    kept = collections.get(INSIDE, {}).get("blocks", {})
    for name, path in _KEPT.items():
        if name in keep:
            found[name] = functools.reduce(dict.__getitem__, path, kept)[:, 0]
    if "logits" in keep:
        found["logits"] = run(model, params, last_BTD, method="lm_logits")[0]
    if "task_logits" in keep:
        found["task_logits"] = _task_logits(model, params, last_BTD, batch)
    return {name: found[name] for name in keep}


def _task_logits(model: GPT, params: Params, x_BTD: jax.Array, batch: Batch) -> jax.Array:
    """Returns the outputs of the task head for the first example of the row, float32 [O] or [C]."""
    if model.head_length is not None:
        # A hidden token is a segment of its own. A flattened head reads zeros in its place.
        own = batch.segment_ids[0, batch.extract[0, 0, 0]]
        x_BTD = jnp.where((batch.segment_ids == own)[..., None], x_BTD, 0)
    logits = run(
        model, params, x_BTD, batch.segment_ids, batch.extract, True, batch.candidate_mask,
        method="task_logits",
    )  # fmt: skip
    return logits[0, 0]


@functools.partial(jax.jit, static_argnames="model")
def embed(model: GPT, params: Params, batch: Batch) -> jax.Array:
    """Returns the input of the first block, [B, T, D] in the compute dtype."""
    ids = batch.tokens, batch.positions, batch.token_types
    x_BTD: jax.Array = run(model, params, *ids, True, method="_embed")
    return x_BTD


@functools.partial(jax.jit, static_argnames="model")
def lm_lens(model: GPT, params: Params, states_NTD: jax.Array) -> jax.Array:
    """Returns the logits if the LM head read each state of the residual stream, float32 [N, T, V].

    The lens is from nostalgebraist 2020, "interpreting GPT: the logit lens". In a post-LN model
    every state is the result of a layer norm, so no other norm is applied. The head was trained for
    the last state alone, so the lens of the others is an approximation.
    """
    return run(model, params, states_NTD, method="lm_logits")


@functools.partial(jax.jit, static_argnames="model")
def lm_normaliser(model: GPT, params: Params, states_NTD: jax.Array) -> jax.Array:
    """Returns the logarithm of the sum of the exponentials of all logits, float32 [N, T].

    A logit minus this number is a log probability. With `ModelConfig.one_matrix` the softmax of
    the LM head has outputs for positions too, which `lm_lens` does not return.
    """
    if not model.config.one_matrix:
        return jax.nn.logsumexp(lm_lens(model, params, states_NTD), axis=-1)
    table = run(model, params, method="lm_projection").table_VD.astype(model.config.dtype)
    return jax.nn.logsumexp(model.ops.logits(states_NTD, table), axis=-1)


@functools.partial(jax.jit, static_argnames="model")
def task_lens(model: GPT, params: Params, states_NTD: jax.Array, batch: Batch) -> jax.Array:
    """Returns the outputs if the task head read each state, float32 [N, O] (or [N, C])."""
    return jax.vmap(lambda x_TD: _task_logits(model, params, x_TD[None], batch))(states_NTD)


@dataclasses.dataclass(frozen=True)
class Attribution:
    """Three estimates of the part of each token in one output of the task head, each [T].

    A token that is not in the text has the value 0.
    """

    integrated_gradients: np.ndarray
    gradient_x_input: np.ndarray
    leave_one_out: np.ndarray
    """The output minus the output if the token is hidden (`Changes.hidden_tokens`)."""
    difference: float
    """The output for the text minus the output for the baseline."""
    steps: int
    """The number of points on the path of the integrated gradients."""

    @property
    def error(self) -> float:
        """The completeness error: the sum of the integrated gradients minus `difference`."""
        return float(self.integrated_gradients.sum()) - self.difference


# The points of the path are doubled until the completeness error is below this part of the
# difference, or there are so many points.
_COMPLETE, _FIRST_STEPS, _MOST_STEPS = 0.005, 14, 112
# The number of tokens that are computed at once.
_TOKENS_AT_ONCE = 2048


def attribution(
    model: GPT, params: Params, batch: Batch, output: int, is_text: np.ndarray
) -> Attribution:
    """Attributes one output of the task head to the tokens of a text.

    Integrated gradients (Sundararajan et al. 2017) follow the straight line from a baseline to the
    embedding. In the baseline the tokens of the text have no token embedding, only their position
    (and segment) embeddings. The special tokens stay, because a sequence without them is none. The
    integral is computed by Gauss-Legendre quadrature.

    Args:
      model: the model, from `open_model`.
      params: the parameters of the model.
      batch: one row with one example.
      output: the index of the output.
      is_text: bool [T], the tokens of the text.
    """
    x_TD = np.asarray(embed(model, params, batch)[0], np.float32)
    rows_TD = np.asarray(params[TOKEN_EMBEDDING], np.float32)[batch.tokens[0]]
    part_TD = np.where(is_text[:, None], rows_TD, 0)

    steps = _FIRST_STEPS
    while True:
        places, weights = np.polynomial.legendre.leggauss(steps)
        points = np.concatenate([[0.0, 1.0], (places + 1) / 2])
        states_PTD = x_TD + (points - 1).astype(np.float32)[:, None, None] * part_TD
        segments_PT = np.repeat(batch.segment_ids, len(points), axis=0)
        values, gradients_PTD = _at(model, params, batch, output, states_PTD, segments_PT, True)
        baseline, whole = float(values[0]), float(values[1])
        gradient_TD = np.tensordot(weights / 2, gradients_PTD[2:], axes=1)
        integrated_T = (part_TD * gradient_TD).sum(axis=1)
        error = abs(integrated_T.sum() - (whole - baseline))
        if steps >= _MOST_STEPS or error <= _COMPLETE * abs(whole - baseline):
            break
        steps *= 2
    left_out_T = np.zeros(len(x_TD))
    if (texts := np.flatnonzero(is_text)).size:
        # In row i, text token i is a segment of its own, as in `Changes.batch`.
        segments_PT = np.repeat(batch.segment_ids, len(texts), axis=0)
        segments_PT[np.arange(len(texts)), texts] = segments_PT.max() + 1
        same_PTD = np.broadcast_to(x_TD, (len(texts), *x_TD.shape))
        (without,) = _at(model, params, batch, output, same_PTD, segments_PT, False)
        left_out_T[texts] = whole - without
    last_T = (part_TD * gradients_PTD[1]).sum(axis=1)
    return Attribution(integrated_T, last_T, left_out_T, whole - baseline, steps)


def _at(
    model: GPT,
    params: Params,
    batch: Batch,
    output: int,
    states_PTD: np.ndarray,
    segments_PT: np.ndarray,
    gradients: bool,
) -> tuple[np.ndarray, ...]:
    """Returns an output of the task head for P embeddings, in parts of a size for the memory.

    Args:
      model, params, batch, output: as in `attribution`.
      states_PTD: the embeddings.
      segments_PT: the segment ids that belong to them.
      gradients: whether the result has the gradients too.

    Returns:
      The outputs [P] and, if wanted, their gradients with respect to the embeddings [P, T, D].
    """
    count, length = segments_PT.shape
    size = min(16, max(1, _TOKENS_AT_ONCE // length))
    found = []
    for start in range(0, count, size):
        # The last part repeats the last row until it has the same size, so one program suffices.
        index = np.minimum(np.arange(start, start + size), count - 1)
        rows = states_PTD[index], segments_PT[index]
        found.append(jax.device_get(_jit_at(model, params, batch, output, *rows, gradients)))
    return tuple(np.concatenate(parts)[:count] for parts in zip(*found, strict=True))


@functools.partial(jax.jit, static_argnames=("model", "gradients"))
def _jit_at(
    model: GPT,
    params: Params,
    batch: Batch,
    output: jax.Array,
    states_PTD: jax.Array,
    segments_PT: jax.Array,
    gradients: bool,
) -> tuple[jax.Array, ...]:
    def value(x_TD: jax.Array, segments_T: jax.Array) -> jax.Array:
        each = dataclasses.replace(batch, segment_ids=segments_T[None])
        x_BTD = run(
            model, params, x_TD[None].astype(model.config.dtype), each.segment_ids,
            each.token_types, method="apply_blocks",
        )  # fmt: skip
        return _task_logits(model, params, x_BTD, each)[output]

    if gradients:
        return jax.vmap(jax.value_and_grad(value))(states_PTD, segments_PT)
    return (jax.vmap(value)(states_PTD, segments_PT),)
