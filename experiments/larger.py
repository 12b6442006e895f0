"""Pretrains GPT-1's architecture with 350M, 1.3B or 6.7B parameters on a TPU slice.

    python launch.py compile --config=larger:350m --topology=v5e:4x4
    python launch.py compile --config=larger:1b3 --topology=v5e:8x8
    python launch.py compile --config=larger:6b7 --topology=v5p:4x4x4
    python launch.py --config=larger:350m --config.pretrain.train_files='corpus/*.txt'

The models have 346, 1,297 and 6,620 million parameters. Layers, width, heads, context, batch size
and learning rate are the values of the GPT-3 of that size (Brown et al. 2020, table 2.1), except
that 1.3B has 16 heads of width 128 instead of 24 heads. The number of steps gives about 20 tokens
for each parameter (Hoffmann et al. 2022). The rest is the same as in GPT-1: layer norms after the
residual sums (post-LN), GELU, the tied embedding and learned positions.

The training runs have not been made in this project, which has no accelerator. docs/larger.md gives
the cost of a step, which is estimated from the compiled program. Post-LN models of this depth might
need a longer warm-up.
"""

import dataclasses

from gptjax.config import (
    Experiment,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TokenizerConfig,
)
from gptjax.errors import nearest, require


@dataclasses.dataclass(frozen=True)
class _Size:
    num_layers: int
    width: int
    num_heads: int
    batch_size: int
    steps: int
    learning_rate: float
    mesh: MeshConfig


_SIZES = {
    "350m": _Size(24, 1024, 16, 256, 14_000, 0.0003, MeshConfig(data=-1)),
    "1b3": _Size(24, 2048, 16, 512, 25_000, 0.0002, MeshConfig(data=-1, fsdp=8)),
    "6b7": _Size(32, 4096, 32, 1024, 64_000, 0.00012, MeshConfig(data=1, fsdp=-1)),
}


def get_config(size: str = "350m") -> Experiment:
    """Returns the experiment of a size. It needs `--config.pretrain.train_files`."""
    require(size in _SIZES, f"the size must be one of {', '.join(_SIZES)}{nearest(size, _SIZES)}")
    own = _SIZES[size]
    return Experiment(
        name=f"gpt_{size}",
        model=ModelConfig(
            context_length=2048,
            num_layers=own.num_layers,
            width=own.width,
            num_heads=own.num_heads,
            dtype="bfloat16",
            remat="full",
        ),
        # With the four special tokens the embedding has 40,960 rows. This number is a multiple of
        # 128, and of the number of devices in each topology that the docstring above names.
        tokenizer=TokenizerConfig(vocab_size=40956),
        pretrain=PretrainConfig(
            batch_size=own.batch_size,
            steps=own.steps,
            eval_every=1000,
            eval_batches=20,
            validation_fraction=0.001,
            optimizer=OptimizerConfig(
                learning_rate=own.learning_rate, warmup_steps=1000, beta2=0.95, weight_decay=0.1
            ),
        ),
        mesh=own.mesh,
    )
