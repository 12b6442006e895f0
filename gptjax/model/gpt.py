"""GPT-1 as pure Flax modules. No other file uses Flax's module system.

The letters of shapes are defined in `gptjax.batch`. The decoder is post-LN: each sublayer computes
x = norm(x + dropout(sublayer(x))), and there is no final layer norm (Radford et al. 2018, sections
3.1 and 4.1). A block is one layer of the decoder. A kernel is the weight matrix of a linear layer,
as in Flax.
"""

import dataclasses
import enum
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax.batch import TokenType
from gptjax.config.schema import Dtype, ModelConfig, Remat, TaskSpec
from gptjax.mesh import Params
from gptjax.ops import activations, attention, dropout, matmul
from gptjax.ops.attention import Cache
from gptjax.ops.attention.inputs import HIDDEN_KEY, AttentionInputs
from gptjax.ops.cross_entropy import LMHeadWeights
from gptjax.ops.dropout import DropoutKey
from gptjax.ops.sharded import ShardedOps
from gptjax.parameters import BLOCKS

Array = jax.Array

Ids = tuple[Array, Array]
"""`query_ids_BT` and `key_ids_BT` of `AttentionInputs`."""
Past = tuple[Cache, Array | int]
"""The keys and values of the earlier tokens, and the position of the first new token."""

INSIDE = "inside"
"""The collection of the activations that are kept (`gptjax.infer.inside`). A call of the model
that does not name this collection as mutable keeps nothing."""
CHANGES = "changes"
"""The collection of the changes that a call makes to the computation (`gptjax.infer.inside`). It is
usually missing, which means no change."""

# The name of the arrays that `remat=dots` stores, which are the results of matrix products.
_MATMUL_RESULT = "matmul_result"


class KernelLayout(enum.Enum):
    """The form in which a `Linear` layer stores its kernel."""

    TRAINING = "training"
    """The parameter "kernel" is float32 [*inputs, *features]. It is cast to the compute dtype at
    each use."""
    DECODING = "decoding"
    """The parameter "transposed_kernel" is [*features, *inputs], in the compute dtype.

    `decoding_layers` makes this parameter. The time for a generated token is mainly the time to
    read every weight once. A cast at each use would take about as long again, and a CPU reads
    transposed kernels fastest."""


def decoding_layers(params: Params, config: ModelConfig) -> tuple[Params, ...]:
    """Returns the parameters of each block, with its kernels in the form `KernelLayout.DECODING`.

    Args:
      params: the parameters of the whole model, in the tree of `init_params`.
      config: the configuration of the model.
    """
    return tuple(
        _decoding_layer(params[BLOCKS], layer, config.dtype) for layer in range(config.num_layers)
    )


def _decoding_layer(stacked: Params, layer: int, dtype: str) -> Params:
    params: Params = {}
    for name, value in stacked.items():
        if isinstance(value, dict):
            params[name] = _decoding_layer(value, layer, dtype)
        elif name == "kernel":
            # The bias has only the feature axes of the kernel. The kernel and the bias also have a
            # leading axis for the layers.
            inputs = value.ndim - stacked["bias"].ndim
            kernel = value[layer].astype(dtype)
            params["transposed_kernel"] = jnp.moveaxis(kernel, range(inputs), range(-inputs, 0))
        else:
            params[name] = value[layer]
    return params


def _like(x: Array, y: Array) -> Array:
    """Adds leading axes of size 1 to `x`, so that it has as many axes as `y`."""
    return x.reshape((1,) * (y.ndim - x.ndim) + x.shape)


class Dropout(nn.Module):
    """Dropout with the masks of `gptjax.ops.dropout`."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Returns `x` with dropout, or `x` itself if `deterministic` is True or the rate is 0."""
        if deterministic or self.rate == 0:
            return x
        bits = dropout.key_bits(self.make_rng("dropout"))
        return dropout.dropout(x, DropoutKey(bits, self.rate))


