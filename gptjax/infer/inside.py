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
from collections.abc import Iterator, Mapping, Sequence
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
    the mean of all states leaves them out."""
    states: Mapping[tuple[int, int], np.ndarray] = dataclasses.field(default_factory=dict)
    """(n, token) -> the state [D] that replaces state n of the residual stream at this token. State
    0 is the embedding, and state i is the output of block i, counted from 1."""

    def arrays(self, model: GPT, length: int) -> dict[str, Any]:
        """Returns the changes to the blocks, as the collection `CHANGES` for `length` tokens.

        Raises:
          UserError: a head or a state does not exist, or a state has a wrong shape.
        """
        layers, heads = model.config.num_layers, model.config.num_heads
        for layer, head in self.heads_off:
            require(
                0 <= layer < layers and 0 <= head < heads,
                f"`heads_off`: there is no head ({layer}, {head}); layers are 0 to {layers - 1}, "
                f"heads 0 to {heads - 1}",
            )
        found: dict[str, Any] = {}
        if self.heads_off:
            factors_LH = np.ones((layers, heads), np.float32)
            factors_LH[tuple(np.array(self.heads_off).T)] = 0
            found["attention"] = {"head_factors": factors_LH}
        if any(n for n, _ in self.states):
            found |= self._states(model, length)
        return {"blocks": found} if found else {}

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

    def embedding(self, x_BTD: np.ndarray) -> np.ndarray:
        """Returns the embedding of a row with the states (0, token) replaced."""
        changed = np.array(x_BTD)
        for (n, token), state_D in self.states.items():
            if n == 0:
                changed[0, token] = state_D
        return changed

    def _states(self, model: GPT, length: int) -> dict[str, np.ndarray]:
        layers, width = model.config.num_layers, model.config.width
        new_LBTD = np.zeros((layers, 1, length, width), np.float32)
        is_new_LBT = np.zeros((layers, 1, length), bool)
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
            if n:
                new_LBTD[n - 1, 0, token], is_new_LBT[n - 1, 0, token] = state_D, True
        return {"states": new_LBTD, "is_changed": is_new_LBT}


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
    length, batch = batch.tokens.shape[1], changes.batch(batch)
    x_BTD = embed(model, params, batch)
    arrays = changes.arrays(model, length)
    if any(n == 0 for n, _ in changes.states):
        changes._states(model, length)  # it raises for wrong states
        x_BTD = jnp.asarray(changes.embedding(np.asarray(x_BTD, np.float32)), x_BTD.dtype)
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
def task_lens(model: GPT, params: Params, states_NTD: jax.Array, batch: Batch) -> jax.Array:
    """Returns the outputs if the task head read each state, float32 [N, O] (or [N, C])."""
    return jax.vmap(lambda x_TD: _task_logits(model, params, x_TD[None], batch))(states_NTD)


@dataclasses.dataclass(frozen=True)
class Attribution:
    """What each token adds to one output of the task head, by three methods. All are [T].

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
        values, gradients_PTD = _outputs(model, params, batch, output, states_PTD)
        baseline, whole = float(values[0]), float(values[1])
        gradient_TD = np.tensordot(weights / 2, gradients_PTD[2:], axes=1)
        integrated_T = (part_TD * gradient_TD).sum(axis=1)
        error = abs(integrated_T.sum() - (whole - baseline))
        if steps >= _MOST_STEPS or error <= _COMPLETE * abs(whole - baseline):
            break
        steps *= 2
    left_out_T = np.zeros(len(x_TD))
    texts = np.flatnonzero(is_text)
    left_out_T[texts] = whole - _without_each(model, params, batch, output, x_TD, texts)
    last_T = (part_TD * gradients_PTD[1]).sum(axis=1)
    return Attribution(integrated_T, last_T, left_out_T, whole - baseline, steps)


def _outputs(
    model: GPT, params: Params, batch: Batch, output: int, states_PTD: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns an output of the task head for P embeddings, [P], and its gradients [P, T, D]."""
    found = [
        jax.device_get(_outputs_and_gradients(model, params, batch, output, part, segments))
        for part, segments in _parts(states_PTD, np.repeat(batch.segment_ids, len(states_PTD), 0))
    ]
    values, gradients = zip(*found, strict=True)
    count = len(states_PTD)
    return np.concatenate(values)[:count], np.concatenate(gradients)[:count]


def _without_each(
    model: GPT, params: Params, batch: Batch, output: int, x_TD: np.ndarray, places: np.ndarray
) -> np.ndarray:
    """Returns the output of the task head with each of these tokens hidden, one at a time."""
    if not len(places):
        return np.zeros(0)
    segments_PT = np.repeat(batch.segment_ids, len(places), axis=0)
    segments_PT[np.arange(len(places)), places] = segments_PT.max() + 1
    states_PTD = np.broadcast_to(x_TD, (len(places), *x_TD.shape))
    found = [
        jax.device_get(_only_outputs(model, params, batch, output, part, segments))
        for part, segments in _parts(states_PTD, segments_PT)
    ]
    return np.concatenate(found)[: len(places)]


def _parts(
    states_PTD: np.ndarray, segments_PT: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields rows in parts of one size, of about `_TOKENS_AT_ONCE` tokens.

    The last part repeats its last row until it has this size, so that one program suffices.
    """
    count, length = segments_PT.shape
    size = min(16, max(1, _TOKENS_AT_ONCE // length))
    for start in range(0, count, size):
        index = np.minimum(np.arange(start, start + size), count - 1)
        yield states_PTD[index], segments_PT[index]


@functools.partial(jax.jit, static_argnames="model")
def _only_outputs(
    model: GPT,
    params: Params,
    batch: Batch,
    output: jax.Array,
    states_PTD: jax.Array,
    segments_PT: jax.Array,
) -> jax.Array:
    """Returns an output of the task head for each row, float32 [P]."""

    def row(x_TD: jax.Array, segments_T: jax.Array) -> jax.Array:
        each = dataclasses.replace(batch, segment_ids=segments_T[None])
        x_BTD = run(
            model, params, x_TD[None].astype(model.config.dtype), each.segment_ids,
            each.token_types, method="apply_blocks",
        )  # fmt: skip
        return _task_logits(model, params, x_BTD, each)[output]

    return jax.vmap(row)(states_PTD, segments_PT)


@functools.partial(jax.jit, static_argnames="model")
def _outputs_and_gradients(
    model: GPT,
    params: Params,
    batch: Batch,
    output: jax.Array,
    states_PTD: jax.Array,
    segments_PT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the outputs [P], and their gradients with respect to the embeddings [P, T, D]."""

    def total(states_PTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = _only_outputs(model, params, batch, output, states_PTD, segments_PT)
        return values.sum(), values

    gradients, values = jax.grad(total, has_aux=True)(states_PTD)
    return values, gradients
