"""The decoder's weights, prepared for the generation of one token at a time.

The time to generate a token is the time to read all weights from memory: the arithmetic is small.
Before the first token the weights are therefore converted to the layout that is read fastest,
`gptjax.model.gpt.KernelLayout.DECODING`.

Letters of shapes, besides those of `gptjax.batch`: N sequences.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from gptjax import mesh
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
