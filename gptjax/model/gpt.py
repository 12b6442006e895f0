"""GPT-1 as pure Flax modules: the only file that knows Flax's module system.

Letters of shapes: B rows, T tokens, D width, H heads, K width of a head, F width of the
feed-forward layer, V vocabulary, L layers, E examples of a row, C candidates of an example,
S cache entries, O outputs of the task head.

The decoder is post-LN: x = norm(x + dropout(sublayer(x))), without a final layer norm
(Radford et al. 2018, section 3.1 and 4.1).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from gptjax import mesh as mesh_lib
from gptjax.config.schema import (
    Dtype,
    ModelConfig,
    Remat,
    TaskSpec,
)
from gptjax.mesh import Params
from gptjax.ops import activations, attention, dropout, matmul, sharded
from gptjax.ops.attention import Cache

Array = jax.Array
# Segment ids [B, T] of the queries and of the keys.
Ids = tuple[Array, Array]
# Flax variables of each block.
Layers = tuple[dict[str, Params], ...]

# What `remat=dots` keeps: results of products, in the compute dtype.
_PRODUCT = "product"


def _like(x: Array, y: Array) -> Array:
    """Gives `x` leading axes of size 1, so that it broadcasts to `y` explicitly."""
    return x.reshape((1,) * (y.ndim - x.ndim) + x.shape)


class Dropout(nn.Module):
    """Dropout by counter hash (see `gptjax.ops.dropout`)."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Returns `x` with elements dropped, or `x` itself where deterministic."""
        if deterministic or self.rate == 0:
            return x
        words = dropout.key_words(self.make_rng("dropout"))
        return dropout.dropout(x, words, self.rate)


