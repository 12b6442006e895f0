"""The fastest GPT-1 that plain PyTorch allows, and the train step that all PyTorch peers share.

Letters of shapes: B sequences, T tokens, D width, H heads, K width of a head, V vocabulary.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.sizes import CLIP_NORM, EPSILON, INIT_STD, LEARNING_RATE, WEIGHT_DECAY, Size

Tensor = torch.Tensor
# The keys and the values of each layer, both [B, H, S, K].
Cache = list[tuple[Tensor, Tensor]]
IGNORED = -100


class Block(nn.Module):
    """A post-LN decoder block with fused q, k and v and PyTorch's own attention kernel."""

    def __init__(self, size: Size, dropout: float):
        super().__init__()
        width = size.width
        self.num_heads, self.dropout = size.num_heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn_in, self.ffn_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, EPSILON), nn.LayerNorm(width, EPSILON)

    def forward(
        self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, offset: int = 0
    ) -> Tensor:
        """Returns states [B, T, D] of states [B, T, D].

        With a cache, the T tokens start at position `offset`, and the cache takes their keys and
        values.
        """
        rows, length, width = x.shape
        heads = self.qkv(x).view(rows, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        if cache is not None:
            end = offset + length
            for whole, new in zip(cache, (k, v), strict=True):
                whole[:, :, offset:end] = new
            k, v = (whole[:, :, :end] for whole in cache)
        y = functional.scaled_dot_product_attention(
            q, k, v, is_causal=length > 1, dropout_p=self.dropout if self.training else 0.0
        )
        y = self._drop(self.out(y.transpose(1, 2).reshape(rows, length, width)))
        x = self.norm1(x + y)
        y = self.ffn_out(functional.gelu(self.ffn_in(x), approximate="tanh"))
        return self.norm2(x + self._drop(y))

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)


class FastGPT(nn.Module):
    """The decoder. Its LM head is the token embedding."""

    def __init__(self, size: Size, dropout: float):
        super().__init__()
        self.size, self.dropout = size, dropout
        self.tokens = nn.Embedding(size.vocab_size, size.width)
        self.positions = nn.Embedding(size.context_length, size.width)
        self.blocks = nn.ModuleList(Block(size, dropout) for _ in range(size.num_layers))
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, tokens: Tensor, cache: Cache | None = None, offset: int = 0) -> Tensor:
        """Returns the last states [B, T, D] of int tokens [B, T]."""
        places = torch.arange(offset, offset + tokens.shape[1])
        x = self.tokens(tokens) + self.positions(places)
        x = functional.dropout(x, self.dropout, self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, cache[i] if cache is not None else None, offset)
        return x

    def logits(self, states: Tensor) -> Tensor:
        """Returns the logits [..., V] of states [..., D]."""
        return functional.linear(states, self.tokens.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """Returns the LM loss of int [B, T] in nats per predicted token."""
        targets = functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)
        logits = self.logits(self.hidden(tokens))
        # The loss is computed in float32, as in all implementations.
        return functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )

    def load_ours(self, arrays: dict[str, np.ndarray]) -> None:
        """Loads weights of gptjax, as `gptjax.interop.arrays.split_layers` returns them."""
        names = {
            "attention/qkv": "qkv", "attention/out": "out", "ffn_in": "ffn_in",
            "ffn_out": "ffn_out", "norm1": "norm1", "norm2": "norm2",
        }  # fmt: skip
        found = {"tokens.weight": arrays["token_embedding"]}
        found["positions.weight"] = arrays["position_embedding"]
        for path, array in arrays.items():
            layer, _, rest = path.partition("/")
            if layer.isdigit():
                module, _, kind = rest.rpartition("/")
                end = "bias" if kind == "bias" else "weight"
                value = array.T if kind == "kernel" else array
                found[f"blocks.{layer}.{names[module]}.{end}"] = value
        self.load_state_dict({name: torch.tensor(array) for name, array in found.items()})


