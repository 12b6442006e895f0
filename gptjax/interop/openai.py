"""OpenAI's release of GPT-1: `params_0.npy` to `params_9.npy`, their shapes, and the vocabulary.

The ten files together are one sequence of float32 numbers. `params_shapes.json` gives the shapes of
the arrays in this sequence: the position embedding, the token embedding and twelve arrays for each
layer. The release has no special tokens. Their rows of the token embedding are drawn at random when
the release is imported.
"""

import dataclasses
import json
import math
import pathlib

import numpy as np

from gptjax.config.schema import ModelConfig
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.data.tokens.tokenizer import SPECIALS
from gptjax.errors import UserError, require
from gptjax.interop import arrays as arrays_lib
from gptjax.interop.arrays import BLOCK_PARAMETERS, Arrays, Weights
from gptjax.io import files as files_lib
from gptjax.parameters import TOKEN_EMBEDDING, in_openai_order

_NUM_FILES, _SHAPES_FILE = 10, "params_shapes.json"
_VOCABULARY_FILE, _MERGES_FILE = "encoder_bpe_40000.json", "vocab_40000.bpe"
_HEAD_WIDTH = 64


def read(folder: pathlib.Path, exact: bool = True) -> Weights:
    """Reads the release, or a folder that `write` has written.

    Args:
      folder: the folder with the files.
      exact: whether text is split into words as GPT-1's authors did, with ftfy and spaCy. It is not
        used for a folder that `write` has written, because such a folder has its own tokenizer.

    Raises:
      UserError: a file is missing or damaged, or the arrays are not the arrays of a GPT-1.
    """
    files = [folder / f"params_{i}.npy" for i in range(_NUM_FILES)]
    named = _by_name(_read_arrays(folder, files))
    side = arrays_lib.read_side_files(files)
    if side:
        special = side.arrays.pop(TOKEN_EMBEDDING)
        named[TOKEN_EMBEDDING] = np.concatenate([named[TOKEN_EMBEDDING], special])
        arrays = arrays_lib.stack_layers(named, side.model, str(folder))
        return dataclasses.replace(side, arrays=arrays | side.arrays)
    pair = str(folder / _VOCABULARY_FILE), str(folder / _MERGES_FILE)
    tokenizer = tokenizer_lib.load_gpt1(*pair, exact)
    model = _model_config(named, folder)
    arrays_lib.add_special_tokens(named, tokenizer, str(folder))
    return Weights(model, arrays_lib.stack_layers(named, model, str(folder)), tokenizer)


def _read_arrays(folder: pathlib.Path, files: list[pathlib.Path]) -> list[np.ndarray]:
    """Returns the arrays in the order of the release."""
    path = folder / _SHAPES_FILE
    try:
        shapes = [tuple(map(int, shape)) for shape in files_lib.read_json(path)]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: must be a list of shapes ({error})") from error
    flat = np.concatenate([_read_npy(file).reshape(-1) for file in files])
    sizes = [math.prod(shape) for shape in shapes]
    require(
        flat.size == sum(sizes),
        f"{folder}: {files[0].name} to {files[-1].name} hold {flat.size:,} numbers, but "
        f"{_SHAPES_FILE} wants {sum(sizes):,}",
    )
    pieces = np.split(flat, np.cumsum(sizes)[:-1])
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _read_npy(path: pathlib.Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False).astype(np.float32)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not an array of numbers ({error})") from error


def _by_name(arrays: list[np.ndarray]) -> Arrays:
    """Returns the arrays with the names that `arrays.split_layers` gives them.

    Args:
      arrays: the arrays in the order of the release.
    """
    embeddings = in_openai_order(stacked=False)
    named = {one.path: array for one, array in zip(embeddings, arrays, strict=False)}
    for i, array in enumerate(arrays[len(embeddings) :]):
        layer, place = divmod(i, len(BLOCK_PARAMETERS))
        # The release stores weight matrices as convolutions of width 1: [1, inputs, outputs].
        matrix = array[0] if array.ndim == 3 else array
        named[f"{layer}/{BLOCK_PARAMETERS[place].path_in_block}"] = matrix
    return named


def _model_config(named: Arrays, folder: pathlib.Path) -> ModelConfig:
    """Returns the model sizes that follow from the shapes, with heads of GPT-1's width, 64."""
    layers = (len(named) - 2) // len(BLOCK_PARAMETERS)
    shapes = [array.shape for array in named.values()][:2]
    require(
        layers > 0 and all(len(shape) == 2 for shape in shapes),
        f"{folder / _SHAPES_FILE}: GPT-1 has two embeddings and {len(BLOCK_PARAMETERS)} arrays a "
        "layer",
    )
    (context, width), (rows, _) = shapes
    require(
        width % _HEAD_WIDTH == 0,
        f"{folder / _SHAPES_FILE}: a width of {width} does not divide into heads of {_HEAD_WIDTH}",
    )
    return ModelConfig(
        vocab_size=rows + len(SPECIALS), context_length=context, num_layers=layers, width=width,
        num_heads=width // _HEAD_WIDTH,
    )  # fmt: skip


def write(weights: Weights, folder: pathlib.Path) -> str:
    """Writes a model in the format of the release.

    Args:
      weights: the model.
      folder: an existing folder.

    Returns:
      A description of the contents of the side files, for the user.

    Raises:
      UserError: the format cannot store a part of the model.
    """
    arrays_lib.require_plain(weights.model)
    pair = tokenizer_lib.pair_texts(weights.tokenizer)
    require(pair, "`format`=openai: a character tokenizer has no vocabulary/merges pair")
    assert pair is not None
    named = arrays_lib.split_layers(weights)
    table, ordinary = named[TOKEN_EMBEDDING], weights.num_ordinary_tokens
    named[TOKEN_EMBEDDING] = table[:ordinary]
    arrays = [array[None] if name.endswith("kernel") else array for name, array in named.items()]
    shapes = json.dumps([array.shape for array in arrays])
    (folder / _SHAPES_FILE).write_text(shapes, encoding="utf-8")
    flat = np.concatenate([array.reshape(-1) for array in arrays])
    files = [folder / f"params_{i}.npy" for i in range(_NUM_FILES)]
    for path, piece in zip(files, np.array_split(flat, _NUM_FILES), strict=True):
        np.save(path, piece, allow_pickle=False)
    for name, text in zip((_VOCABULARY_FILE, _MERGES_FILE), pair, strict=True):
        (folder / name).write_text(text, encoding="utf-8")
    extra = {TOKEN_EMBEDDING: table[ordinary:]} | weights.task_head
    arrays_lib.write_side_files(weights, files, extra)
    return "special tokens" + (" and the task head" if weights.task_head else "")
