"""Folders of Hugging Face's `openai-gpt` models: config.json, model.safetensors, a tokenizer.

The task head of a model decides which class of the `transformers` library can load all of the
folder:

OpenAIGPTModel, OpenAIGPTLMHeadModel      no task head
OpenAIGPTDoubleHeadsModel                 the head of a multiple choice
OpenAIGPTForSequenceClassification        the head of a classification or entailment

"Their" in names and comments means Hugging Face's.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Collection
from typing import Any

import numpy as np
import safetensors.numpy

from gptjax.config.schema import Activation, ModelConfig, TaskKind, TaskSpec
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.data.tokens.tokenizer import EXTRACT, SPECIALS, UNKNOWN, Tokenizer
from gptjax.errors import UserError, require
from gptjax.interop import arrays as arrays_lib
from gptjax.interop.arrays import Arrays, Weights
from gptjax.io import files as files_lib
from gptjax.parameters import PARAMETERS, TASK_HEAD_BIAS, TASK_HEAD_KERNEL, TOKEN_EMBEDDING

# Our names of parameters (without "blocks/") -> their names (without "transformer." and
# "h.LAYER."). `_OURS` is the inverse.
_THEIRS = {row.path_in_block: row.huggingface for row in PARAMETERS.values() if row.huggingface}
_OURS = {theirs: ours for ours, theirs in _THEIRS.items()}
_PREFIX, _LM_HEAD, _SCORE = "transformer.", "lm_head.weight", "score.weight"
_CHOICE = "multiple_choice_head.summary"
# Their names of sizes, in config.json -> the names of our fields.
_SIZES = {
    "n_positions": "context_length", "n_embd": "width", "n_layer": "num_layers",
    "n_head": "num_heads", "afn": "activation", "embd_pdrop": "embedding_dropout",
    "attn_pdrop": "attention_dropout", "resid_pdrop": "residual_dropout",
    "summary_first_dropout": "head_dropout", "initializer_range": "init_std",
    "layer_norm_epsilon": "layer_norm_epsilon",
}  # fmt: skip
# Their names of activation functions -> our names.
_ACTIVATIONS = {"gelu": Activation.GELU_TANH, "relu": Activation.RELU}
_FILE, INDEX, _PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
SMALL_FILES = (
    "config.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json",
    *arrays_lib.SIDE_FILES,
)  # fmt: skip
"""The files that `read` reads if they are there, without the weights."""
# Arrays that are not read: masks and position ids, which older versions of `transformers` saved
# with the parameters.
_CONSTANTS = re.compile(r"(h\.\d+\.attn\.bias|position_ids)$")


def our_name(name: str) -> str:
    """Returns our name of an array, as `arrays.split_layers` gives it.

    An array that is not in the decoder keeps its name.

    Args:
      name: their name of the array, without "transformer.".
    """
    found = re.fullmatch(r"h\.(\d+)\.(.+)", name)
    if found and found[2] in _OURS:
        return f"{int(found[1])}/{_OURS[found[2]]}"
    return _OURS.get(name, name)


def _their_name(name: str) -> str:
    """Returns their name of an array.

    Args:
      name: our name of the array, as `arrays.split_layers` gives it.
    """
    layer, _, path = name.partition("/")
    return _PREFIX + (f"h.{layer}.{_THEIRS[path]}" if layer.isdigit() else _THEIRS[name])


def read(folder: pathlib.Path, exact: bool = True) -> Weights:
    """Reads a folder that `save_pretrained` or `write` wrote.

    Args:
      folder: the folder with the files.
      exact: whether text is split into words as GPT-1's authors did, with ftfy and spaCy. It is not
        used if the folder contains one of our tokenizers.

    Raises:
      UserError: a file is missing or damaged, the arrays do not fit the model, or the output layer
        differs from the token embedding.
    """
    values = files_lib.read_json(folder / "config.json")
    files = weight_files(folder)
    arrays = {
        our_name(name.removeprefix(_PREFIX)): array
        for path in files
        for name, array in arrays_lib.read_safetensors(path).items()
        if not _CONSTANTS.search(name)
    }
    _untie(arrays, folder)
    side = arrays_lib.read_side_files(files)
    special = side is not None or _has_our_tokens(folder)
    if side or not special:
        # The task head in these files is not used. If there are side files, they contain our head
        # with its bias. If our special tokens are missing, another program has trained the head to
        # read the hidden state at a token that is not our extract token.
        for name in [name for name in arrays if name.startswith((_SCORE, _CHOICE))]:
            del arrays[name]
    if side:
        stacked = arrays_lib.stack_layers(arrays, side.model, str(folder))
        return dataclasses.replace(side, arrays=stacked | side.arrays)
    model = _model_config(values, folder)
    tokenizer = _tokenizer(folder, exact)
    head, task = _pop_head(arrays, values, folder)
    if not special:
        require(TOKEN_EMBEDDING in arrays, f"{folder}: missing tokens_embed.weight")
        arrays_lib.add_special_tokens(arrays, tokenizer, str(folder))
    model = dataclasses.replace(model, vocab_size=len(arrays.get(TOKEN_EMBEDDING, ())))
    stacked = arrays_lib.stack_layers(arrays, model, str(folder))
    return Weights(model, stacked | head, tokenizer, task)


def require_weights(names: Collection[str], where: str) -> str:
    """Returns which of the files of a folder holds the weights, or lists the files that do.

    Args:
      names: the names of all files in the folder.
      where: the name of the folder in error messages.

    Raises:
      UserError: the folder has no weights, or has them only in a pickle.
    """
    for name in (_FILE, INDEX):
        if name in names:
            return name
    require(
        _PICKLE not in names,
        f"{where}: has its weights in {_PICKLE} only, a pickle, which can run any code; write "
        "them anew with transformers: AutoModel.from_pretrained(FOLDER).save_pretrained(OTHER)",
    )
    raise UserError(f"{where}: has no {_FILE}; give a folder that save_pretrained wrote")


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files with the arrays. There is one file, or an index that lists several.

    Raises:
      UserError: the folder has no weights, has them only in a pickle, or the index is damaged.
    """
    names = [path.name for path in folder.iterdir()]
    name = require_weights(names, str(folder))
    if name == INDEX:
        index = files_lib.read_json(folder / INDEX)
        try:
            names = sorted(set(index["weight_map"].values()))
            plain = all(name == pathlib.PurePath(name).name for name in names)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / INDEX}: has no weight_map") from error
        require(plain, f"{folder / INDEX}: weight_map must name files of the same folder")
        return [folder / name for name in names]
    return [folder / name]


