"""Vectors of texts: the states that a task head reads, or the mean state of a language model.

The letters of shapes are defined in `gptjax.batch`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax.batch import Batch
from gptjax.data import loader
from gptjax.data.packing import Packer
from gptjax.data.tasks import Examples
from gptjax.errors import require
from gptjax.mesh import Params
from gptjax.model.gpt import GPT, run

# The number of texts of a language model that are computed at once.
_ROWS = 32


def of_examples(
    model: GPT, params: Params, examples: Examples, packer: Packer, mesh: Mesh
) -> np.ndarray:
    """Returns what the task head reads of each example, float32 [n, D].

    In a multiple choice it is [n, C, D]. With a flattened task head it is [n, S, D], where S is the
    number of states that the head reads.
    """
    found: np.ndarray | None = None
    for batch, index in loader.every_example(examples, packer):
        states = np.asarray(_head_states(model, params, mesh_lib.to_devices(batch, mesh)))
        if found is None:
            found = np.zeros((len(examples), *states.shape[2:]), np.float32)
        found[index[index >= 0]] = states[index >= 0]
    assert found is not None, "there are examples"
    return found[:, 0] if found.shape[1] == 1 else found


@functools.partial(jax.jit, static_argnames="model")
def _head_states(model: GPT, params: Params, batch: Batch) -> jax.Array:
    ids = (batch.tokens, batch.segment_ids, batch.positions, batch.token_types)
    x_BTD = run(model, params, *ids, method="hidden")
    places = (batch.segment_ids, batch.extract, batch.candidate_mask)
    found: jax.Array = run(model, params, x_BTD, *places, method="head_states")
    return found


def of_texts(
    model: GPT, params: Params, texts: Sequence[np.ndarray], context_length: int
) -> np.ndarray:
    """Returns the mean of the last states of each text, float32 [n, D].

    Args:
      model: the language model.
      params: the parameters of the model.
      texts: the token ids of each text, integers [length].
      context_length: the largest number of tokens of a text.

    Raises:
      UserError: a text has no tokens, or more than the context.
    """
    for number, ids in enumerate(texts, 1):
        require(len(ids), f"`rows`: text {number} has no tokens")
        require(
            len(ids) <= context_length,
            f"`rows`: text {number} has {len(ids)} tokens, and the context of the model has "
            f"{context_length}; shorten it",
        )
    longest = max(map(len, texts), default=1)
    found = []
    for start in range(0, len(texts), _ROWS):
        part = list(texts[start : start + _ROWS])
        batch = loader.lm_batch(part, longest, _ROWS)
        found.append(np.asarray(_mean_states(model, params, batch))[: len(part)])
    return np.concatenate(found) if found else np.zeros((0, model.config.width), np.float32)


@functools.partial(jax.jit, static_argnames="model")
def _mean_states(model: GPT, params: Params, batch: Batch) -> jax.Array:
    ids = (batch.tokens, batch.segment_ids, batch.positions, batch.token_types)
    x_BTD = run(model, params, *ids, method="hidden").astype(jnp.float32)
    is_text_BT1 = (batch.segment_ids > 0).astype(jnp.float32)[..., None]
    return (x_BTD * is_text_BT1).sum(axis=1) / jnp.maximum(is_text_BT1.sum(axis=1), 1.0)
