"""GPT-1's architecture with 1.3B parameters, planned for a v5e:8x8 slice.

    python launch.py --mode=compile --config=experiments/gpt_1b3.py --topology=v5e:8x8
    python launch.py --config=experiments/gpt_1b3.py --config.pretrain.train_files='corpus/*.txt'

1,297 million parameters. Layers, width, context, batch and learning rate are those of the GPT-3
of this size (Brown et al. 2020, table 2.1, but 16 heads of 128 for its 24), for about 20 tokens a
parameter (Hoffmann et al. 2022); post-LN, GELU, the tied embedding and learned positions are
GPT-1's. Not trained here: this project has no accelerator. What a step costs, by its compiled
program, is in docs/larger.md. Post-LN of this depth may need a longer warm-up.
"""

from gptjax.config import (
    Experiment,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TokenizerConfig,
)


def get_config() -> Experiment:
    """Returns the experiment; give it `--config.pretrain.train_files`."""
    return Experiment(
        name="gpt_1b3",
        model=ModelConfig(
            context_length=2048,
            num_layers=24,
            width=2048,
            num_heads=16,
            dtype="bfloat16",
            remat="full",
        ),
        # With the four special tokens 40,960: a multiple of 128, and of every mesh.
        tokenizer=TokenizerConfig(vocab_size=40956),
        pretrain=PretrainConfig(
            batch_size=512,
            steps=25_000,
            eval_every=1000,
            eval_batches=20,
            validation_fraction=0.001,
            optimizer=OptimizerConfig(
                learning_rate=0.0002, warmup_steps=1000, beta2=0.95, weight_decay=0.1
            ),
        ),
        mesh=MeshConfig(data=-1, fsdp=8),
    )