def require_architecture(folder: pathlib.Path) -> None:
    """Checks config.json of a folder. Raises `UserError` if the model is not an `openai-gpt`."""
    _model_config(files_lib.read_json(folder / "config.json"), folder)


def _untie(arrays: Arrays, folder: pathlib.Path) -> None:
    """Removes the output layer, which is the token embedding under another name.

    A folder can contain the output layer, the token embedding, or both.

    Raises:
      UserError: the two arrays differ.
    """
    output = arrays.pop(_LM_HEAD, None)
    if output is None:
        return
    tokens = arrays.setdefault(TOKEN_EMBEDDING, output)
    require(
        np.array_equal(tokens, output),
        f"{folder}: {_LM_HEAD} is not the token embedding; an output layer of its own is not GPT-1",
    )


def _model_config(values: Any, folder: pathlib.Path) -> ModelConfig:
    """Returns the model configuration in config.json, without its vocabulary size.

    The vocabulary size is taken from the arrays later.
    """
    where = folder / "config.json"
    kind = values.get("model_type") if isinstance(values, dict) else None
    require(kind == "openai-gpt", f"{where}: model_type must be openai-gpt, not {kind}")
    activation = values.get("afn", "gelu")
    require(
        activation in _ACTIVATIONS,
        f"{where}: afn is {activation!r}; it must be one of {', '.join(_ACTIVATIONS)}",
    )
    sizes = {ours: values[theirs] for theirs, ours in _SIZES.items() if theirs in values}
    return ModelConfig(**sizes | {"activation": _ACTIVATIONS[activation]})


