"""Weights that travel: what `openai.py` and `huggingface.py` share.

Both formats hold the arrays that we hold, but one of each kind a layer where ours are stacked, and
with heads, q, k and v side by side in one matrix. What a format has no place for (special tokens, a
task head, the task) lies in side files, `gptjax.json` and `gptjax.safetensors`, so that reading
back what was written gives every bit. No pickle is ever read.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from gptjax.config import schema
from gptjax.config.schema import ModelConfig, TaskSpec
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.data.tokens.tokenizer import SPECIALS, Tokenizer
from gptjax.errors import UserError, brief, require
from gptjax.io.files import read_json

Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]

TOKENS, POSITIONS = "token_embedding", "position_embedding"
KERNEL, BIAS = "task_head/kernel", "task_head/bias"
# The arrays of a block, in the order of OpenAI's release.
BLOCK = (
    "attention/qkv/kernel", "attention/qkv/bias", "attention/out/kernel", "attention/out/bias",
    "norm1/scale", "norm1/bias", "ffn_in/kernel", "ffn_in/bias", "ffn_out/kernel", "ffn_out/bias",
    "norm2/scale", "norm2/bias",
)  # fmt: skip
_SIDE, _SIDE_ARRAYS = "gptjax.json", "gptjax.safetensors"


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model without its training."""

    model: ModelConfig
    arrays: Arrays
    """float32, by path in our parameter tree ("blocks/norm1/scale")."""
    tokenizer: Tokenizer
    task: TaskSpec | None = None

    @property
    def own_rows(self) -> int:
        """Rows of the token embedding before those of the special tokens."""
        return len(self.tokenizer) - len(SPECIALS)


@dataclasses.dataclass(frozen=True)
class Side:
    """What a format has no place for."""

    model: ModelConfig
    tokenizer: Tokenizer
    task: TaskSpec | None
    arrays: Arrays


def flatten(params: Mapping[str, Any], prefix: str = "") -> Arrays:
    """Nested parameters -> arrays by path."""
    found: Arrays = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{name}/")
        else:
            found[prefix + name] = np.asarray(value, np.float32)
    return found


def unflatten(arrays: Arrays) -> dict[str, Any]:
    """Arrays by path -> nested parameters."""
    params: dict[str, Any] = {}
    for path, array in arrays.items():
        *folders, name = path.split("/")
        place = params
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = array
    return params


def _stacked_shapes(model: ModelConfig) -> Shapes:
    """Our shapes of the arrays of all blocks, by name in a block."""
    width, ffn, heads = model.width, model.hidden_ffn_width, (model.num_heads, model.head_width)
    special = {
        "attention/qkv/kernel": (width, 3, *heads),
        "attention/qkv/bias": (3, *heads),
        "attention/out/kernel": (*heads, width),
        "ffn_in/kernel": (width, ffn),
        "ffn_in/bias": (ffn,),
        "ffn_out/kernel": (ffn, width),
    }
    return {name: (model.num_layers, *special.get(name, (width,))) for name in BLOCK}


def _as_matrix(name: str, array: np.ndarray) -> np.ndarray:
    """One block's array as [inputs, outputs] or [outputs]: heads, q, k and v side by side."""
    if name.endswith("out/kernel"):
        return array.reshape(-1, array.shape[-1])
    return array.reshape(array.shape[0], -1) if name.endswith("kernel") else array.reshape(-1)


def split_layers(weights: Weights) -> Arrays:
    """Returns both embeddings, and "LAYER/name" matrices and vectors of every block."""
    found = {name: weights.arrays[name] for name in (POSITIONS, TOKENS)}
    for layer in range(weights.model.num_layers):
        for name in BLOCK:
            array = weights.arrays[f"blocks/{name}"][layer]
            found[f"{layer}/{name}"] = _as_matrix(name, array)
    return found