class Linear(nn.Module):
    """The linear layer x kernel + bias.

    It sums over the last `inputs` axes of x, and the result has the axes `features` instead. The
    factors of the matrix product have the compute dtype, and the sums are float32.
    """

    features: tuple[int, ...]
    inputs: int
    config: ModelConfig
    ops: ShardedOps
    layout: KernelLayout = KernelLayout.TRAINING

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns [..., *features] in the compute dtype."""
        x = x.astype(self.config.dtype)
        shape = x.shape[x.ndim - self.inputs :]
        init = nn.initializers.normal(self.config.init_std)
        # The kernel must be created before the bias, because Flax derives the random key of a
        # parameter from this order. Another order would change the initial values for a seed.
        if self.layout == KernelLayout.DECODING:
            kernel = self.param("transposed_kernel", init, self.features + shape)
            y = matmul.matmul_transposed(x, kernel, len(self.features))
        else:
            kernel = self.param("kernel", init, shape + self.features)
            y = self.ops.linear(x, kernel, self.inputs, "/".join((*self.path, "kernel")))
        bias = self.param("bias", nn.initializers.zeros, self.features)
        return checkpoint_name((y + _like(bias, y)).astype(x.dtype), _MATMUL_RESULT)


class LayerNorm(nn.Module):
    """Layer norm, computed in float32. Epsilon is added inside the square root."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns (x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        variance = jnp.square(y).mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(variance + self.config.layer_norm_epsilon)
        return (y * _like(scale, y) + _like(bias, y)).astype(x.dtype)


