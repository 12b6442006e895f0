"""Small models, texts and batches that several tests share."""

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import mesh as mesh_lib
from gptjax.batch import Batch
from gptjax.config.schema import MeshConfig, ModelConfig, TaskKind, TaskSpec
from gptjax.data import tasks
from gptjax.data.packing import Packer
from gptjax.data.tables.labelled import LabelledTable
from gptjax.data.tasks import Examples
from gptjax.data.tokens import tokenizer
from gptjax.model import gpt
from gptjax.model import objective as objective_lib
from gptjax.model.gpt import GPT
from gptjax.ops.attention import plain
from gptjax.train import step as step_lib

WORDS = "the cat sat on a mat while some dogs ran far away from home and then came back again"


def config(**changes) -> ModelConfig:
    """A model small enough for any test: two layers, no dropout."""
    values = {
        "vocab_size": 97, "context_length": 32, "num_layers": 2, "width": 24, "num_heads": 3,
        "embedding_dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0,
        "head_dropout": 0.0, "init_std": 0.3, "unroll": 1,
    }  # fmt: skip
    return ModelConfig(**(values | changes))


def params(model: GPT, seed: int = 0):
    """Random parameters; biases and gains too, so that no test passes for their being 0 or 1.

    Drawn by NumPy into the shapes of `init_params`, which takes seconds to compile.
    """
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: gpt.init_params(model, key), jax.random.key(0))

    def draw(path, leaf):
        name = path[-1].key
        std = 0.1 if name in ("bias", "scale") else model.config.init_std
        return jnp.asarray((name == "scale") + std * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1):
    """A mesh over the first devices."""
    devices = jax.devices()[: data * fsdp * tensor]
    return mesh_lib.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


def texts(count: int, seed: int = 0, longest: int = 9) -> list[str]:
    """Random sentences of one to `longest` words."""
    rng = np.random.default_rng(seed)
    words = WORDS.split()
    return [" ".join(rng.choice(words, rng.integers(1, longest + 1))) for _ in range(count)]


def small_tokenizer() -> tokenizer.Tokenizer:
    """A BPE of a few dozen tokens."""
    return tokenizer.train_bpe([WORDS] * 2, 60)


KINDS = tuple(TaskKind)


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
    spec = tasks.find_labels(spec, LabelledTable(rows, "rows"))
    return spec, tasks.encode(spec, LabelledTable(rows, "rows"), small_tokenizer(), context)


def windowed_examples(
    windows: int, context: int = 8, longest: int = 9, count: int = 6
) -> tuple[TaskSpec, Examples]:
    """Random labelled texts, read in at most `windows` windows of `context` tokens (0: cut)."""
    rows = {"text": texts(count, seed=1, longest=longest), "label": (np.arange(count) % 3).tolist()}
    spec = TaskSpec("classification", "text", windows=windows)
    spec = tasks.find_labels(spec, LabelledTable(rows, "rows"))
    return spec, tasks.encode(spec, LabelledTable(rows, "rows"), small_tokenizer(), context)


def packed(
    examples: Examples, row_length: int = 0, shape: tuple[int, int, int] | None = None, one=False
) -> tuple[Batch, np.ndarray]:
    """All examples in one batch, and the example of each slot (-1: none).

    Args:
      examples: to pack.
      row_length: of the packer; 0: its own choice.
      shape: rows, tokens, slots to pad the batch to, so that packings share a compiled function.
      one: one example a row.
    """
    count = len(examples)
    packer = Packer(examples.lengths, 1 if one else count, row_length)
    if one:
        parts = [packer.pack(examples, np.array([i])) for i in range(count)]
        batch = jax.tree.map(lambda *x: np.concatenate(x), *(part[0] for part in parts))
        index = np.concatenate([part[1] for part in parts])
    else:
        batch, index = packer.pack(examples, np.arange(count))
    if shape is None:
        return batch, index
    rows, length, slots = shape
    sizes = dict.fromkeys(("tokens", "segment_ids", "positions", "token_types", "lm_weights"), 1)

    def pad(x, axis_sizes, fill=0):
        widths = [(0, n - have) for n, have in zip(axis_sizes, x.shape, strict=False)]
        widths += [(0, 0)] * (x.ndim - len(widths))
        return np.pad(x, widths, constant_values=fill)

    fields = {
        field.name: pad(value, (rows, length if field.name in sizes else slots))
        for field in dataclasses.fields(batch)
        if (value := getattr(batch, field.name)) is not None
    }
    return Batch(**fields), pad(index, (rows, slots), -1)