def _tokenizer(folder: pathlib.Path, exact: bool) -> Tokenizer:
    """Returns the tokenizer of a folder.

    If `write` has written a `tokenizer.json`, it is this tokenizer. Otherwise it is GPT-1's
    tokenizer with the vocabulary and the merges of the folder.
    """
    path = folder / "tokenizer.json"
    if path.exists() and _has_our_tokens(folder):
        return tokenizer_lib.load(path)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if vocabulary.exists() and merges.exists():
        return tokenizer_lib.load_gpt1(str(vocabulary), str(merges), exact)
    require(path.exists(), f"{folder}: has neither vocab.json and merges.txt nor tokenizer.json")
    return tokenizer_lib.from_huggingface(files_lib.read_json(path), str(path), exact)


def _has_our_tokens(folder: pathlib.Path) -> bool:
    """Returns whether the folder's tokenizer has our special tokens."""
    files = (folder / "tokenizer.json", folder / "added_tokens.json")
    texts = [file.read_text(encoding="utf-8") for file in files if file.exists()]
    return any(f'"{EXTRACT}"' in text for text in texts)


def _pop_head(arrays: Arrays, values: Any, folder: pathlib.Path) -> tuple[Arrays, TaskSpec | None]:
    """Removes the task head from the arrays.

    Returns:
      The arrays of the head with our names, and its task; {} and None if there is no head. The
      columns of the task have our default names, because these folders contain no column names.
    """
    score = arrays.pop(_SCORE, None)
    if score is not None:
        names = values.get("id2label") or {}
        labels = tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(len(score)))
        require(
            len(set(labels)) == len(labels) > 1,
            f"{folder}: {_SCORE} must be of two classes or more with different names, not "
            f"{', '.join(labels)}",
        )
        no_bias = np.zeros(len(score), np.float32)
        task = TaskSpec(TaskKind.CLASSIFICATION, "text", labels=labels)
        return {TASK_HEAD_KERNEL: score.T, TASK_HEAD_BIAS: no_bias}, task
    kernel, bias = (arrays.pop(f"{_CHOICE}.{part}", None) for part in ("weight", "bias"))
    if kernel is None or bias is None:
        return {}, None
    choices = ("choice1", "choice2")
    task = TaskSpec(TaskKind.MULTIPLE_CHOICE, "text", choices=choices, labels=("0", "1"))
    return {TASK_HEAD_KERNEL: kernel.T, TASK_HEAD_BIAS: bias}, task