class LMHead(nn.Module):
    """An LM head that is not tied to the token embedding: a kernel [V, D] and a bias [V]."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> LMHeadWeights:
        """Returns the weights of the LM head."""
        init = nn.initializers.normal(self.config.init_std)
        kernel = self.param("kernel", init, (self.config.vocab_size, self.config.width))
        bias = self.param("bias", nn.initializers.zeros, (self.config.vocab_size,))
        return LMHeadWeights(kernel, bias)


class _Layer(nn.Module):
    """The base class of `Attention` and `Block`, with the fields and the method of both."""

    config: ModelConfig
    ops: ShardedOps
    max_sequence_length: int | None = None
    layout: KernelLayout = KernelLayout.TRAINING

    def linear(self, name: str, *features: int, inputs: int = 1) -> Linear:
        """Returns a linear layer whose result has the axes `features`."""
        return Linear(features, inputs, self.config, self.ops, self.layout, name=name)

    def keep(self, name: str, x: Array) -> None:
        """Adds an activation to the collection `INSIDE`, if the caller wants it."""
        # The prefix is needed because a layer has the same name.
        self.sow(INSIDE, f"kept_{name}", x, reduce_fn=lambda _, new: new, init_fn=lambda: None)

    def change(self, name: str) -> Array | None:
        """Returns an array of the collection `CHANGES`; None means no change."""
        return self.get_variable(CHANGES, name) if self.has_variable(CHANGES, name) else None


class Attention(_Layer):
    """Masked multi-head self-attention, for whole sequences or for new tokens with a cache."""

    @nn.compact
    def __call__(
        self, x_BTD: Array, ids: Ids | None, deterministic: bool, past: Past | None = None
    ) -> tuple[Array, Cache | None]:
        """Computes the layer. The arguments and results are described in `Block.__call__`."""
        config, cache = self.config, None
        qkv_BT3HK = self.linear("qkv", 3, config.num_heads, config.head_width)(x_BTD)
        q_BTHK, k_BTHK, v_BTHK = (x.squeeze(2) for x in jnp.split(qkv_BT3HK, 3, axis=2))
        if past is not None:
            y_BTHK, cache = attention.cached(q_BTHK, k_BTHK, v_BTHK, *past)
        else:
            assert ids is not None
            inputs = AttentionInputs(q_BTHK, k_BTHK, v_BTHK, *ids)
            y_BTHK = self._causal(inputs, deterministic)
            if self.is_mutable_collection(INSIDE):
                scores_BHTT, weights_BHTT = attention.plain.scores_and_weights(inputs)
                self.keep("qkv", qkv_BT3HK)
                self.keep("scores", scores_BHTT)
                self.keep("weights", weights_BHTT)
            if (factors_H := self.change("head_factors")) is not None:
                y_BTHK *= _like(factors_H[:, None], y_BTHK).astype(y_BTHK.dtype)
            self.keep("heads", y_BTHK)
        return self.linear("out", config.width, inputs=2)(y_BTHK), cache

    def _causal(self, inputs: AttentionInputs, deterministic: bool) -> Array:
        config, mesh = self.config, self.ops.mesh
        rate = 0.0 if deterministic else config.attention_dropout
        key = None
        if rate > 0:
            key = DropoutKey(dropout.key_bits(self.make_rng("dropout")), rate)
        kind = attention.choose(
            config.attention, self.ops.platform, mesh_lib.compute_capability(mesh),
            inputs.q_BTHK, rate,
        )  # fmt: skip
        longest = self.max_sequence_length or config.context_length
        return attention.causal(inputs, key, kind=kind, mesh=mesh, max_sequence_length=longest)


class Block(_Layer):
    """A decoder block: attention, then feed-forward layer, each with dropout, residual and norm."""

    @nn.compact
    def __call__(
        self, x_BTD: Array, ids: Ids | None, deterministic: bool, past: Past | None = None
    ) -> tuple[Array, Cache | None]:
        """Computes the block for whole sequences, or for new tokens with a cache.

        Args:
          x_BTD: the hidden states of the tokens, in the compute dtype.
          ids: the ids of the queries and keys, which define the attention mask. They are not used
            with a cache.
          deterministic: True means no dropout. False needs the rng "dropout".
          past: the cache and the position of the first token of `x_BTD`. None means that `x_BTD`
            has whole sequences.

        Returns:
          The next hidden states [B, T, D], and the cache to which the keys and values of these
          tokens were added (None without a cache).
        """
        config = self.config
        layer = Attention(config, self.ops, self.max_sequence_length, self.layout, name="attention")
        y_BTD, cache = layer(x_BTD, ids, deterministic, past)
        self.keep("attention_out", y_BTD)
        y_BTD = Dropout(config.residual_dropout)(y_BTD, deterministic)
        x_BTD = LayerNorm(config, name="norm1")(x_BTD + y_BTD)
        self.keep("norm1", x_BTD)
        h_BTF = self.linear("ffn_in", config.hidden_ffn_width)(x_BTD)
        h_BTF = activations.FUNCTIONS[config.activation](h_BTF)
        self.keep("ffn", h_BTF)
        y_BTD = self.linear("ffn_out", config.width)(h_BTF)
        self.keep("ffn_out", y_BTD)
        y_BTD = Dropout(config.residual_dropout)(y_BTD, deterministic)
        x_BTD = LayerNorm(config, name="norm2")(x_BTD + y_BTD)
        new_BTD, is_new_BT = self.change("states"), self.change("is_changed")
        if new_BTD is not None and is_new_BT is not None:
            x_BTD = jnp.where(is_new_BT[..., None], new_BTD.astype(x_BTD.dtype), x_BTD)
        self.keep("block", x_BTD)
        return x_BTD, cache


class GPT(nn.Module):
    """The decoder with an LM head and, if `num_outputs` is not 0, a linear task head."""

    config: ModelConfig
    num_outputs: int = 0
    """The number of outputs of the task head. 0 means that the model has no task head."""
    sum_candidates: bool = False
    """Whether the hidden states of an example's candidates (its sequences) are added up, as for
    similarity and regression."""
    mean_candidates: bool = False
    """Whether the task head reads the mean of the hidden states of an example's candidates, as for
    the windows of a long text."""
    head_mean: bool = False
    """Whether the task head reads the mean of the hidden states at all tokens of a sequence,
    instead of the state at its last token."""
    head_length: int | None = None
    """The number of hidden states that the task head reads. They are the last states of a sequence,
    flattened to one vector. None means that the task head reads only the last state."""
    mesh: Mesh | None = None
    """The devices. None means JAX's default device. The mesh does not change the results."""
    max_sequence_length: int | None = None
    """The largest number of tokens in a sequence. None means the context length. A small number
    can make attention faster and does not change the results."""

    @property
    def ops(self) -> ShardedOps:
        """The operations on the devices of the mesh."""
        return ShardedOps(self.mesh)

    def setup(self) -> None:
        """Declares the parameters. The parameters of the blocks have a leading axis of size L."""
        config = self.config
        init = nn.initializers.normal(config.init_std)

        def embedding(name: str, rows: int) -> Array:
            return self.param(name, init, (rows, config.width))

        self.token_embedding = embedding("token_embedding", config.vocab_size)
        self.position_embedding = embedding("position_embedding", config.context_length)
        if config.segment_types:
            self.segment_embedding = embedding("segment_embedding", config.segment_types)
        if not config.tied:
            self.lm_head = LMHead(config)
        self.embedding_dropout = Dropout(config.embedding_dropout)
        block = Block
        if config.remat != Remat.NONE:
            names = jax.checkpoint_policies.save_only_these_names(_MATMUL_RESULT)
            policy = names if config.remat == Remat.DOTS else None
            block = nn.remat(Block, policy=policy, prevent_cse=False, static_argnums=(3,))
        # On a CPU the loop over the layers is unrolled completely, because that is faster. With
        # remat (rematerialisation, which computes values again in the backward pass) it is not.
        # In an unrolled program XLA would notice that the values are computed twice, and would
        # keep the first values in memory instead.
        unroll_all = self.ops.platform == "cpu" and config.remat == Remat.NONE
        unroll = config.unroll or (config.num_layers if unroll_all else 1)
        if config.num_layers:
            self.blocks = nn.scan(
                block,
                variable_axes={"params": 0, INSIDE: 0, CHANGES: 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=config.num_layers,
                unroll=min(unroll, config.num_layers),
            )(config, self.ops, self.max_sequence_length)
        if self.num_outputs:
            self.head_dropout = Dropout(config.head_dropout)
            inputs = 1 if self.head_length is None else 2
            # The task head computes in float32, because it is small and its outputs are the
            # predictions.
            float32 = dataclasses.replace(config, dtype=Dtype.FLOAT32)
            self.task_head = Linear((self.num_outputs,), inputs, float32, self.ops)

    def _one_matrix(self, deterministic: bool) -> tuple[Array, Array]:
        """Returns the token and position embeddings, with the dropout of `ModelConfig.one_matrix`.

        The dropout mask depends only on the dropout key, so all calls with the same key return the
        same arrays.
        """
        table = jnp.concatenate([self.token_embedding, self.position_embedding])
        table = self.embedding_dropout(table, deterministic)
        return table[: self.config.vocab_size], table[self.config.vocab_size :]

    def replicated_table(self, deterministic: bool = True) -> Array:
        """Returns the table of the embedding and of a tied LM head, from `replicate_table`.

        The table is the token embedding. With `one_matrix` the rows of the position embedding
        follow, and dropout is applied. Only for several devices.
        """
        return self.ops.replicate_table(self._tied_table(deterministic))

    def _tied_table(self, deterministic: bool) -> Array:
        if self.config.one_matrix:
            return jnp.concatenate(self._one_matrix(deterministic))
        return self.token_embedding

    def _embed(
        self,
        tokens_BT: Array,
        positions_BT: Array,
        token_types_BT: Array | None,
        deterministic: bool,
        replicated_table: Array | None = None,
    ) -> Array:
        """Returns the sum of the embeddings, with dropout: [B, T, D] in the compute dtype."""
        config, positions_TD = self.config, self.position_embedding
        if replicated_table is not None:
            x_BTD = self.ops.lookup(replicated_table, tokens_BT)
            if config.one_matrix:
                rows_BT = config.vocab_size + positions_BT
                x_BTD = x_BTD + self.ops.lookup(replicated_table, rows_BT)
            else:
                x_BTD = x_BTD + positions_TD[positions_BT]
        else:
            tokens_VD = self.token_embedding
            if config.one_matrix:
                tokens_VD, positions_TD = self._one_matrix(deterministic)
            x_BTD = tokens_VD[tokens_BT] + positions_TD[positions_BT]
        if self.config.segment_types:
            types_BT = jnp.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT
            x_BTD = x_BTD + self.segment_embedding[types_BT]
        if not self.config.one_matrix:
            x_BTD = self.embedding_dropout(x_BTD, deterministic)
        return x_BTD.astype(self.config.dtype)

    def hidden(
        self,
        tokens_BT: Array,
        segment_ids_BT: Array,
        positions_BT: Array,
        token_types_BT: Array | None = None,
        deterministic: bool = True,
        replicated_table: Array | None = None,
    ) -> Array:
        """Returns the hidden states after the last block, [B, T, D] in the compute dtype.

        Args:
          tokens_BT, segment_ids_BT, positions_BT, token_types_BT: fields of a
            `gptjax.batch.Batch`.
          deterministic: True means no dropout. False needs the rng "dropout".
          replicated_table: the result of `replicated_table`, if the LM head uses it too. None means
            that this method computes it if there are several devices.
        """
        if replicated_table is None and self.ops.is_sharded:
            replicated_table = self.replicated_table(deterministic)
        x_BTD = self._embed(
            tokens_BT, positions_BT, token_types_BT, deterministic, replicated_table
        )
        return self.apply_blocks(x_BTD, segment_ids_BT, token_types_BT, deterministic)

    def apply_blocks(
        self,
        x_BTD: Array,
        segment_ids_BT: Array,
        token_types_BT: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Returns the hidden states after the last block, [B, T, D] in the compute dtype.

        Args:
          x_BTD: the input of the first block, in the compute dtype.
          segment_ids_BT, token_types_BT: fields of a `gptjax.batch.Batch`.
          deterministic: True means no dropout. False needs the rng "dropout".
        """
        if not self.config.num_layers:
            return x_BTD
        key_ids_BT = segment_ids_BT
        if self.config.segment_types > TokenType.PADDING and token_types_BT is not None:
            # Padding inside a sequence sees the tokens before it, but no query sees this padding.
            is_padding_BT = token_types_BT == TokenType.PADDING
            key_ids_BT = jnp.where(is_padding_BT, HIDDEN_KEY, key_ids_BT)
        x_BTD, _ = self.blocks(x_BTD, (segment_ids_BT, key_ids_BT), deterministic)
        return x_BTD

    def decode(
        self, tokens_BT: Array, layers: tuple[Params, ...], cache: tuple[Cache, ...], offset: Array
    ) -> tuple[Array, tuple[Cache, ...]]:
        """Computes the hidden states of new tokens with a key/value cache, without dropout.

        Args:
          tokens_BT: the new tokens, at positions offset, offset + 1, ..., offset + T - 1. Tokens
            after the context length get the embedding of the last position.
          layers: the parameters of each block, from `decoding_layers`.
          cache: the cache of each layer, with the tokens at positions 0 to offset - 1.
          offset: the position of the first new token, an int32 scalar.

        Returns:
          The hidden states [B, T, D], and the caches with the tokens at positions 0 to
          offset + T - 1.
        """
        positions_T = offset + jnp.arange(tokens_BT.shape[1])
        positions_T = jnp.minimum(positions_T, self.config.context_length - 1)
        x_BTD = self._embed(tokens_BT, positions_T[None], jnp.zeros_like(tokens_BT), True)
        block = Block(self.config, self.ops, layout=KernelLayout.DECODING, parent=None)
        filled: list[Any] = []
        for params, old in zip(layers, cache, strict=True):
            x_BTD, new = block.apply({"params": params}, x_BTD, None, True, (old, offset))
            filled.append(new)
        return x_BTD, tuple(filled)

    def lm_projection(
        self, deterministic: bool = True, replicated_table: Array | None = None
    ) -> LMHeadWeights:
        """Returns the weights of the LM head.

        A tied head has no bias, and its table is the token embedding. With `one_matrix` the rows of
        the position embedding follow in the table. The table then has dropout, with the same mask
        as in `hidden` if the dropout key is the same.

        Args:
          deterministic: True means no dropout. False needs the rng "dropout".
          replicated_table: the result of `replicated_table`, which only a tied head uses. None
            means that it is not yet computed.
        """
        if not self.config.tied:
            return self.lm_head()
        return LMHeadWeights(self._tied_table(deterministic), None, replicated_table)

    def lm_logits(self, x_BTD: Array) -> Array:
        """Returns the logits of the tokens, float32 [B, T, V]."""
        head = self.lm_projection()
        table = head.table_VD[: self.config.vocab_size].astype(self.config.dtype)
        logits_BTV = self.ops.logits(x_BTD, table)
        return logits_BTV if head.bias_V is None else logits_BTV + _like(head.bias_V, logits_BTV)

    def task_logits(
        self,
        x_BTD: Array,
        segment_ids_BT: Array,
        extract_BEC: Array,
        deterministic: bool = True,
        candidate_mask_BEC: Array | None = None,
    ) -> Array:
        """Returns the outputs of the task head, float32.

        The task head reads the hidden states at the extract tokens, which end the sequences, or
        the mean state of each sequence (`head_mean`).

        Args:
          x_BTD: the hidden states, from `hidden`.
          segment_ids_BT: the sequence of each token, from `gptjax.batch.Batch`.
          extract_BEC: the index of the extract token of each candidate, from
            `gptjax.batch.Batch`.
          deterministic: True means no dropout. False needs the rng "dropout".
          candidate_mask_BEC: 1 for each candidate that exists, from `gptjax.batch.Batch`. Only
            `mean_candidates` uses it. None means that all exist.

        Returns:
          [B, E, O] if O is greater than 1. If O is 1, the result is [B, E, C]: the score of each
          candidate of a multiple choice, or the number that a regression predicts (with C = 1).
        """
        x_BECSD = self.head_states(x_BTD, segment_ids_BT, extract_BEC, candidate_mask_BEC)
        if self.config.head_dropout_shared:
            x_BECSD *= self.head_dropout(jnp.ones_like(x_BECSD[:, :, :1]), deterministic)
        else:
            x_BECSD = self.head_dropout(x_BECSD, deterministic)
        y_BECO = self.task_head(x_BECSD)
        return y_BECO[..., 0] if self.num_outputs == 1 else y_BECO[:, :, 0]

    def head_states(
        self,
        x_BTD: Array,
        segment_ids_BT: Array,
        extract_BEC: Array,
        candidate_mask_BEC: Array | None = None,
    ) -> Array:
        """Returns what the task head reads, before dropout, float32.

        The arguments are those of `task_logits`.

        Returns:
          [B, E, C, D]. C is 1 if the states of the candidates are added up or averaged. With a
          `head_length` the result is [B, E, C, head_length, D].
        """
        if self.head_mean:
            x_BECSD = self._mean_states(x_BTD, segment_ids_BT, extract_BEC)
        else:
            x_BECSD = self._last_states(x_BTD, extract_BEC)
        if self.sum_candidates:
            x_BECSD = x_BECSD.sum(axis=2, keepdims=True)
        if self.mean_candidates:
            exists_BEC = jnp.ones_like(extract_BEC, jnp.float32)
            if candidate_mask_BEC is not None:
                exists_BEC = candidate_mask_BEC
            total_BE1D = jnp.sum(x_BECSD * exists_BEC[..., None], axis=2, keepdims=True)
            # A slot without an example has no candidate.
            x_BECSD = total_BE1D / jnp.maximum(exists_BEC.sum(axis=2)[..., None, None], 1.0)
        return x_BECSD

    def _last_states(self, x_BTD: Array, extract_BEC: Array) -> Array:
        """Returns the states that end each sequence, float32 [B, E, C, D].

        If there is a `head_length`, the result is [B, E, C, head_length, D].
        """
        steps = jnp.arange(1 - (self.head_length or 1), 1).reshape(1, 1, 1, -1)
        index_BECS = extract_BEC[..., None] + steps
        # In a slot without an example `extract` is 0, so the indices before it would be negative.
        index = jnp.maximum(index_BECS, 0).reshape(x_BTD.shape[0], -1, 1)
        x_BECSD = jnp.take_along_axis(x_BTD, index, axis=1).astype(jnp.float32)
        x_BECSD = x_BECSD.reshape(*index_BECS.shape, -1)
        return x_BECSD[:, :, :, 0] if self.head_length is None else x_BECSD

    def _mean_states(self, x_BTD: Array, segment_ids_BT: Array, extract_BEC: Array) -> Array:
        """Returns the mean state over all tokens of each sequence, float32 [B, E, C, D].

        In a slot without an example the result is that of the sequence at the start of the row.
        """
        batch, slots, candidates = extract_BEC.shape
        # N = E * C: the sequences of a row.
        index_BN = extract_BEC.reshape(batch, slots * candidates)
        own_BN1 = jnp.take_along_axis(segment_ids_BT, index_BN, axis=1)[:, :, None]
        is_own_BNT = (own_BN1 == segment_ids_BT[:, None, :]).astype(jnp.float32)
        weights_BNT = is_own_BNT / is_own_BNT.sum(axis=2, keepdims=True)
        x_BTD = x_BTD.astype(jnp.float32)
        x_BND = jnp.einsum("bnt,btd->bnd", weights_BNT, x_BTD, precision="highest")
        return x_BND.reshape(batch, slots, candidates, -1)

    def __call__(self, tokens_BT: Array) -> Array:
        """Uses every parameter, so that `init` creates it. Returns the hidden states [B, T, D]."""
        self.lm_projection()
        ones = jnp.ones_like(tokens_BT)
        x_BTD = self.hidden(tokens_BT, ones, jnp.zeros_like(tokens_BT), jnp.zeros_like(tokens_BT))
        if self.num_outputs:
            extract_BEC = jnp.zeros((tokens_BT.shape[0], 1, 1), jnp.int32)
            self.task_logits(x_BTD, ones, extract_BEC)
        return x_BTD


def run(model: GPT, params: Params, *args: Any, method: str, key: Array | None = None) -> Any:
    """Calls a method of the model with the given parameters, and returns its result.

    Args:
      model: the model.
      params: the parameters of the model.
      *args: the arguments of the method.
      method: the name of the method.
      key: the random key of the dropout masks. None means that the method uses no dropout.
    """
    rngs = {} if key is None else {"dropout": key}
    return model.apply({"params": params}, *args, method=method, rngs=rngs)


def init_params(model: GPT, key: Array) -> Params:
    """Returns the initial parameter tree.

    The weights are drawn from N(0, init_std). The biases are 0, and the scales of the layer norms
    are 1.
    """
    # The mesh is removed, because the single row that `init` uses cannot be sharded over several
    # devices.
    alone = model.clone(mesh=None)
    return alone.init(key, jnp.zeros((1, max(2, model.head_length or 0)), jnp.int32))["params"]


def make_model(
    config: ModelConfig,
    spec: TaskSpec | None,
    mesh: Mesh | None = None,
    max_sequence_length: int | None = None,
) -> GPT:
    """Returns the model with the head that the task needs.

    Args:
      config: the configuration of the model.
      spec: the task. None means that the model has no task head.
      mesh: the devices. None means JAX's default device.
      max_sequence_length: the largest number of tokens in a sequence. None means the context
        length.
    """
    model = GPT(config, mesh=mesh, max_sequence_length=max_sequence_length)
    if spec is None:
        return model
    return model.clone(
        num_outputs=spec.num_outputs,
        sum_candidates=spec.kind.sums_candidates,
        mean_candidates=spec.windows > 0,
        head_mean=spec.mean,
        head_length=spec.flatten or None,
    )
