"""The named recipes, and all that tells them apart.

paper      what the paper says, and where it is silent what its authors' code does: the defaults of
           `config.py` (Radford et al. 2018, section 4.1). But that batches hold about equal numbers
           of tokens (`data.packing.deal`), where theirs are shuffled by examples alone.
original   what the authors' released fine-tuning code does besides: tokens, special tokens and
           positions are rows of one matrix, so that the softmax of the LM covers positions too;
           embedding dropout is applied to that matrix, and the dropped matrix is the LM head; the
           candidates of an example share the classifier's dropout mask; the LM loss is the mean
           over each sequence's tokens, then over the sequences; the authors' Adam and schedule; two
           texts are cut to half a context less two tokens each; batches are shuffled by examples
           alone, and an epoch's last, smaller one is dropped. (As in every recipe, the checkpoint
           with the best validation score is kept.) It needs text tokenised as the authors did:
           `--mode=import` does so.
tutorial   a small model on pairs: a segment embedding with a row for padding, ReLU, an untied LM
           head with bias, a task head on the states of all positions, LM + 0.2 * task, Adam at
           a constant 1e-4 without decay, warm-up and clipping, dropout 0.2 on embeddings,
           attention and residuals.
modern     GPT-1 as one would train it today: products in bfloat16 (parameters, softmax, losses and
           Adam's moments in float32), AdamW (in pretraining with beta2 0.95 and decay 0.1), and no
           dropout on the attention weights, which cuDNN's fused attention does not have as we do.

Of the authors' code remains: their softmax covers the positions up to the longest text of the data
only, ours all of them and the padding token; their first epoch is also scored after 1,000, 2,000,
4,000, ... updates; and of epochs with equal scores they keep the first, we the last.
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

# Name -> part of the experiment -> field -> value; a field with fields of its own is a dictionary.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {},
    "original": {
        "model": {"dtype": "float32", "one_matrix": True, "head_dropout_shared": True},
        "finetune": {
            "lm_mean": "sequence",
            "cut": "half",
            "drop_last": True,
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
    """Returns the experiment with the recipe's fields; parts that it does not have stay absent.

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
