"""Small models, texts and batches that several tests share."""

import jax
import numpy as np

from gptjax import model as model_lib
from gptjax import sharding
from gptjax.config import MeshConfig, ModelConfig
from gptjax.data import tasks, tokenizer
from gptjax.data.tasks import Examples, TaskSpec
from gptjax.model import GPT

WORDS = "the cat sat on a mat while some dogs ran far away from home and then came back again"


def config(**changes) -> ModelConfig:
    """A model small enough for any test: two layers, no dropout."""
    values = {
        "vocab_size": 97, "context_length": 32, "num_layers": 2, "width": 24, "num_heads": 3,
        "embedding_dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0,
        "head_dropout": 0.0, "init_std": 0.3,
    }  # fmt: skip
    return ModelConfig(**(values | changes))


def params(model: GPT, seed: int = 0):
    """Random parameters; biases and gains too, so that no test passes for their being 0 or 1."""
    fresh = model_lib.init_params(model, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1):
    """A mesh over the first devices."""
    devices = jax.devices()[: data * fsdp * tensor]
    return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


def texts(count: int, seed: int = 0, longest: int = 9) -> list[str]:
    """Random sentences of one to `longest` words."""
    rng = np.random.default_rng(seed)
    words = WORDS.split()
    return [" ".join(rng.choice(words, rng.integers(1, longest + 1))) for _ in range(count)]


def small_tokenizer() -> tokenizer.Tokenizer:
    """A BPE of a few dozen tokens."""
    return tokenizer.train_bpe([WORDS] * 2, 60)


KINDS = ("classification", "entailment", "similarity", "multiple_choice", "regression")


def examples(
    kind: str, count: int = 12, seed: int = 0, context: int = 32
) -> tuple[TaskSpec, Examples]:
    """Random labelled examples of a task."""
    rng = np.random.default_rng(seed + 100)
    rows = {name: texts(count, seed + i) for i, name in enumerate(("text", "pair", "b", "c"))}
    spec = TaskSpec(kind, "text")
    if kind in ("entailment", "similarity", "regression"):
        spec = TaskSpec(kind, "text", "pair")
    if kind == "multiple_choice":
        spec = TaskSpec(kind, "text", choices=("pair", "b", "c"))
    if kind == "regression":
        rows["label"] = rng.normal(size=count).tolist()
    else:
        rows["label"] = (np.arange(count) % 3).tolist()
    spec = tasks.find_labels(spec, rows, "rows")
    return spec, tasks.encode(spec, rows, small_tokenizer(), context, "rows")