def stack_layers(found: Arrays, model: ModelConfig, where: str) -> Arrays:
    """The inverse of `split_layers`.

    Raises:
      UserError: names every missing, extra and mis-shaped array, and one that is not finite.
    """
    there = len({name.partition("/")[0] for name in found} - {POSITIONS, TOKENS})
    require(
        model.num_layers <= there,
        f"{where}: the configuration has {model.num_layers} layers, the weights {there}",
    )
    ours = _stacked_shapes(model)
    wanted: Shapes = {
        POSITIONS: (model.context_length, model.width),
        TOKENS: (model.vocab_size, model.width),
    }
    for layer in range(model.num_layers):
        for name, shape in ours.items():
            wanted[f"{layer}/{name}"] = _as_matrix(name, np.broadcast_to(0.0, shape[1:])).shape
    require_shapes({name: array.shape for name, array in found.items()}, wanted, where)
    for name, array in found.items():
        require(np.isfinite(array).all(), f"{where}: {name} has values that are not finite")
    arrays = {name: found[name] for name in (TOKENS, POSITIONS)}
    for name, shape in ours.items():
        layers = [found[f"{layer}/{name}"] for layer in range(model.num_layers)]
        arrays[f"blocks/{name}"] = np.stack(layers).reshape(shape)
    return arrays


def require_shapes(found: Shapes, wanted: Shapes, where: str) -> None:
    """Names every missing, extra and mis-shaped array."""
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"extra {name}" for name in found if name not in wanted]
    problems += [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    require(not problems, f"{where}: the arrays do not fit the model: {'; '.join(problems)}")


def require_plain(model: ModelConfig) -> None:
    """Refuses what GPT-1's formats cannot say."""
    require(
        not model.segment_types,
        "`mode`=export: the model has a segment embedding; the format has no place for it",
    )
    require(
        model.tied,
        "`mode`=export: the LM head is not tied to the token embedding; the format has no place "
        "for another",
    )
    require(
        model.hidden_ffn_width == 4 * model.width,
        f"`mode`=export: the feed-forward layer is {model.hidden_ffn_width} wide; in the format it "
        f"is always four times the width, {4 * model.width}",
    )


def with_specials(tokens: np.ndarray, tokenizer: Tokenizer, where: str) -> np.ndarray:
    """Adds rows drawn from N(0, 0.02) for our special tokens to an embedding that has none."""
    own = len(tokenizer) - len(SPECIALS)
    require(
        len(tokens) == own,
        f"{where}: the token embedding has {len(tokens)} rows, the vocabulary {own} tokens; give "
        "the vocabulary that the weights were trained with",
    )
    drawn = np.random.default_rng(0).normal(0.0, 0.02, (len(SPECIALS), tokens.shape[1]))
    return np.concatenate([tokens, drawn.astype(np.float32)])


def read_safetensors(path: pathlib.Path) -> Arrays:
    """Reads the arrays of a file as float32; a broken one is a `UserError`."""
    try:
        # As JAX arrays: NumPy alone has no bfloat16.
        with safetensors.safe_open(path, framework="flax") as file:
            names = file.keys()
            found = {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: is damaged ({brief(error)})") from error
    for name, array in found.items():
        real = jnp.issubdtype(array.dtype, jnp.floating)
        require(real, f"{path}: {name} is {array.dtype}; quantised weights cannot be read")
        require(jnp.isfinite(array).all(), f"{path}: {name} has values that are not finite")
    return {name: np.asarray(array, np.float32) for name, array in found.items()}


def _digest(files: Sequence[pathlib.Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_side(weights: Weights, files: Sequence[pathlib.Path], extra: Arrays) -> None:
    """Writes the side files beside the `files` that hold the other arrays."""
    folder = files[0].parent
    task = weights.task and dataclasses.asdict(weights.task)
    side = {
        "model": dataclasses.asdict(weights.model),
        "task": task,
        "tokenizer": weights.tokenizer.to_json(),
        # Whoever writes other weights into the folder leaves side files that are not theirs.
        "weights_sha256": _digest(files),
    }
    (folder / _SIDE).write_text(json.dumps(side, indent=2), encoding="utf-8")
    arrays = {name: np.ascontiguousarray(array) for name, array in extra.items()}
    safetensors.numpy.save_file(arrays, folder / _SIDE_ARRAYS)


def read_side(files: Sequence[pathlib.Path]) -> Side | None:
    """Returns what lies beside `files`; None where nothing does, or what is of other weights."""
    folder = files[0].parent
    path = folder / _SIDE
    if not path.exists():
        return None
    values = read_json(path)
    try:
        if values["weights_sha256"] != _digest(files):
            return None
        model = schema.from_dict(ModelConfig, values["model"], str(path))
        tokenizer = tokenizer_lib.from_json(values["tokenizer"], str(path))
        task = TaskSpec.from_dict(values["task"]) if values["task"] else None
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: is not what gptjax wrote ({error!r}); remove it") from error
    return Side(model, tokenizer, task, read_safetensors(folder / _SIDE_ARRAYS))
