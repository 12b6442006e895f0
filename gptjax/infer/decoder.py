"""The decoder's weights, prepared for the generation of one token at a time.

The time to generate a token is the time to read all weights from memory: the arithmetic is small.
Before the first token the weights are therefore cast to the compute dtype, split into layers, and
transposed, which is the layout that a CPU reads fastest.

Letters of shapes: N sequences, T tokens, D width, V vocabulary, S cache entries, H heads, K width
of a head.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from gptjax import mesh
from gptjax.mesh import Params
from gptjax.model.gpt import GPT, Layers, run
from gptjax.ops import matmul
from gptjax.ops.attention import Cache

Array = jax.Array
Caches = tuple[Cache, ...]
"""Keys and values of each layer, [N * H, S, K]."""


@flax.struct.dataclass
class Decoder:
    """A model and its prepared weights; `prepare` makes one.

    Attributes:
      model: its task head is not used.
      embeddings: the embedding tables by their parameter names, float32.
      layers: the variables of each block, kernels transposed and in the compute dtype.
      lm_rows_VD: the kernel of the LM head, in the compute dtype.
      lm_bias_V: the bias of the LM head, float32; None where the head has none.
    """

    model: GPT = flax.struct.field(pytree_node=False)
    embeddings: Params
    layers: Layers
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
        logits_NTV = matmul.times_transposed(x_NTD, self.lm_rows_VD, 1)
        return logits_NTV if self.lm_bias_V is None else logits_NTV + self.lm_bias_V[None, None]


@functools.partial(jax.jit, static_argnames=("model",))
def prepare(model: GPT, params: Params) -> Decoder:
    """Returns the decoder of a model with a prepared copy of its parameters.

    Args:
      model: with or without a task head.
      params: the parameters of the model.
    """
    layers = []
    for index in range(model.config.num_layers):
        own, prepared = _layer(params["blocks"], index, model.config.dtype)
        layers.append({"params": own, "prepared": prepared})
    rows, bias_V = run(model, params, method="lm_projection")
    embeddings = {name: value for name, value in params.items() if name.endswith("_embedding")}
    rows_VD = rows[: model.config.vocab_size].astype(model.config.dtype)
    return Decoder(model, embeddings, tuple(layers), rows_VD, bias_V)


def _layer(tree: Params, index: int, dtype: str) -> tuple[Params, Params]:
    """Returns one layer's parameters without the kernels, and its kernels for `model.Linear`."""
    params: Params = {}
    prepared: Params = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            params[name], prepared[name] = _layer(value, index, dtype)
        elif name == "kernel":
            num_inputs = value.ndim - tree["bias"].ndim
            to = range(-num_inputs, 0)
            prepared[name] = jnp.moveaxis(value[index].astype(dtype), range(num_inputs), to)
        else:
            params[name] = value[index]
    return params, prepared
