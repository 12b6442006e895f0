"""GPT-1's architecture with 6.7B parameters, planned for a v5p:4x4x4 slice.

    python launch.py --mode=compile --config=experiments/gpt_6b7.py --topology=v5p:4x4x4
    python launch.py --config=experiments/gpt_6b7.py --config.pretrain.train_files='corpus/*.txt'

6,620 million parameters. Layers, width, context, batch and learning rate are those of the GPT-3
of this size (Brown et al. 2020, table 2.1), for about 20 tokens a parameter
(Hoffmann et al. 2022); post-LN, GELU, the tied embedding and learned positions are GPT-1's. Not
trained here: this project has no accelerator. What a step costs, by its compiled program, is in
docs/larger.md. Post-LN of this depth may need a longer warm-up.
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
        name="gpt_6b7",
        model=ModelConfig(
            context_length=2048,
            num_layers=32,
            width=4096,
            num_heads=32,
            dtype="bfloat16",
            remat="full",
        ),
        # With the four special tokens 40,960: a multiple of 128, and of every mesh.
        tokenizer=TokenizerConfig(vocab_size=40956),
        pretrain=PretrainConfig(
            batch_size=1024,
            steps=64_000,
            eval_every=1000,
            eval_batches=20,
            validation_fraction=0.001,
            optimizer=OptimizerConfig(
                learning_rate=0.00012, warmup_steps=1000, beta2=0.95, weight_decay=0.1
            ),
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
