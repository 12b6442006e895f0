"""Fine-tuning of the upper blocks alone: the embeddings and the first N blocks are frozen.

Frozen parameters keep their values, and frozen blocks have no dropout. So the hidden states after
the frozen blocks are the same in each epoch. They are computed once (`gptjax.train.states`), and
come to the train step as `Batch.hidden`.

The parameter tree is always that of the whole model, with the blocks stacked on one axis of size L.
Therefore every checkpoint is a complete model in the usual layout. This file cuts the tree:

    lower model    the embeddings and the first N blocks. It computes `Batch.hidden`.
    upper model    the blocks after the first N, and the heads. It starts from `Batch.hidden`. Its
                   parameters include the embeddings, because a tied LM head uses them.
    trained part   the parameters of the upper model without the embeddings. Only they have
                   gradients and an optimizer state.

If N is 0, nothing is frozen. The upper model and the trained part are then the whole model.
"""

import dataclasses
from typing import Any

import jax

from gptjax.mesh import Params
from gptjax.model.gpt import GPT
from gptjax.parameters import BLOCKS, EMBEDDINGS


def lower_model(model: GPT, frozen: int) -> GPT:
    """Returns the model of the embeddings and the first `frozen` blocks, without a task head."""
    config = dataclasses.replace(model.config, num_layers=frozen)
    # An LM head that is not tied would need parameters which the lower model does not have.
    config = dataclasses.replace(config, tied=True)
    return model.clone(config=config, num_outputs=0)


def lower_params(params: Params, frozen: int) -> Params:
    """Returns the parameters of the lower model: the embeddings and the first `frozen` blocks."""
    embeddings = {name: params[name] for name in EMBEDDINGS if name in params}
    return embeddings | {BLOCKS: jax.tree.map(lambda x: x[:frozen], params[BLOCKS])}


def upper_model(model: GPT, frozen: int) -> GPT:
    """Returns the model of the blocks after the first `frozen` blocks, with all heads."""
    layers = model.config.num_layers - frozen
    return model.clone(config=dataclasses.replace(model.config, num_layers=layers))


def upper_params(params: Params, frozen: int) -> Params:
    """Returns the parameters of the upper model.

    If all blocks are frozen, the result has no blocks. (Orbax cannot save arrays of size 0.)
    """
    if not frozen:
        return params
    upper = {name: value for name, value in params.items() if name != BLOCKS}
    blocks = params[BLOCKS]
    if frozen < jax.tree.leaves(blocks)[0].shape[0]:
        upper[BLOCKS] = jax.tree.map(lambda x: x[frozen:], blocks)
    return upper


def trained_part(params: Params, frozen: int) -> Params:
    """Returns the parameters that are trained if the first `frozen` blocks are frozen."""
    if not frozen:
        return params
    upper = upper_params(params, frozen)
    return {name: value for name, value in upper.items() if name not in EMBEDDINGS}


def with_trained_part(params: Params, trained: Params, frozen: int) -> Params:
    """Returns `params` with other values in the part that `trained_part` returns.

    Args:
      params: the parameters of the whole model.
      trained: the new values, in the tree of `trained_part`.
      frozen: the number of frozen blocks.
    """
    if not frozen:
        return trained

    def overwrite(old: jax.Array, new: jax.Array) -> Any:
        # If the old array is donated, the update is made in place, and nothing frozen is copied.
        return jax.lax.dynamic_update_slice_in_dim(old, new, frozen, axis=0)

    whole = params | trained
    whole[BLOCKS] = params[BLOCKS]
    if BLOCKS in trained:
        whole[BLOCKS] = jax.tree.map(overwrite, params[BLOCKS], trained[BLOCKS])
    return whole
