"""Folders of Hugging Face's `openai-gpt` model: config.json, model.safetensors, tokenizer.

OpenAIGPTModel, OpenAIGPTLMHeadModel      the decoder
OpenAIGPTDoubleHeadsModel                 and the head of a multiple choice
OpenAIGPTForSequenceClassification        and that of a classification or entailment
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

import numpy as np
import safetensors.numpy

from gptjax.config.schema import Activation, ModelConfig, TaskKind, TaskSpec
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.data.tokens.tokenizer import (
    DELIMITER,
    EXTRACT,
    PADDING,
    SPECIALS,
    START,
    UNKNOWN,
    Tokenizer,
)
from gptjax.errors import UserError, require
from gptjax.interop import arrays as arrays_lib
from gptjax.interop.arrays import BIAS, BLOCK, KERNEL, POSITIONS, TOKENS, Arrays, Weights
from gptjax.io import files as files_lib

_THEIRS = (
    "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
    "ln_1.weight", "ln_1.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
    "mlp.c_proj.bias", "ln_2.weight", "ln_2.bias",
)  # fmt: skip
_EMBEDDINGS = {"tokens_embed.weight": TOKENS, "positions_embed.weight": POSITIONS}
_PREFIX, _LM_HEAD, _SCORE = "transformer.", "lm_head.weight", "score.weight"
_CHOICE = "multiple_choice_head.summary"
_ACTIVATIONS = {"gelu": Activation.GELU_TANH, "relu": Activation.RELU}
_FILE, _INDEX, _PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
# Masks and position numbers that older versions saved along.
_CONSTANTS = re.compile(r"(h\.\d+\.attn\.bias|position_ids)$")


def _ours(name: str) -> str:
    """Their name of an array -> "LAYER/name", an embedding, or itself where it is neither."""
    found = re.fullmatch(r"h\.(\d+)\.(.+)", name)
    if found and found[2] in _THEIRS:
        return f"{int(found[1])}/{BLOCK[_THEIRS.index(found[2])]}"
    return _EMBEDDINGS.get(name, name)


def _their(name: str) -> str:
    layer, _, rest = name.partition("/")
    if layer.isdigit():
        return f"{_PREFIX}h.{layer}.{_THEIRS[BLOCK.index(rest)]}"
    return _PREFIX + next(theirs for theirs, ours in _EMBEDDINGS.items() if ours == name)


def read(folder: pathlib.Path, exact: bool = True) -> Weights:
    """Reads a folder that `save_pretrained`, or `write`, wrote.

    Args:
      folder: where it lies.
      exact: cut text into words as GPT-1's authors did (`data/words.py`), where the folder does not
        hold a tokenizer of ours.

    Raises:
      UserError: a missing or damaged file, arrays that do not fit, an output layer that is not
        the token embedding.
    """
    values = files_lib.read_json(folder / "config.json")
    files = _files(folder)
    found: Arrays = {}
    for path in files:
        found |= arrays_lib.read_safetensors(path)
    arrays = {
        _ours(name.removeprefix(_PREFIX)): array
        for name, array in found.items()
        if not _CONSTANTS.search(name)
    }
    _untie(arrays, folder)
    side = arrays_lib.read_side(files)
    if side or not _is_ours(folder):
        # The side files have the head whole; another's read a token that ours will not end in.
        arrays = {
            name: each for name, each in arrays.items() if not name.startswith((_SCORE, _CHOICE))
        }
    if side:
        stacked = arrays_lib.stack_layers(arrays, side.model, str(folder))
        return Weights(side.model, stacked | side.arrays, side.tokenizer, side.task)
    model = _config(values, folder)
    tokenizer = _tokenizer(folder, exact)
    head, task = _head(arrays, values, folder)
    if not _is_ours(folder):
        require(TOKENS in arrays, f"{folder}: missing tokens_embed.weight")
        arrays[TOKENS] = arrays_lib.with_specials(arrays[TOKENS], tokenizer, str(folder))
    model = dataclasses.replace(model, vocab_size=len(arrays.get(TOKENS, ())))
    return Weights(
        model, arrays_lib.stack_layers(arrays, model, str(folder)) | head, tokenizer, task
    )


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / _FILE).exists():
        return [folder / _FILE]
    if (folder / _INDEX).exists():
        index = files_lib.read_json(folder / _INDEX)
        try:
            return [folder / name for name in sorted(set(index["weight_map"].values()))]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / _INDEX}: has no weight_map") from error
    require(
        not (folder / _PICKLE).exists(),
        f"{folder}: has its weights in {_PICKLE} only, a pickle, which can run any code; write "
        "them anew with transformers: AutoModel.from_pretrained(FOLDER).save_pretrained(OTHER)",
    )
    raise UserError(f"{folder}: has no {_FILE}; give a folder that save_pretrained wrote")


def _untie(arrays: Arrays, folder: pathlib.Path) -> None:
    """Takes the output layer away: it is the token embedding, saved once or twice."""
    output = arrays.pop(_LM_HEAD, None)
    if output is None:
        return
    tokens = arrays.setdefault(TOKENS, output)
    require(
        np.array_equal(tokens, output),
        f"{folder}: {_LM_HEAD} is not the token embedding; an output layer of its own is not GPT-1",
    )


def _config(values: Any, folder: pathlib.Path) -> ModelConfig:
    where = folder / "config.json"
    require(
        isinstance(values, dict) and values.get("model_type") == "openai-gpt",
        f"{where}: model_type must be openai-gpt",
    )
    activation = values.get("afn", "gelu")
    require(
        activation in _ACTIVATIONS,
        f"{where}: afn is {activation!r}; it must be one of {', '.join(_ACTIVATIONS)}",
    )
    usual = ModelConfig()
    return ModelConfig(
        context_length=values.get("n_positions", usual.context_length),
        num_layers=values.get("n_layer", usual.num_layers),
        width=values.get("n_embd", usual.width),
        num_heads=values.get("n_head", usual.num_heads),
        activation=_ACTIVATIONS[activation],
        embedding_dropout=values.get("embd_pdrop", usual.embedding_dropout),
        attention_dropout=values.get("attn_pdrop", usual.attention_dropout),
        residual_dropout=values.get("resid_pdrop", usual.residual_dropout),
        head_dropout=values.get("summary_first_dropout", usual.head_dropout),
        init_std=values.get("initializer_range", usual.init_std),
        layer_norm_epsilon=values.get("layer_norm_epsilon", usual.layer_norm_epsilon),
    )


def _tokenizer(folder: pathlib.Path, exact: bool) -> Tokenizer:
    """Ours where `tokenizer.json` has our special tokens, else GPT-1's with its vocabulary."""
    path = folder / "tokenizer.json"
    if path.exists() and _is_ours(folder):
        return tokenizer_lib.load(path)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if vocabulary.exists() and merges.exists():
        return tokenizer_lib.load_gpt1(str(vocabulary), str(merges), exact)
    require(path.exists(), f"{folder}: has neither vocab.json and merges.txt nor tokenizer.json")
    return tokenizer_lib.from_huggingface(files_lib.read_json(path), str(path), exact)


