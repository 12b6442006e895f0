"""OpenAI's release of GPT-1: `params_0.npy` to `params_9.npy`, their shapes, and the vocabulary.

The ten files are one sequence of float32 numbers; `params_shapes.json` says how it divides into the
position embedding, the token embedding and twelve arrays a layer. The special tokens are not in it:
they are drawn anew for each fine-tuning.
"""

import json
import math
import pathlib

import numpy as np

from gptjax.config.schema import ModelConfig
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.data.tokens.tokenizer import SPECIALS
from gptjax.errors import UserError, require
from gptjax.interop import arrays as arrays_lib
from gptjax.interop.arrays import BIAS, BLOCK, KERNEL, POSITIONS, TOKENS, Arrays, Weights
from gptjax.io import files as files_lib

_FILES, _SHAPES = 10, "params_shapes.json"
_VOCABULARY, _MERGES = "encoder_bpe_40000.json", "vocab_40000.bpe"
_HEAD_WIDTH = 64


def read(folder: pathlib.Path, exact: bool = True) -> Weights:
    """Reads the release, or what `write` wrote.

    Args:
      folder: where it lies.
      exact: cut text into words as the authors did (`data/words.py`); not asked of our own files.

    Raises:
      UserError: a missing or damaged file, or arrays that are not GPT-1's in number or shape.
    """
    files = [folder / f"params_{i}.npy" for i in range(_FILES)]
    named = _named(_arrays(folder, files))
    side = arrays_lib.read_side(files)
    if side:
        extra = dict(side.arrays)
        named[TOKENS] = np.concatenate([named[TOKENS], extra.pop(TOKENS)])
        arrays = arrays_lib.stack_layers(named, side.model, str(folder))
        return Weights(side.model, arrays | extra, side.tokenizer, side.task)
    pair = str(folder / _VOCABULARY), str(folder / _MERGES)
    tokenizer = tokenizer_lib.load_gpt1(*pair, exact)
    model = _config(named, folder)
    named[TOKENS] = arrays_lib.with_specials(named[TOKENS], tokenizer, str(folder))
    return Weights(model, arrays_lib.stack_layers(named, model, str(folder)), tokenizer)


def _arrays(folder: pathlib.Path, files: list[pathlib.Path]) -> list[np.ndarray]:
    path = folder / _SHAPES
    try:
        shapes = [tuple(map(int, shape)) for shape in files_lib.read_json(path)]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: must be a list of shapes ({error})") from error
    flat = np.concatenate([_read_npy(file).reshape(-1) for file in files])
    sizes = [math.prod(shape) for shape in shapes]
    require(
        flat.size == sum(sizes),
        f"{folder}: {files[0].name} to {files[-1].name} hold {flat.size:,} numbers, but {_SHAPES} "
        f"wants {sum(sizes):,}",
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


def _named(arrays: list[np.ndarray]) -> Arrays:
    named = dict(zip((POSITIONS, TOKENS), arrays, strict=False))
    for i, array in enumerate(arrays[2:]):
        layer, place = divmod(i, len(BLOCK))
        # The kernels are those of convolutions of width 1: [1, inputs, outputs].
        named[f"{layer}/{BLOCK[place]}"] = array[0] if array.ndim == 3 else array
    return named


def _config(named: Arrays, folder: pathlib.Path) -> ModelConfig:
    """The sizes that the shapes say; the number of heads, which they do not, is GPT-1's rule."""
    layers = (len(named) - 2) // len(BLOCK)
    shapes = [array.shape for array in named.values()][:2]
    require(
        layers > 0 and all(len(shape) == 2 for shape in shapes),
        f"{folder / _SHAPES}: GPT-1 has two embeddings and {len(BLOCK)} arrays a layer",
    )
    (context, width), (rows, _) = shapes
    require(
        width % _HEAD_WIDTH == 0,
        f"{folder / _SHAPES}: a width of {width} does not divide into heads of {_HEAD_WIDTH}",
    )
    return ModelConfig(
        vocab_size=rows + len(SPECIALS), context_length=context, num_layers=layers, width=width,
        num_heads=width // _HEAD_WIDTH,
    )  # fmt: skip


def write(weights: Weights, folder: pathlib.Path) -> str:
    """Writes the weights in the layout of the release; returns what went into the side files."""
    arrays_lib.require_plain(weights.model)
    pair = tokenizer_lib.pair_texts(weights.tokenizer)
    require(pair, "`format`=openai: a character tokenizer has no vocabulary/merges pair")
    assert pair is not None
    named = arrays_lib.split_layers(weights)
    extra = {TOKENS: named[TOKENS][weights.own_rows :]}
    extra |= {name: weights.arrays[name] for name in (KERNEL, BIAS) if name in weights.arrays}
    named[TOKENS] = named[TOKENS][: weights.own_rows]
    arrays = [array[None] if name.endswith("kernel") else array for name, array in named.items()]
    shapes = json.dumps([array.shape for array in arrays])
    (folder / _SHAPES).write_text(shapes, encoding="utf-8")
    flat = np.concatenate([array.reshape(-1) for array in arrays])
    files = [folder / f"params_{i}.npy" for i in range(_FILES)]
    for path, piece in zip(files, np.array_split(flat, _FILES), strict=True):
        np.save(path, piece, allow_pickle=False)
    for name, text in zip((_VOCABULARY, _MERGES), pair, strict=True):
        (folder / name).write_text(text, encoding="utf-8")
    arrays_lib.write_side(weights, files, extra)
    return "special tokens" + (" and the task head" if KERNEL in extra else "")
