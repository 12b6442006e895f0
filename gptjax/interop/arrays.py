"""A model as named arrays, the part that the formats of OpenAI and Hugging Face share.

Both formats store the same numbers as our checkpoints, but every layer by itself, where our arrays
hold all layers; and the heads, and query, key and value, are side by side in one matrix. What a
format has no place for (special tokens, a task head, the description of the task) goes into two
files beside it, `gptjax.json` and `gptjax.safetensors`. So reading what was written gives back
every bit. No pickle is ever read.
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
import safetensors.flax
import safetensors.numpy
from flax import traverse_util

from gptjax import parameters
from gptjax.config import schema
from gptjax.config.schema import ModelConfig, TaskSpec
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.data.tokens.tokenizer import SPECIALS, Tokenizer
from gptjax.errors import UserError, brief, require
from gptjax.io.files import read_json
from gptjax.parameters import POSITION_EMBEDDING, TASK_HEAD_BIAS, TASK_HEAD_KERNEL, TOKEN_EMBEDDING

Arrays = dict[str, np.ndarray]

_SIDE_FILE, _SIDE_ARRAYS_FILE = "gptjax.json", "gptjax.safetensors"

BLOCK_PARAMETERS = parameters.in_openai_order(stacked=True)


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model with its tokenizer and task, without the state of its training."""

    model: ModelConfig
    arrays: Arrays
    """float32, by path in our parameter tree ("blocks/norm1/scale")."""
    tokenizer: Tokenizer
    task: TaskSpec | None = None

    @property
    def num_ordinary_tokens(self) -> int:
        """Number of tokens before the special tokens."""
        return len(self.tokenizer) - len(SPECIALS)

    @property
    def task_head(self) -> Arrays:
        """The arrays of the task head; empty if there is none."""
        names = (TASK_HEAD_KERNEL, TASK_HEAD_BIAS)
        return {name: self.arrays[name] for name in names if name in self.arrays}