def _is_ours(folder: pathlib.Path) -> bool:
    """Whether its tokenizer has our special tokens."""
    path = folder / "tokenizer.json"
    added = folder / "added_tokens.json"
    texts = [file.read_text(encoding="utf-8") for file in (path, added) if file.exists()]
    return any(f'"{EXTRACT}"' in text for text in texts)


def _head(arrays: Arrays, values: Any, folder: pathlib.Path) -> tuple[Arrays, TaskSpec | None]:
    """Takes the task head away. Their folders say nothing of columns: they get our usual names."""
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
        return {KERNEL: score.T, BIAS: no_bias}, task
    kernel, bias = (arrays.pop(f"{_CHOICE}.{part}", None) for part in ("weight", "bias"))
    if kernel is None or bias is None:
        return {}, None
    choices = ("choice1", "choice2")
    task = TaskSpec(TaskKind.MULTIPLE_CHOICE, "text", choices=choices, labels=("0", "1"))
    return {KERNEL: kernel.T, BIAS: bias}, task


def write(weights: Weights, folder: pathlib.Path) -> str:
    """Writes a folder for `from_pretrained`; returns the name of the class that reads all of it."""
    model = weights.model
    arrays_lib.require_plain(model)
    arrays = {_their(name): array for name, array in arrays_lib.split_layers(weights).items()}
    extra = {name: weights.arrays[name] for name in (KERNEL, BIAS) if name in weights.arrays}
    kind = weights.task.kind if weights.task else None
    architecture = "OpenAIGPTLMHeadModel"
    if kind == TaskKind.MULTIPLE_CHOICE:
        architecture = "OpenAIGPTDoubleHeadsModel"
        arrays[f"{_CHOICE}.weight"], arrays[f"{_CHOICE}.bias"] = extra[KERNEL].T, extra[BIAS]
        # This class ties the embedding to the output layer, the others the other way round.
        arrays[_LM_HEAD] = weights.arrays[TOKENS]
    elif kind and kind.is_single_sequence:
        architecture = "OpenAIGPTForSequenceClassification"
        arrays[_SCORE] = _score(weights)
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    safetensors.numpy.save_file(contiguous, folder / _FILE, metadata={"format": "pt"})
    values = _their_config(weights, architecture)
    (folder / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    _write_tokenizer(weights, folder)
    arrays_lib.write_side(weights, [folder / _FILE], extra)
    return architecture


def _score(weights: Weights) -> np.ndarray:
    """The head's kernel [O, D], its bias folded in: their head has none.

    The last layer norm gives h = g * n + b with sum(n) = 0, so that sum(h / g) = sum(b / g) =: c
    whatever the text: adding bias / (c g) to the kernel adds the bias to the logits.
    """
    kernel, bias = weights.arrays[KERNEL], weights.arrays[BIAS].astype(np.float64)
    gain, shift = (weights.arrays[f"blocks/norm2/{name}"][-1] for name in ("scale", "bias"))
    gain = gain.astype(np.float64)
    constant = (shift / gain).sum()
    # What rounding of h costs: about as much as 1 / c is large against 1 / g.
    noise = np.abs(1 / gain).max() * np.abs(bias).max() * 1e-7 / max(abs(constant), 1e-30)
    require(
        noise < 1e-4 or not bias.any(),
        "`format`=huggingface: OpenAIGPTForSequenceClassification has no bias, and this head's "
        "cannot be folded into its kernel; it would give other predictions",
    )
    folded = bias[:, None] / (constant * gain) if bias.any() else 0.0
    return (kernel.T + folded).astype(np.float32)


def _their_config(weights: Weights, architecture: str) -> dict[str, Any]:
    model, tokenizer = weights.model, weights.tokenizer
    values: dict[str, Any] = {
        "model_type": "openai-gpt", "architectures": [architecture],
        "vocab_size": model.vocab_size, "n_positions": model.context_length,
        "n_embd": model.width, "n_layer": model.num_layers, "n_head": model.num_heads,
        "afn": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == model.activation),
        "embd_pdrop": model.embedding_dropout, "attn_pdrop": model.attention_dropout,
        "resid_pdrop": model.residual_dropout, "summary_first_dropout": model.head_dropout,
        "initializer_range": model.init_std, "layer_norm_epsilon": model.layer_norm_epsilon,
        "summary_type": "cls_index", "summary_use_proj": True, "summary_proj_to_labels": True,
        "bos_token_id": tokenizer.start_id, "pad_token_id": tokenizer.padding_id,
    }  # fmt: skip
    if weights.task and architecture == "OpenAIGPTForSequenceClassification":
        labels = weights.task.labels
        values["id2label"] = dict(enumerate(labels))
        values["label2id"] = {label: i for i, label in enumerate(labels)}
    return values


def _write_tokenizer(weights: Weights, folder: pathlib.Path) -> None:
    """Writes `tokenizer.json`, or where that cannot cut text as ours does, the pair for theirs."""
    tokenizer = weights.tokenizer
    files = {"tokenizer.json": tokenizer.to_json()}
    kind = "PreTrainedTokenizerFast"
    if tokenizer.exact:
        pair = tokenizer_lib.pair_texts(tokenizer)
        assert pair is not None
        kind = "OpenAIGPTTokenizer"
        files = {
            "vocab.json": pair[0],
            "merges.txt": pair[1],
            "added_tokens.json": json.dumps({name: tokenizer.token_id(name) for name in SPECIALS}),
        }
    values = {
        "tokenizer_class": kind, "model_max_length": weights.model.context_length,
        "unk_token": UNKNOWN, "bos_token": START, "sep_token": DELIMITER, "cls_token": EXTRACT,
        "pad_token": PADDING,
        # As here: a text that spells a special token is text.
        "split_special_tokens": True,
    }  # fmt: skip
    files["tokenizer_config.json"] = json.dumps(values, indent=2)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
