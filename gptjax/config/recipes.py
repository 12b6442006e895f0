"""The named recipes. A recipe is a set of fields that differ from the defaults.

The paper is Radford et al. 2018. The authors' code is OpenAI's finetune-transformer-lm. The
candidates of an example are its token sequences, for example one for each answer.

paper      The hyper-parameters of the paper (its section 4.1). If the paper does not give a
           hyper-parameter, it is taken from the authors' code. These values are the defaults of
           `schema.py`. One difference is known: our batches hold about equal numbers of tokens
           (see `data/packing.py`), and the authors shuffle without regard to lengths.
original   The recipe `paper` in float32, with these properties of the authors' code:
           - Tokens, special tokens and positions are rows of one matrix, so the softmax of the LM
             covers the positions too. Embedding dropout is applied to that matrix, and the matrix
             after dropout is the LM head.
           - The candidates of an example share the dropout mask of the task head.
           - The LM loss is the mean over the tokens of each sequence, then over the sequences.
           - The optimizer is the authors' Adam with their schedule.
           - Each text of a pair is cut to (context length / 2) - 2 tokens.
           - Batches are shuffled without regard to lengths, and the last, smaller batch of an epoch
             is dropped.
           The text must be tokenised with the authors' tokenizer, which the mode `import` provides.
tutorial   A small model for pairs of texts. It has a segment embedding with a row for padding,
           ReLU, an untied LM head with a bias, and a task head that reads the hidden states of all
           positions. The loss is LM + 0.2 * task. Adam runs at a constant learning rate of 1e-4,
           without weight decay, warm-up or clipping. The dropout of embeddings, attention and
           residuals is 0.2.
modern     GPT-1 with the training methods of today: matrix products in bfloat16 (parameters,
           softmax, losses and Adam's moments stay float32), AdamW (in pretraining with beta2 0.95
           and weight decay 0.1), and no dropout of the attention weights, so that cuDNN's fused
           attention can be used.

Three differences between `original` and the authors' code remain. Their softmax covers the
positions of the longest text in the data, and our softmax covers all positions and the padding
token. Their code also evaluates during the first epoch, after 1,000, 2,000, 4,000, ... updates. If
epochs have equal scores, their code keeps the first epoch, and our code keeps the last epoch.
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

# Name of a recipe -> part of the experiment (such as `model`) -> field -> value. For a part inside
# a part, such as `optimizer`, the value is a dictionary of fields again.
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
    """Returns a copy of the experiment with the fields of a recipe.

    Parts that the experiment does not have, such as `pretrain`, are not added.

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