class Linear(nn.Module):
    """x @ kernel + bias over the last `inputs` axes of x, to the axes `features`.

    The kernel is float32 and cast to `dtype` for the product, which accumulates in float32.
    """

    features: tuple[int, ...]
    inputs: int
    config: ModelConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns [..., *features] in the compute dtype."""
        x = x.astype(self.config.dtype)
        if self.has_variable("prepared", "kernel"):  # see `gptjax.infer.decoder`
            transposed: Array = self.get_variable("prepared", "kernel")
            y = matmul.times_transposed(x, transposed, len(self.features))
        else:
            shape = x.shape[x.ndim - self.inputs :] + self.features
            kernel = self.param("kernel", nn.initializers.normal(self.config.init_std), shape)
            name = "/".join((*self.path, "kernel"))
            y = sharded.linear(x, kernel, self.inputs, self.mesh, name)
        # After the kernel: Flax's keys, and so a seed's initial values, count the parameters.
        bias = self.param("bias", nn.initializers.zeros, self.features)
        return checkpoint_name((y + _like(bias, y)).astype(x.dtype), _PRODUCT)


class LayerNorm(nn.Module):
    """Layer norm in float32, epsilon inside the square root."""

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
    """The kernel [V, D] and the bias [V] of an LM head that is not tied to the token embedding."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        """Returns both, float32."""
        init = nn.initializers.normal(self.config.init_std)
        kernel = self.param("kernel", init, (self.config.vocab_size, self.config.width))
        return kernel, self.param("bias", nn.initializers.zeros, (self.config.vocab_size,))


class Attention(nn.Module):
    """Masked multi-head self-attention: of whole sequences, or of new tokens to a cache."""

    config: ModelConfig
    mesh: Mesh | None = None
    longest: int = 0

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        ids: Ids | None,
        deterministic: bool,
        cache: Cache | None = None,
        offset: Array | int = 0,
    ) -> tuple[Array, Cache | None]:
        """Returns the output [B, T, D] and the cache with these keys and values written in."""
        config = self.config
        heads, width = config.num_heads, config.head_width
        qkv_BT3HK = Linear((3, heads, width), 1, config, self.mesh, name="qkv")(x_BTD)
        q_BTHK, k_BTHK, v_BTHK = (x.squeeze(2) for x in jnp.split(qkv_BT3HK, 3, axis=2))
        if cache is not None:
            y_BTHK, cache = attention.cached(q_BTHK, k_BTHK, v_BTHK, cache, offset)
        else:
            assert ids is not None
            y_BTHK = self._causal(q_BTHK, k_BTHK, v_BTHK, ids, deterministic)
        return Linear((config.width,), 2, config, self.mesh, name="out")(y_BTHK), cache

    def _causal(self, q: Array, k: Array, v: Array, ids: Ids, deterministic: bool) -> Array:
        config, mesh = self.config, self.mesh
        rate, words = 0.0 if deterministic else config.attention_dropout, None
        if rate > 0:
            words = dropout.key_words(self.make_rng("dropout"))
        kind = attention.choose(
            config.attention, mesh_lib.platform(mesh), config.dtype, rate, q.shape[1],
            config.head_width, mesh_lib.compute_capability(mesh),
        )  # fmt: skip
        far = self.longest or config.context_length
        return attention.causal(q, k, v, *ids, rate, words, kind=kind, mesh=mesh, longest=far)


class Block(nn.Module):
    """One decoder block: attention and feed-forward, each with dropout, residual and layer norm."""

    config: ModelConfig
    mesh: Mesh | None = None
    longest: int = 0

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        ids: Ids | None,
        deterministic: bool,
        cache: Cache | None = None,
        offset: Array | int = 0,
    ) -> tuple[Array, Cache | None]:
        """Returns the next [B, T, D] and the updated cache."""
        config = self.config
        y_BTD, cache = Attention(config, self.mesh, self.longest, name="attention")(
            x_BTD, ids, deterministic, cache, offset
        )
        y_BTD = Dropout(config.residual_dropout)(y_BTD, deterministic)
        x_BTD = LayerNorm(config, name="norm1")(x_BTD + y_BTD)
        h_BTF = Linear((config.hidden_ffn_width,), 1, config, self.mesh, name="ffn_in")(x_BTD)
        h_BTF = activations.FUNCTIONS[config.activation](h_BTF)
        y_BTD = Linear((config.width,), 1, config, self.mesh, name="ffn_out")(h_BTF)
        y_BTD = Dropout(config.residual_dropout)(y_BTD, deterministic)
        return LayerNorm(config, name="norm2")(x_BTD + y_BTD), cache


class GPT(nn.Module):
    """The decoder with its LM head and, where `num_outputs` is not 0, a linear task head."""

    config: ModelConfig
    num_outputs: int = 0
    sum_candidates: bool = False
    """Similarity and regression: the states of an example's candidates are summed."""
    flatten: int = 0
    """The task head reads the last so many states of a sequence, flattened; 0: the last one."""
    mesh: Mesh | None = None
    """The devices that it runs on; None: JAX's first one. It decides how, not what is computed."""
    longest: int = 0
    """No sequence has more tokens; 0: the context length. It too decides how alone."""

    def setup(self) -> None:
        """Declares the parameters; every block's are stacked on a leading axis of size L."""
        config = self.config
        init = nn.initializers.normal(config.init_std)
        self.token_embedding = self.param(
            "token_embedding", init, (config.vocab_size, config.width)
        )
        self.position_embedding = self.param(
            "position_embedding", init, (config.context_length, config.width)
        )
        if config.segment_types:
            self.segment_embedding = self.param(
                "segment_embedding", init, (config.segment_types, config.width)
            )
        if not config.tied:
            self.lm_head = LMHead(config)
        self.embedding_dropout = Dropout(config.embedding_dropout)
        block = Block
        if config.remat != Remat.NONE:
            kept = jax.checkpoint_policies.save_only_these_names(_PRODUCT)
            policy = kept if config.remat == Remat.DOTS else None
            block = nn.remat(Block, policy=policy, prevent_cse=False, static_argnums=(3,))
        # Written out, forward and backward pass become one program that XLA keeps all values of.
        whole = mesh_lib.platform(self.mesh) == "cpu" and config.remat == Remat.NONE
        unroll = config.unroll or (config.num_layers if whole else 1)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=config.num_layers,
            unroll=min(unroll, config.num_layers),
        )(config, self.mesh, self.longest)
        if self.num_outputs:
            self.head_dropout = Dropout(config.head_dropout)
            inputs = 2 if self.flatten else 1
            self.task_head = Linear((self.num_outputs,), inputs, _float32(config), self.mesh)

    def _one_matrix(self, deterministic: bool) -> tuple[Array, Array]:
        """The rows of the tokens and of the positions, dropped as the one matrix that they are.

        The mask depends on the dropout key alone: embedding and LM head get the same one.
        """
        rows = jnp.concatenate([self.token_embedding, self.position_embedding])
        rows = self.embedding_dropout(rows, deterministic)
        return rows[: self.config.vocab_size], rows[self.config.vocab_size :]

    def copies(self, deterministic: bool = True) -> Array:
        """Returns `parallel.copies` of the token embedding, or of the one matrix, dropped."""
        if self.config.one_matrix:
            return sharded.copies(jnp.concatenate(self._one_matrix(deterministic)), self.mesh)
        return sharded.copies(self.token_embedding, self.mesh)

    def _embed(
        self,
        tokens_BT: Array,
        positions_BT: Array,
        token_types_BT: Array | None,
        deterministic: bool,
        copies: Array | None = None,
    ) -> Array:
        """Token + position (+ segment), dropout: [B, T, D] in the compute dtype."""
        config, positions_TD = self.config, self.position_embedding
        if copies is not None:
            x_BTD = sharded.lookup(copies, tokens_BT, self.mesh)
            if config.one_matrix:
                at_BT = config.vocab_size + positions_BT
                x_BTD = x_BTD + sharded.lookup(copies, at_BT, self.mesh)
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
        copies: Array | None = None,
    ) -> Array:
        """Returns the last block's states [B, T, D] in the compute dtype.

        Args:
          tokens_BT, segment_ids_BT, positions_BT, token_types_BT: as in `gptjax.batch.Batch`.
          deterministic: no dropout; else the rng `dropout` is needed.
          copies: what `copies` returns, where others use it too.
        """
        if copies is None and mesh_lib.several(self.mesh):
            copies = self.copies(deterministic)
        x_BTD = self._embed(tokens_BT, positions_BT, token_types_BT, deterministic, copies)
        key_ids_BT = segment_ids_BT
        if self.config.segment_types == 3 and token_types_BT is not None:
            # Padding inside a sequence sees the texts before it, and is seen by nothing.
            key_ids_BT = jnp.where(token_types_BT == 2, -1, key_ids_BT)
        ids = (segment_ids_BT, key_ids_BT)
        x_BTD, _ = self.blocks(x_BTD, ids, deterministic)
        return x_BTD

    def decode(
        self, tokens_BT: Array, layers: Layers, cache: tuple[Cache, ...], offset: Array
    ) -> tuple[Array, tuple[Cache, ...]]:
        """Runs T further tokens of B sequences against the cache (dropout off).

        Args:
          tokens_BT: the tokens at positions offset..offset + T - 1 (cut to the context length).
          layers: the variables of each block, from `gptjax.infer.decoder`.
          cache: of each layer, from `decoding.new_cache`, filled up to `offset`.
          offset: int32 scalar.

        Returns:
          The states [B, T, D] and the cache filled up to offset + T.
        """
        positions_T = offset + jnp.arange(tokens_BT.shape[1])
        positions_T = jnp.minimum(positions_T, self.config.context_length - 1)
        x_BTD = self._embed(tokens_BT, positions_T[None], jnp.zeros_like(tokens_BT), True)
        block = Block(self.config, self.mesh, parent=None)
        filled: list[Any] = []
        for variables, old in zip(layers, cache, strict=True):
            x_BTD, new = block.apply(variables, x_BTD, None, True, old, offset)
            filled.append(new)
        return x_BTD, tuple(filled)

    def lm_projection(self, deterministic: bool = True) -> tuple[Array, Array | None]:
        """Returns the LM head's rows, float32 [V, D] or [V + T, D] (one matrix), and its bias [V].

        Tied (the bias is None) or not; with the key of `hidden`, one matrix is dropped as there.
        """
        if not self.config.tied:
            return self.lm_head()
        if self.config.one_matrix:
            return jnp.concatenate(self._one_matrix(deterministic)), None
        return self.token_embedding, None

    def lm_logits(self, x_BTD: Array) -> Array:
        """Returns float32 [B, T, V]: the states times the LM head's rows (of tokens), + bias."""
        rows, bias = self.lm_projection()
        rows = rows[: self.config.vocab_size].astype(self.config.dtype)
        logits_BTV = sharded.logits(x_BTD, rows, self.mesh)
        return logits_BTV if bias is None else logits_BTV + _like(bias, logits_BTV)

    def task_logits(self, x_BTD: Array, extract_BEC: Array, deterministic: bool = True) -> Array:
        """Returns float32 outputs of the task head on the states at the extract tokens.

        [B, E, O] for classification and entailment (C = 1) and for summed candidates, but where
        O = 1 [B, E, C]: a score per answer of a multiple choice; C = 1 in a regression (summed).
        """
        steps = jnp.arange(1 - max(self.flatten, 1), 1).reshape(1, 1, 1, -1)
        index_BECS = extract_BEC[..., None] + steps
        # An empty slot has no sequence that ends where `extract` says.
        index = jnp.maximum(index_BECS, 0).reshape(x_BTD.shape[0], -1, 1)
        x_BECSD = jnp.take_along_axis(x_BTD, index, axis=1).astype(jnp.float32)
        x_BECSD = x_BECSD.reshape(*index_BECS.shape, -1)
        if not self.flatten:
            x_BECSD = x_BECSD[:, :, :, 0]
        if self.sum_candidates:
            x_BECSD = x_BECSD.sum(axis=2, keepdims=True)
        if self.config.head_dropout_shared:
            x_BECSD *= self.head_dropout(jnp.ones_like(x_BECSD[:, :, :1]), deterministic)
        else:
            x_BECSD = self.head_dropout(x_BECSD, deterministic)
        y_BECO = self.task_head(x_BECSD)
        return y_BECO[..., 0] if self.num_outputs == 1 else y_BECO[:, :, 0]

    def __call__(self, tokens_BT: Array) -> Array:
        """Touches every parameter: what `init` traces. Returns the states [B, T, D]."""
        self.lm_projection()
        ones = jnp.ones_like(tokens_BT)
        x_BTD = self.hidden(tokens_BT, ones, jnp.zeros_like(tokens_BT), jnp.zeros_like(tokens_BT))
        if self.num_outputs:
            self.task_logits(x_BTD, jnp.zeros((tokens_BT.shape[0], 1, 1), jnp.int32))
        return x_BTD


