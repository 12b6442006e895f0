"""A model as named arrays. This code is shared by the formats of OpenAI and Hugging Face.

Both formats store the same numbers as our checkpoints, with two differences. Each layer has its own
arrays, but our arrays hold all layers. And the attention heads, and query, key and value, are
flattened into one axis of a matrix, but our arrays have separate axes for them.

A format may be unable to store a part of the model, such as special tokens, a task head, or the
description of the task. Such parts are stored in two more files of the same folder, the side files
`gptjax.json` and `gptjax.safetensors`. So an exported model can be imported again without any
change of a bit. Pickles are never read.
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

SIDE_FILES = _SIDE_FILE, _SIDE_ARRAYS_FILE = "gptjax.json", "gptjax.safetensors"
"""The names of the side files: the description of the model, and its further arrays."""

BLOCK_PARAMETERS = parameters.in_openai_order(stacked=True)


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model with its tokenizer and task, without the state of its training."""

    model: ModelConfig
    arrays: Arrays
    """Path in our parameter tree (for example "blocks/norm1/scale") -> array, float32."""
    tokenizer: Tokenizer
    task: TaskSpec | None = None
    temperature: float = 1.0
    """The number that divides the task logits (see `gptjax.evaluate.calibration`)."""

    @property
    def num_ordinary_tokens(self) -> int:
        """The number of tokens without the special tokens, whose ids come last."""
        return len(self.tokenizer) - len(SPECIALS)

    @property
    def task_head(self) -> Arrays:
        """The arrays of the task head; empty if the model has no task head."""
        names = (TASK_HEAD_KERNEL, TASK_HEAD_BIAS)
        return {name: self.arrays[name] for name in names if name in self.arrays}


def flatten(params: Mapping[str, Any]) -> Arrays:
    """Returns a dictionary from paths to float32 arrays, made from a parameter tree."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {path: np.asarray(array, np.float32) for path, array in flat.items()}


def unflatten(arrays: Arrays) -> dict[str, Any]:
    """Returns a parameter tree, made from a dictionary from paths to arrays."""
    return traverse_util.unflatten_dict(arrays, sep="/")


def _shape(parameter: parameters.Parameter, model: ModelConfig) -> tuple[int, ...]:
    """Returns the shape that a parameter has in our parameter tree."""
    sizes = {
        "D": model.width, "F": model.hidden_ffn_width, "3": 3, "H": model.num_heads,
        "K": model.head_width, "T": model.context_length, "V": model.vocab_size,
    }  # fmt: skip
    layers = (model.num_layers,) if parameter.stacked else ()
    return (*layers, *(sizes[letter] for letter in parameter.shape))


def _as_matrix(parameter: parameters.Parameter, array: np.ndarray) -> np.ndarray:
    """Returns the array of one layer, reshaped to [inputs, outputs] or [outputs].

    The axes of the attention heads, and of query, key and value, are flattened into one axis.
    """
    if parameter.role != parameters.Role.KERNEL:
        return array.reshape(-1)
    if parameter.shape.endswith("D"):
        return array.reshape(-1, array.shape[-1])
    return array.reshape(array.shape[0], -1)


def split_layers(weights: Weights) -> Arrays:
    """Returns separate arrays for each layer, in the order of OpenAI's release.

    Returns:
      Name -> array. The names of the two embeddings are their paths. The other names are
      "LAYER/PATH", where PATH is the path of the parameter in a block. Their arrays are matrices
      [inputs, outputs] or vectors.
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
    """Returns arrays that hold all layers. This is the inverse of `split_layers`.

    Args:
      found: arrays with the names and shapes that `split_layers` gives them.
      model: the sizes that the arrays must have.
      where: the name of the arrays' source in error messages.

    Returns:
      Path in our parameter tree -> array.

    Raises:
      UserError: an array is missing, not expected, of another shape, or not finite.
    """
    layers = len({name.partition("/")[0] for name in found} - {POSITION_EMBEDDING, TOKEN_EMBEDDING})
    require(
        model.num_layers <= layers,
        f"{where}: the configuration has {model.num_layers} layers, the weights {layers}",
    )
    # Arrays of zeros that use no memory. Their shapes are the expected shapes.
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
    """Checks that the formats of GPT-1 can store the decoder of the model.

    Raises:
      UserError: the model has a segment embedding, an untied LM head or another feed-forward width.
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
    """Adds rows for our special tokens to a token embedding without such rows.

    The new rows are drawn from a normal distribution with standard deviation 0.02, with a fixed
    seed.

    Args:
      arrays: the arrays of the model, with the names that `split_layers` gives them.
      tokenizer: the tokenizer of the model, with the special tokens.
      where: the name of the arrays' source in error messages.

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
      UserError: the file is damaged, or an array has integers or values that are not finite.
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
    """Writes the side files `gptjax.json` and `gptjax.safetensors`.

    Args:
      weights: the model.
      files: the files with the arrays that the format can store. The side files are written to the
        folder of these files.
      extra: the arrays that the format cannot store.
    """
    folder = files[0].parent
    values = {
        "model": dataclasses.asdict(weights.model),
        "task": weights.task and dataclasses.asdict(weights.task),
        "temperature": weights.temperature,
        "tokenizer": weights.tokenizer.to_json(),
        # Another program may replace the files of the format and leave the side files. This hash
        # shows a reader that they no longer belong together.
        "weights_sha256": _digest(files),
    }
    (folder / _SIDE_FILE).write_text(json.dumps(values, indent=2), encoding="utf-8")
    arrays = {name: np.ascontiguousarray(array) for name, array in extra.items()}
    safetensors.numpy.save_file(arrays, folder / _SIDE_ARRAYS_FILE)


def read_side_files(files: Sequence[pathlib.Path]) -> Weights | None:
    """Reads the side files `gptjax.json` and `gptjax.safetensors`.

    Args:
      files: the files with the arrays that the format can store.

    Returns:
      The contents of the side files, which hold only the arrays that the format cannot store.
      The result is None if there are no side files, or if `files` has changed since they were
      written.

    Raises:
      UserError: a side file is damaged.
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
        # Earlier versions wrote no temperature.
        temperature = float(values.get("temperature", 1.0))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is not what gptjax wrote ({error!r}); remove it") from error
    require(temperature > 0, f"{path}: the temperature is {temperature:g}; it must be above 0")
    arrays = read_safetensors(folder / _SIDE_ARRAYS_FILE)
    return Weights(model, arrays, tokenizer, task, temperature)