def write(weights: Weights, folder: pathlib.Path) -> str:
    """Writes a folder that `from_pretrained` of the `transformers` library can read.

    Args:
      weights: the model.
      folder: an existing folder.

    Returns:
      The name of the class of `transformers` that reads the whole model.

    Raises:
      UserError: the format cannot store a part of the model.
    """
    arrays_lib.require_plain(weights.model)
    arrays = {_their_name(name): array for name, array in arrays_lib.split_layers(weights).items()}
    head = weights.task_head
    # Their task heads read the last state. A head that reads the mean state is in the side files.
    kind = weights.task.kind if weights.task and not weights.task.mean else None
    architecture = "OpenAIGPTLMHeadModel"
    if kind == TaskKind.MULTIPLE_CHOICE:
        architecture = "OpenAIGPTDoubleHeadsModel"
        arrays[f"{_CHOICE}.weight"] = head[TASK_HEAD_KERNEL].T
        arrays[f"{_CHOICE}.bias"] = head[TASK_HEAD_BIAS]
        # This class reads only the output layer, and uses it as the token embedding too. The other
        # classes read the token embedding.
        arrays[_LM_HEAD] = weights.arrays[TOKEN_EMBEDDING]
    elif kind and kind.is_single_sequence:
        architecture = "OpenAIGPTForSequenceClassification"
        arrays[_SCORE] = _kernel_with_bias(weights)
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    safetensors.numpy.save_file(contiguous, folder / _FILE, metadata={"format": "pt"})
    values = _their_config(weights, architecture)
    (folder / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    _write_tokenizer(weights, folder)
    arrays_lib.write_side_files(weights, [folder / _FILE], head)
    return architecture


def _kernel_with_bias(weights: Weights) -> np.ndarray:
    """Returns a weight matrix [O, D] that includes the effect of our task head's bias.

    Their task head has no bias. The last layer norm returns h = g * n + b, with the gain g, the
    bias b and the normalised hidden state n. The elements of n add up to 0, so sum(h / g) has the
    value c = sum(b / g) for every text. Therefore adding bias / (c * g) to the weight matrix adds
    the bias to the logits.

    Raises:
      UserError: c is so small that the rounding of h would change the logits.
    """
    kernel = weights.arrays[TASK_HEAD_KERNEL]
    bias = weights.arrays[TASK_HEAD_BIAS].astype(np.float64)
    gain, shift = (weights.arrays[f"blocks/norm2/{name}"][-1] for name in ("scale", "bias"))
    gain = gain.astype(np.float64)
    constant = (shift / gain).sum()
    # An estimate of the error in the logits that is caused by the float32 rounding of h.
    noise = np.abs(1 / gain).max() * np.abs(bias).max() * 1e-7 / max(abs(constant), 1e-30)
    require(
        noise < 1e-4 or not bias.any(),
        "`format`=huggingface: OpenAIGPTForSequenceClassification has no bias, and this head's "
        "cannot be folded into its kernel; it would give other predictions",
    )
    folded = bias[:, None] / (constant * gain) if bias.any() else 0.0
    return (kernel.T + folded).astype(np.float32)


def _their_config(weights: Weights, architecture: str) -> dict[str, Any]:
    """Returns the contents of config.json."""
    model, tokenizer = weights.model, weights.tokenizer
    values: dict[str, Any] = {
        "model_type": "openai-gpt", "architectures": [architecture], "vocab_size": model.vocab_size,
        **{theirs: getattr(model, ours) for theirs, ours in _SIZES.items()},
        "afn": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == model.activation),
        "summary_type": "cls_index", "summary_use_proj": True, "summary_proj_to_labels": True,
        "bos_token_id": tokenizer.start_id, "pad_token_id": tokenizer.padding_id,
    }  # fmt: skip
    if weights.task and architecture == "OpenAIGPTForSequenceClassification":
        labels = weights.task.labels
        values["id2label"] = dict(enumerate(labels))
        values["label2id"] = {label: i for i, label in enumerate(labels)}
    return values


def _write_tokenizer(weights: Weights, folder: pathlib.Path) -> None:
    """Writes `tokenizer.json`, or the files of `OpenAIGPTTokenizer` if the tokenizer is exact.

    A tokenizer is exact if ftfy and spaCy split its text into words. A `tokenizer.json` cannot
    describe that.
    """
    tokenizer = weights.tokenizer
    files = {"tokenizer.json": tokenizer.to_json()}
    kind = "PreTrainedTokenizerFast"
    if tokenizer.exact:
        pair = tokenizer_lib.pair_texts(tokenizer)
        assert pair is not None
        kind = "OpenAIGPTTokenizer"
        added = json.dumps({name: tokenizer.token_id(name) for name in SPECIALS})
        files = {"vocab.json": pair[0], "merges.txt": pair[1], "added_tokens.json": added}
    values = {
        "tokenizer_class": kind, "model_max_length": weights.model.context_length,
        "unk_token": UNKNOWN,
        **dict(zip(("bos_token", "sep_token", "cls_token", "pad_token"), SPECIALS, strict=True)),
        # The name of a special token inside a text is ordinary text, as in our tokenizer.
        "split_special_tokens": True,
    }  # fmt: skip
    files["tokenizer_config.json"] = json.dumps(values, indent=2)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
