"""The decoder with its weights ready for one token at a time.

A token reads every weight once, and hardly does more: so they are cast to the compute dtype before
the loop and not in it, cut into layers, and transposed, the layout in which a CPU reads them
fastest.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config.schema import ModelConfig
from gptjax.model.gpt import GPT, Layers, Params, run
from gptjax.ops import matmul
from gptjax.ops.attention import Cache

Array = jax.Array
Caches = tuple[Cache, ...]


class Weights(NamedTuple):
    """Of a decoder."""

    embeddings: Params
    layers: Layers
    rows_VD: Array
    """Of the LM head, in the compute dtype."""
    bias_V: Array | None


def _layer(tree: Params, index: int, dtype: str) -> tuple[Params, Params]:
    """Returns the parameters of a layer, and its kernels as `model.Linear` takes them."""
    params: Params = {}
    prepared: Params = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            params[name], prepared[name] = _layer(value, index, dtype)
        elif name == "kernel":
            inputs = value.ndim - tree["bias"].ndim
            to = range(-inputs, 0)
            prepared[name] = jnp.moveaxis(value[index].astype(dtype), range(inputs), to)
        else:
            params[name] = value[index]
    return params, prepared


@functools.partial(jax.jit, static_argnames=("model",))
def _prepare(model: GPT, params: Params) -> Weights:
    layers = []
    for index in range(model.config.num_layers):
        own, prepared = _layer(params["blocks"], index, model.config.dtype)
        layers.append({"params": own, "prepared": prepared})
    rows, bias = run(model, params, method="lm_projection")
    embeddings = {name: value for name, value in params.items() if name.endswith("_embedding")}
    rows_VD = rows[: model.config.vocab_size].astype(model.config.dtype)
    return Weights(embeddings, tuple(layers), rows_VD, bias)


def decode(
    model: GPT, weights: Weights, tokens_BT: Array, cache: Caches, offset: Array | int
) -> tuple[Array, Caches]:
    """See `GPT.decode`."""
    return run(model, weights.embeddings, tokens_BT, weights.layers, cache, offset, method="decode")


def lm_logits(weights: Weights, x_BTD: Array) -> Array:
    """Returns float32 [B, T, V]: logits of the token after each state."""
    logits_BTV = matmul.times_transposed(x_BTD, weights.rows_VD, 1)
    return logits_BTV if weights.bias_V is None else logits_BTV + weights.bias_V[None, None]


def new_cache(config: ModelConfig, batch: int, length: int, dtype: Any) -> Caches:
    """Returns an empty cache: of each layer key and value [B * H, S, K], S = length."""
    empty = jnp.zeros((batch * config.num_heads, length, config.head_width), dtype)
    return tuple({"key": empty, "value": empty} for _ in range(config.num_layers))


class Decoder:
    """A model for generation: its module and a copy of its weights."""

    def __init__(self, model: GPT, params: Params):
        """Args: model: with any head, which is not used; params: its parameters."""
        self.model = model
        self.weights = _prepare(model, params)
