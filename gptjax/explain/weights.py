"""The model in the page: its parameters in float16, and what its tokenizer and its rows need.

`static/live/` computes the forward pass from this object, which `docs/explain_json.md` describes.
"""

import base64
import functools
import json
from typing import Any

import jax
import numpy as np
import tokenizers

from gptjax.config.schema import TaskKind, TaskSpec
from gptjax.data.tokens import normalize
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.data.tokens.tokenizer import END_OF_WORD, UNKNOWN, Tokenizer
from gptjax.errors import UserError, require
from gptjax.infer.predictor import GPT
from gptjax.mesh import Params
from gptjax.parameters import PARAMETERS

BY_DEFAULT, AT_MOST = 2_000_000, 20_000_000
"""The largest numbers of parameters that travel without and with a wish."""

# The options of our own byte-pair encodings, which alone the page computes.
_BPE = {
    "dropout": None, "unk_token": UNKNOWN, "continuing_subword_prefix": None,
    "end_of_word_suffix": END_OF_WORD, "fuse_unk": False, "byte_fallback": False,
    "ignore_merges": False,
}  # fmt: skip
_FLOAT16_MAX = float(np.finfo(np.float16).max)


def of(gpt: GPT, wanted: bool = False) -> dict[str, Any] | None:
    """Returns the object `weights` of the page, or None if the parameters do not travel.

    Args:
      gpt: the model.
      wanted: whether the user asked for the weights. Then up to 20 million parameters travel.
        Otherwise it is up to 2 million.

    Raises:
      UserError: the user asked for the weights, and they cannot travel.
    """
    try:
        arrays = _arrays(gpt, AT_MOST if wanted else BY_DEFAULT)
    except UserError:
        if wanted:
            raise
        return None
    large = np.concatenate([np.asarray(x, np.float16).ravel() for x in arrays.values()])
    return {
        "arrays": [{"name": name, "shape": list(x.shape)} for name, x in arrays.items()],
        "float16": base64.b64encode(large.astype("<f2").tobytes()).decode(),
        "epsilon": gpt.config.layer_norm_epsilon,
        "input": _input(gpt.task),
        "tokenizer": _tokenizer(gpt.tokenizer),
    }


def _arrays(gpt: GPT, limit: int) -> dict[str, np.ndarray]:
    """Returns name -> float32 array, in the order of `gptjax.parameters.PARAMETERS`."""
    known = not (gpt.config.one_matrix or (gpt.task and gpt.task.flatten))
    require(
        known,
        f"`weights`: {gpt.path}: the page cannot compute models with `model.one_matrix` or "
        "`finetune.flatten`; leave it out",
    )
    count = sum(x.size for x in jax.tree.leaves(gpt.params))
    require(
        count <= limit,
        f"`weights`: {gpt.path} has {count:,} parameters, and a page holds at most {limit:,}; "
        "leave it out, and use `gptjax.Changes` in Python",
    )
    arrays = {}
    for name in PARAMETERS:
        found = _find(gpt.params, name)
        if found is None:
            continue
        arrays[name] = np.asarray(found, np.float32)
        largest = float(np.abs(arrays[name]).max(initial=0))
        require(
            largest <= _FLOAT16_MAX,  # false for NaN too
            f"`weights`: {gpt.path}: {name} has a value of {largest:g}, and float16 ends at "
            f"{_FLOAT16_MAX:g}; leave it out",
        )
    return arrays


def _find(params: Params, name: str) -> Any:
    try:
        return functools.reduce(lambda tree, key: tree[key], name.split("/"), params)
    except KeyError:
        return None


def _input(task: TaskSpec | None) -> dict[str, Any] | None:
    """Returns how texts become sequences (`gptjax.data.tasks`); None for a language model."""
    if task is None:
        return None
    answers = task.kind is TaskKind.MULTIPLE_CHOICE
    return {
        "columns": list(task.text_columns),
        "answers": answers,
        "orders": 2 if task.kind.sums_candidates else 1,
        "windows": task.windows,
        "cut": str(task.cut),
        "keeps_end": answers and task.ends_in_question,
    }


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the vocabulary, the merges, and the name of the rules that make the words."""
    rules, merges = _rules(tokenizer), _merges(tokenizer)
    names = {
        "start": tokenizer.start_id, "delimiter": tokenizer.delimiter_id,
        "extract": tokenizer.extract_id, "padding": tokenizer.padding_id,
        "unknown": tokenizer.unknown_id,
    }  # fmt: skip
    return {
        "rules": rules,
        "exact": not tokenizer.exact,
        "tokens": [tokenizer.token(i) for i in range(len(tokenizer))],
        "merges": base64.b64encode(merges.astype("<u4").tobytes()).decode(),
        "special": names,
    }


def _rules(tokenizer: Tokenizer) -> str | None:
    """Returns `fast`, `english` or `characters`; None for words that the page does not know.

    The rules of the page are those of `normalize.py`. A file of a user can have others.
    """
    values = json.loads(tokenizer.to_json())
    model = values["model"]
    if tokenizer.exact:
        # The page cannot run ftfy and spaCy. The rules for such a vocabulary come close.
        return "english" if f"n't{END_OF_WORD}" in model["vocab"] else "fast"
    if model["type"] == "BPE" and any(model.get(name) != value for name, value in _BPE.items()):
        return None
    for rules, known in _known().items():
        if all(values[name] == known[name] for name in ("normalizer", "pre_tokenizer")):
            return rules if (model["type"] == "WordLevel") == (rules == "characters") else None
    return None


@functools.cache
def _known() -> dict[str, dict[str, Any]]:
    """Returns the name of rules -> a serialised tokenizer that has them."""
    found = {}
    for rules, english in (("fast", False), ("english", True)):
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.normalizer = normalize.normalizer()
        backend.pre_tokenizer = normalize.pre_tokenizer(english)
        found[rules] = json.loads(backend.to_str())
    return found | {"characters": json.loads(tokenizer_lib.train_characters("a").to_json())}


def _merges(tokenizer: Tokenizer) -> np.ndarray:
    """Returns the ids of both parts of each merge, in the order of their ranks: int [M, 2]."""
    pair = tokenizer_lib.vocabulary_pair(tokenizer)
    if pair is None:
        return np.zeros((0, 2), np.int64)
    vocabulary, lines = pair
    # A space inside a part does not occur, because spaces separate words.
    ids = [[vocabulary[part] for part in line.split(" ")] for line in lines]
    return np.asarray(ids, np.int64).reshape(-1, 2)
