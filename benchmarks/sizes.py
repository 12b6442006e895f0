"""The sizes that are measured, and their configurations for gptjax."""

import dataclasses

from gptjax.config.schema import ModelConfig, OptimizerConfig
from gptjax.errors import nearest, require

LEARNING_RATE = 2.5e-4
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
LM_WEIGHT = 0.5
INIT_STD = 0.02
EPSILON = 1e-5
DROPOUT = 0.1


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes of a model and of a batch."""

    name: str
    num_layers: int
    width: int
    num_heads: int
    vocab_size: int
    """Number of tokens, with the special ones."""
    context_length: int
    """Rows of the position embedding, and tokens of a pretraining sequence."""
    batch_size: int
    """Sequences of a pretraining step."""


SIZES = {
    size.name: size
    for size in (
        # The vocabulary of the released model without special tokens.
        Size("gpt1", 12, 768, 12, 40_478, 512, 4),
        Size("tutorial", 4, 256, 4, 14_000, 128, 16),
        # This size is for tests of the harness itself. Its timings mean nothing.
        Size("tiny", 2, 32, 2, 500, 64, 4),
    )
}


def find(name: str) -> Size:
    """Returns the size with this name; raises `UserError` if there is none."""
    require(
        name in SIZES,
        f"--size={name}: must be one of {', '.join(SIZES)}{nearest(name, SIZES)}",
    )
    return SIZES[name]


def model_config(size: Size, dtype: str, dropout: float = DROPOUT) -> ModelConfig:
    """Returns gptjax's configuration of a size, in "float32" or "bfloat16"."""
    return ModelConfig(
        vocab_size=size.vocab_size,
        context_length=size.context_length,
        num_layers=size.num_layers,
        width=size.width,
        num_heads=size.num_heads,
        embedding_dropout=dropout,
        attention_dropout=dropout,
        residual_dropout=dropout,
        head_dropout=dropout,
        init_std=INIT_STD,
        layer_norm_epsilon=EPSILON,
        dtype=dtype,
    )


def optimizer_config() -> OptimizerConfig:
    """Returns AdamW as in all implementations: constant rate, weight decay, global clipping."""
    return OptimizerConfig(
        learning_rate=LEARNING_RATE,
        schedule="constant",
        weight_decay=WEIGHT_DECAY,
        clip_norm=CLIP_NORM,
    )
