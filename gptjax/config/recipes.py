"""The named recipes, each as the fields in which it differs from the defaults.

paper      The paper's hyper-parameters and, where the paper gives none, those of its authors' code:
           the defaults of `schema.py` (Radford et al. 2018, section 4.1). One difference is known:
           our batches hold about equal numbers of tokens (see `data/packing.py`), the authors' are
           shuffled by examples alone.
original   The paper's recipe with these properties of the authors' fine-tuning code:
           - Tokens, special tokens and positions are rows of one matrix, so the softmax of the LM
             covers the positions too. Embedding dropout is applied to that matrix, and the matrix
             after dropout is the LM head.
           - The candidates of an example share the dropout mask of the task head.
           - The LM loss is the mean over the tokens of each sequence, then over the sequences.
           - The optimizer is the authors' Adam with their schedule.
           - Two texts that are too long keep half a context less two tokens each.
           - Batches are shuffled by examples alone, and an epoch's last, smaller batch is dropped.
           The text has to be tokenised as the authors did: `--mode=import` brings their tokenizer.
tutorial   A small model on pairs of texts: a segment embedding with a row for padding, ReLU, an LM
           head of its own with a bias, a task head that reads the states of all positions, the loss
           LM + 0.2 * task, Adam at a constant 1e-4 without decay, warm-up and clipping, and dropout
           0.2 of embeddings, attention and residuals.
modern     GPT-1 with today's training: matrix products in bfloat16 (parameters, softmax, losses and
           Adam's moments stay float32), AdamW (in pretraining with beta2 0.95 and decay 0.1), and
           no dropout of the attention weights, so that cuDNN's fused attention can be used.

Three differences between `original` and the authors' code remain. Their softmax covers the
positions of the longest text in the data, ours covers all positions and the padding token. They
also score the first epoch after 1,000, 2,000, 4,000, ... updates. Of epochs with equal scores they
keep the first, we keep the last.
"""

import dataclasses
import typing
from typing import Any

from gptjax.config.schema import Experiment
from gptjax.errors import nearest, require

_TUTORIAL = {
    "learning_rate": 1e-4, "schedule": "constant", "warmup_steps": 0, "warmup_fraction": 0.0,
    "weight_decay": 0.0, "clip_norm": 0.0,
}  # fmt: skip

# Name -> part of the experiment -> field -> value. A part of a part is a dictionary again.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {},
    "original": {
        "model": {"dtype": "float32", "one_matrix": True, "head_dropout_shared": True},
        "finetune": {
            "lm_mean": "sequence", "cut": "half", "drop_last": True,
            "optimizer": {"algorithm": "openai"},
        },
    },
    "tutorial": {
        "model": {
            "dtype": "float32", "num_layers": 4, "width": 256, "num_heads": 4, "segment_types": 3,
            "activation": "relu", "tied": False, "embedding_dropout": 0.2,
            "attention_dropout": 0.2, "residual_dropout": 0.2, "head_dropout": 0.0,
        },
        "pretrain": {"optimizer": _TUTORIAL},
        "finetune": {
            "head": "flatten", "lm_weight": 1.0, "task_weight": 0.2,
            "batch_size": 32, "optimizer": _TUTORIAL,
        },
    },
    "modern": {
        "model": {"dtype": "bfloat16", "attention_dropout": 0.0},
        "pretrain": {"optimizer": {"beta2": 0.95, "weight_decay": 0.1}},
    },
}  # fmt: skip


def apply(experiment: Experiment, name: str) -> Experiment:
    """Returns a copy of the experiment with the recipe's fields; absent parts stay absent.

    Raises:
      UserError: there is no such recipe.
    """
    known = ", ".join(RECIPES)
    require(name in RECIPES, f"there is no recipe {name!r}{nearest(name, RECIPES)}; it is {known}")
    return _replaced(experiment, RECIPES[name])


def _replaced(config: Any, values: dict[str, Any]) -> Any:
    changes = {}
    for field, value in values.items():
        part = getattr(config, field)
        if dataclasses.is_dataclass(part):
            changes[field] = _replaced(part, typing.cast(dict[str, Any], value))
        elif part is not None:
            changes[field] = value
    return dataclasses.replace(config, **changes)