# LLVM's expensive passes change no result and take most of a test's time.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
fast_jit = functools.partial(jax.jit, compiler_options=FAST)


def fast_train_step(on, model, objective, optimizer, seed: int):
    """`step.jit_train_step`, compiled fast, with its seed bound."""
    step = step_lib.jit_train_step(on, model, objective, optimizer).__wrapped__
    step = fast_jit(step, donate_argnums=0)
    return lambda state, batch: step(state, batch, np.uint32(seed))


def placed(tree: Any, on) -> Any:
    """A copy of a state or of parameters on a mesh, in its layout; safe to donate."""
    copy = jax.tree.map(np.array, jax.device_get(tree))
    return jax.device_put(copy, mesh_lib.state_sharding(copy, on), may_alias=False)


def measure(model: GPT, objective: objective_lib.Objective) -> Callable[..., dict[str, Any]]:
    """A jitted (params, batch, key=None) -> loss, sums, gradients, states and logits of a batch."""

    @fast_jit
    def run(params, batch, key=None):
        def loss(params):
            sums, logits = objective_lib.forward(model, objective, params, batch, key)
            return objective_lib.joint(objective, sums, objective_lib.weights(batch)), (
                sums,
                logits,
            )

        (value, (sums, logits)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        states = gpt.run(
            model, params, batch.tokens, batch.segment_ids, batch.positions, batch.token_types,
            method="hidden",
        )  # fmt: skip
        lm_logits = gpt.run(model, params, states, method="lm_logits")
        return {
            "loss": value, "sums": sums, "gradients": grads, "states": states,
            "lm_logits": lm_logits, "task_logits": logits,
        }  # fmt: skip

    return run


@dataclasses.dataclass(frozen=True)
class Task:
    """A small fine-tuning problem with its compiled measurements."""

    spec: TaskSpec
    examples: Examples
    model: GPT
    params: Any
    objective: objective_lib.Objective
    measure: Callable[..., dict[str, Any]]
    shape: tuple[int, int, int]
    """Rows, tokens, slots that hold any packing of the examples: one compilation for all."""


@functools.cache
def task(kind: str) -> Task:
    """The same for every test file, so that each kind compiles once a run."""
    changes = {"classification": {"activation": "relu"}, "entailment": {"segment_types": 2}}
    spec, data = examples(kind, count=6)
    model = gpt.make_model(config(**changes.get(kind, {})), spec)
    objective = objective_lib.Objective(kind, 0.5)
    shape = (8, 128, 6)
    return Task(spec, data, model, params(model), objective, measure(model, objective), shape)


def assert_trees_close(actual: Any, expected: Any, tolerance: float) -> float:
    """Compares array by array: largest difference over its largest magnitude (1e-6 at least).

    Args:
      actual, expected: trees of arrays.
      tolerance: of the ratio.

    Returns:
      The largest ratio.
    """
    worst = 0.0
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape, jax.tree_util.keystr(path)
        if not x.size:
            continue
        ratio = np.abs(x - y).max() / max(np.abs(y).max(), 1e-6)
        assert ratio <= tolerance, f"{jax.tree_util.keystr(path)}: {ratio:.2e}"
        worst = max(worst, float(ratio))
    return worst


def outputs_by_hash_seed(code, seeds):
    """What a program prints in processes whose sets have different orders."""
    return {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
        ).stdout
        for seed in range(seeds)
    }  # fmt: skip


def attend(q_BTHK, k_BSHK, v_BSHK, visible_BTS, dropout_key=None):
    """`plain.attend` of [B, T, H, K]."""
    heads_first = (jnp.moveaxis(x, 2, 1) for x in (q_BTHK, k_BSHK, v_BSHK))
    y_BHTK = plain.attend(*heads_first, visible_BTS[:, None], dropout_key)
    return jnp.moveaxis(y_BHTK, 1, 2)