def flatten(params: Mapping[str, Any]) -> Arrays:
    """Returns the arrays of a parameter tree by path, float32."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {path: np.asarray(array, np.float32) for path, array in flat.items()}


def unflatten(arrays: Arrays) -> dict[str, Any]:
    """Returns the parameter tree of arrays by path."""
    return traverse_util.unflatten_dict(arrays, sep="/")


def _shape(parameter: parameters.Parameter, model: ModelConfig) -> tuple[int, ...]:
    """Returns the shape of a parameter in the parameter tree."""
    sizes = {
        "D": model.width, "F": model.hidden_ffn_width, "3": 3, "H": model.num_heads,
        "K": model.head_width, "T": model.context_length, "V": model.vocab_size,
    }  # fmt: skip
    layers = (model.num_layers,) if parameter.stacked else ()
    return (*layers, *(sizes[letter] for letter in parameter.shape))


def _as_matrix(parameter: parameters.Parameter, array: np.ndarray) -> np.ndarray:
    """Returns a layer's array as [inputs, outputs] or [outputs].

    Heads, and query, key and value, are joined to one axis.
    """
    if parameter.role != parameters.Role.KERNEL:
        return array.reshape(-1)
    if parameter.shape.endswith("D"):
        return array.reshape(-1, array.shape[-1])
    return array.reshape(array.shape[0], -1)


def split_layers(weights: Weights) -> Arrays:
    """Returns the model's arrays, one for each layer, in the order of OpenAI's release.

    Returns:
      Both embeddings by their path; and for each layer "LAYER/PATH", where PATH is that in a block,
      as matrices [inputs, outputs] and vectors.
    """
    return _split(weights.arrays, weights.model.num_layers)


def _split(arrays: Arrays, num_layers: int) -> Arrays:
    found = {name: arrays[name] for name in (POSITION_EMBEDDING, TOKEN_EMBEDDING)}
    for layer in range(num_layers):
        for parameter in BLOCK_PARAMETERS:
            array = arrays[parameter.path][layer]
            found[f"{layer}/{parameter.path_in_block}"] = _as_matrix(parameter, array)
    return found


def stack_layers(found: Arrays, model: ModelConfig, where: str) -> Arrays:
    """Returns arrays by path in our parameter tree: the inverse of `split_layers`.

    Args:
      found: what `split_layers` returns.
      model: the sizes that the arrays must have.
      where: name of the arrays' source in error messages.

    Raises:
      UserError: it names every array that is missing, not expected or of another shape, or one that
        is not finite.
    """
    layers = len({name.partition("/")[0] for name in found} - {POSITION_EMBEDDING, TOKEN_EMBEDDING})
    require(
        model.num_layers <= layers,
        f"{where}: the configuration has {model.num_layers} layers, the weights {layers}",
    )
    # Arrays of zeros without memory of their own.
    embeddings = parameters.in_openai_order(stacked=False)
    zeros = {
        parameter.path: np.broadcast_to(0.0, _shape(parameter, model))
        for parameter in (*embeddings, *BLOCK_PARAMETERS)
    }
    wanted = {name: array.shape for name, array in _split(zeros, model.num_layers).items()}
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"extra {name}" for name in found if name not in wanted]
    problems += [
        f"{name} is {list(found[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    require(not problems, f"{where}: the arrays do not fit the model: {'; '.join(problems)}")
    for name, array in found.items():
        require(np.isfinite(array).all(), f"{where}: {name} has values that are not finite")
    arrays = {parameter.path: found[parameter.path] for parameter in embeddings}
    for parameter in BLOCK_PARAMETERS:
        own = [found[f"{i}/{parameter.path_in_block}"] for i in range(model.num_layers)]
        arrays[parameter.path] = np.stack(own).reshape(zeros[parameter.path].shape)
    return arrays


def require_plain(model: ModelConfig) -> None:
    """Checks that the formats of GPT-1 have a place for everything in the model.

    Raises:
      UserError: they have none.
    """
    problem = ""
    if model.segment_types:
        problem = "the model has a segment embedding; the format has no place for it"
    elif not model.tied:
        problem = (
            "the LM head is not tied to the token embedding; the format has no place for another"
        )
    elif model.hidden_ffn_width != 4 * model.width:
        problem = (
            f"the feed-forward layer is {model.hidden_ffn_width} wide; in the format it is always "
            f"four times the width, {4 * model.width}"
        )
    require(not problem, f"`mode`=export: {problem}")


def add_special_tokens(arrays: Arrays, tokenizer: Tokenizer, where: str) -> None:
    """Adds rows for our special tokens to the token embedding, which has none.

    The rows are drawn from N(0, 0.02) with a fixed seed.

    Args:
      arrays: those of the model, by the names of `split_layers`.
      tokenizer: of the model, with the special tokens.
      where: name of the arrays' source in error messages.

    Raises:
      UserError: the embedding and the tokenizer do not have the same number of ordinary tokens.
    """
    embedding, ordinary = arrays[TOKEN_EMBEDDING], len(tokenizer) - len(SPECIALS)
    require(
        len(embedding) == ordinary,
        f"{where}: the token embedding has {len(embedding)} rows, the vocabulary {ordinary} "
        "tokens; give the vocabulary that the weights were trained with",
    )
    drawn = np.random.default_rng(0).normal(0.0, 0.02, (len(SPECIALS), embedding.shape[1]))
    arrays[TOKEN_EMBEDDING] = np.concatenate([embedding, drawn.astype(np.float32)])


def read_safetensors(path: pathlib.Path) -> Arrays:
    """Reads the arrays of a file as float32.

    Raises:
      UserError: the file is damaged, or has arrays of integers or of values that are not finite.
    """
    try:
        found = safetensors.flax.load_file(path)  # JAX arrays, because NumPy has no bfloat16
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
    """Returns a hash of the contents of the files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_side_files(weights: Weights, files: Sequence[pathlib.Path], extra: Arrays) -> None:
    """Writes the side files.

    Args:
      weights: the model.
      files: the format's files with the other arrays, which are in the same folder.
      extra: the arrays that the format has no place for.
    """
    folder = files[0].parent
    values = {
        "model": dataclasses.asdict(weights.model),
        "task": weights.task and dataclasses.asdict(weights.task),
        "tokenizer": weights.tokenizer.to_json(),
        # Another program may replace the format's files and leave the side files as they are.
        # With the hash a reader notices that they no longer belong together.
        "weights_sha256": _digest(files),
    }
    (folder / _SIDE_FILE).write_text(json.dumps(values, indent=2), encoding="utf-8")
    arrays = {name: np.ascontiguousarray(array) for name, array in extra.items()}
    safetensors.numpy.save_file(arrays, folder / _SIDE_ARRAYS_FILE)


def read_side_files(files: Sequence[pathlib.Path]) -> Weights | None:
    """Reads the side files.

    Args:
      files: the format's files with the other arrays.

    Returns:
      Their contents, with those arrays that the format has no place for; None if there are no side
      files, or if they belong to other weights.

    Raises:
      UserError: they are damaged.
    """
    folder = files[0].parent
    path = folder / _SIDE_FILE
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
    return Weights(model, read_safetensors(folder / _SIDE_ARRAYS_FILE), tokenizer, task)
