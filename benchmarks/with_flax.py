"""GPT-1 in plain Flax Linen, written like Flax's examples, without optimisations of speed."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.sizes import CLIP_NORM, EPSILON, INIT_STD, LEARNING_RATE, WEIGHT_DECAY, Size

_NORMAL = nn.initializers.normal(INIT_STD)


class Block(nn.Module):
    """A post-LN decoder block."""

    size: Size
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        """Returns [B, T, D] of [B, T, D]."""
        width = self.size.width
        y = nn.MultiHeadDotProductAttention(
            self.size.num_heads, dtype=self.dtype, kernel_init=_NORMAL, dropout_rate=self.dropout,
            # Each sequence has a dropout mask of its own, as in the other implementations.
            broadcast_dropout=False, deterministic=deterministic, name="attention",
        )(x, mask=mask)  # fmt: skip
        y = nn.Dropout(self.dropout)(y, deterministic=deterministic)
        x = nn.LayerNorm(EPSILON, dtype=self.dtype, name="norm1")(x + y)
        y = nn.Dense(4 * width, dtype=self.dtype, kernel_init=_NORMAL, name="ffn_in")(x)
        y = nn.Dense(width, dtype=self.dtype, kernel_init=_NORMAL, name="ffn_out")(nn.gelu(y))
        y = nn.Dropout(self.dropout)(y, deterministic=deterministic)
        return nn.LayerNorm(EPSILON, dtype=self.dtype, name="norm2")(x + y)


class PlainGPT(nn.Module):
    """The decoder with its tied LM head."""

    size: Size
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array, deterministic: bool) -> jax.Array:
        """Returns float32 logits [B, T, V] of int tokens [B, T]."""
        size = self.size
        embed = nn.Embed(
            size.vocab_size, size.width, dtype=self.dtype, embedding_init=_NORMAL, name="tokens"
        )
        positions = nn.Embed(
            size.context_length, size.width, dtype=self.dtype, embedding_init=_NORMAL,
            name="positions",
        )(jnp.arange(tokens.shape[1])[None])  # fmt: skip
        x = nn.Dropout(self.dropout)(embed(tokens) + positions, deterministic=deterministic)
        mask = nn.make_causal_mask(tokens)
        for i in range(size.num_layers):
            x = Block(size, self.dropout, self.dtype, name=f"block{i}")(x, mask, deterministic)
        return embed.attend(x).astype(jnp.float32)


def from_ours(params: Any) -> Any:
    """Returns the parameter tree of this model with the parameters of gptjax's tree."""
    blocks = params["blocks"]
    found: dict[str, Any] = {
        "tokens": {"embedding": params["token_embedding"]},
        "positions": {"embedding": params["position_embedding"]},
    }
    for i in range(blocks["norm1"]["scale"].shape[0]):
        own = jax.tree.map(lambda x, i=i: x[i], blocks)
        qkv, out = own["attention"]["qkv"], own["attention"]["out"]
        attention = {
            name: {"kernel": qkv["kernel"][:, j], "bias": qkv["bias"][j]}
            for j, name in enumerate(("query", "key", "value"))
        }
        rest = {name: own[name] for name in ("norm1", "norm2", "ffn_in", "ffn_out")}
        found[f"block{i}"] = {"attention": attention | {"out": out}, **rest}
    return found


class Training:
    """The jitted train step and its state."""

    def __init__(self, size: Size, dtype: str, dropout: float, params: Any = None):
        """Args: size; dtype, float32 or bfloat16; dropout; params, None means random weights."""
        model = PlainGPT(size, dropout, jnp.dtype(dtype))
        optimizer = optax.chain(
            optax.clip_by_global_norm(CLIP_NORM),
            optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY, mask=_decayed),
        )

        def loss_of(params: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
            logits: Any = model.apply({"params": params}, tokens, False, rngs={"dropout": key})
            losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
            return losses.mean()

        def step(params: Any, opt_state: Any, tokens: jax.Array, key: jax.Array) -> Any:
            loss, grads = jax.value_and_grad(loss_of)(params, tokens, key)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        if params is None:
            init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32), True))
            params = init(jax.random.key(0))["params"]
        self._params, self._opt_state = params, optimizer.init(params)
        self._key, self._count = jax.random.key(1), 0
        self._step = jax.jit(step, donate_argnums=(0, 1))

    def step(self, tokens: np.ndarray) -> float:
        """Runs one step on int [B, T] to its end; returns its loss in nats per token."""
        key = jax.random.fold_in(self._key, self._count)
        self._count += 1
        self._params, self._opt_state, loss = self._step(
            self._params, self._opt_state, tokens.astype(np.int32), key
        )
        jax.block_until_ready((self._params, self._opt_state))
        return float(loss)


def _decayed(params: Any) -> Any:
    """Returns a tree that is true for all arrays but biases and gains."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in ("bias", "scale"), params
    )


def pretraining(size: Size, dtype: str, dropout: float, params: Any = None) -> Training:
    """Returns the pretraining of a size in "float32" or "bfloat16"; params are from `from_ours`."""
    return Training(size, dtype, dropout, params)