class Training:
    """A train step of any PyTorch model: loss, backward pass, clipping, AdamW. The dtypes are:

    float32      float32 throughout
    autocast     float32 parameters, and bfloat16 where torch.autocast chooses it
    bfloat16     bfloat16 throughout, but float32 for the master weights and AdamW
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        dtype: str,
        compiled: bool = False,
        fused: bool = True,
    ):
        """Builds the optimizer.

        Args:
          model: the model, in float32, in training mode or not.
          loss: a function of a batch that returns the scalar loss of the model.
          dtype: float32, autocast or bfloat16.
          compiled: whether torch.compile compiles the loss.
          fused: whether AdamW runs as one kernel.
        """
        if dtype == "bfloat16":
            masters: list[Tensor] = [
                p.detach().clone().requires_grad_() for p in model.parameters()
            ]
            model.to(torch.bfloat16)
        else:
            masters = list(model.parameters())
        self._masters, self._used = masters, list[Tensor](model.parameters())
        self._own = dtype == "bfloat16"
        groups = [
            {"params": [p for p in masters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in masters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=fused or None)
        self._loss = torch.compile(loss) if compiled else loss
        self._autocast = dtype == "autocast"

    def update(self, *batch: Any) -> float:
        """Runs one step; returns the loss."""
        context = contextlib.nullcontext()
        if self._autocast:
            context = torch.autocast("cpu", torch.bfloat16)  # type: ignore[assignment]
        with context:
            loss = self._loss(*batch)
        loss.backward()
        if self._own:
            for master, used in zip(self._masters, self._used, strict=True):
                master.grad = None if used.grad is None else used.grad.float()
                used.grad = None
        nn.utils.clip_grad_norm_(self._masters, CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._own:
            with torch.no_grad():
                torch._foreach_copy_(self._used, self._masters)
        return loss.detach().item()

    def step(self, tokens: np.ndarray) -> float:
        """Runs one language modelling step on int [B, T]; returns its loss in nats per token."""
        return self.update(torch.from_numpy(tokens.astype(np.int64)))


def pretraining(
    size: Size, dtype: str, dropout: float, compiled: bool = False, model: FastGPT | None = None
) -> Training:
    """Returns the pretraining of a size; dtype as in `Training`."""
    model = FastGPT(size, dropout) if model is None else model
    model.train()
    return Training(model, model.loss, dtype, compiled)


class Generation:
    """Greedy generation with a key/value cache that is allocated once."""

    def __init__(self, size: Size, dtype: str, model: FastGPT | None = None):
        """Args: size; dtype, float32 or bfloat16; model, None means random weights."""
        self._size, self._dtype = size, getattr(torch, dtype)
        self._model = (FastGPT(size, 0.0) if model is None else model).to(self._dtype).eval()

    @torch.inference_mode()
    def __call__(self, prompt: np.ndarray, batch: int, tokens: int) -> np.ndarray:
        """Returns int [batch, tokens]: continuations of int [T]; all must fit the context."""
        size, length = self._size, len(prompt)
        shape = (batch, size.num_heads, length + tokens, size.width // size.num_heads)
        cache = [
            (torch.empty(shape, dtype=self._dtype), torch.empty(shape, dtype=self._dtype))
            for _ in range(size.num_layers)
        ]
        new = torch.from_numpy(prompt.astype(np.int64))[None].repeat(batch, 1)
        found, offset = [], 0
        for _ in range(tokens):
            states = self._model.hidden(new, cache, offset)
            offset += new.shape[1]
            new = self._model.logits(states[:, -1]).argmax(-1, keepdim=True)
            found.append(new)
        return torch.cat(found, 1).numpy()


def matmul_ceiling(dtype: str, repeats: int = 5) -> float:
    """Returns the operations per second of the fastest of several products.

    The products of a linear layer are among them.

    Args:
      dtype: "float32" or "bfloat16".
      repeats: number of runs of each product.
    """
    from time import perf_counter

    best = 0.0
    for m, k, n in ((1536, 1536, 1536), (2048, 768, 3072), (2048, 3072, 768), (3072, 3072, 3072)):
        a = torch.ones((m, k), dtype=getattr(torch, dtype))
        b = torch.ones((n, k), dtype=getattr(torch, dtype))
        functional.linear(a, b)
        for _ in range(repeats):
            start = perf_counter()
            functional.linear(a, b)
            best = max(best, 2 * m * k * n / (perf_counter() - start))
    return best