def _float32(config: ModelConfig) -> ModelConfig:
    """The same configuration computing in float32: the task head's few outputs stay exact."""
    return dataclasses.replace(config, dtype=Dtype.FLOAT32)


def run(model: GPT, params: Params, *args: Any, method: str, key: Array | None = None) -> Any:
    """Calls a method of the model: `model.method(*args)` with `params`, `key` for its dropout."""
    rngs = {} if key is None else {"dropout": key}
    return model.apply({"params": params}, *args, method=method, rngs=rngs)


def init_params(model: GPT, key: Array) -> Params:
    """Returns the parameter tree: N(0, init_std) weights, zero biases, unit gains."""
    # One row cannot be shared by devices; the parameters are the same.
    alone = model.clone(mesh=None)
    return alone.init(key, jnp.zeros((1, max(2, model.flatten)), jnp.int32))["params"]


def make_model(
    config: ModelConfig, spec: TaskSpec | None, mesh: Mesh | None = None, longest: int = 0
) -> GPT:
    """Returns the model with the head that the task needs.

    Args:
      config: of the model.
      spec: the task, or None.
      mesh: the devices.
      longest: see `GPT.longest`.
    """
    if spec is None:
        return GPT(config, mesh=mesh, longest=longest)
    return GPT(config, spec.num_outputs, spec.kind.sums_candidates, spec.flatten, mesh, longest)
