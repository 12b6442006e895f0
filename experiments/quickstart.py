"""Quickstart."""

from gptjax.config import (
    Experiment,
    FinetuneConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TokenizerConfig,
)


def get_config() -> Experiment:
    """Returns the experiment."""
    return Experiment(
        name="quickstart",
        # GPT-1's 0.02 suits a width of 768; about 1 / sqrt(width) trains small models faster.
        model=ModelConfig(
            context_length=128, num_layers=3, width=128, num_heads=4, init_std=0.09, unroll=3
        ),
        tokenizer=TokenizerConfig(vocab_size=4000),
        pretrain=PretrainConfig(
            dataset="builtin",
            batch_size=8,
            steps=700,
            eval_every=350,
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_fraction=0.15, beta2=0.98),
        ),
        finetune=FinetuneConfig(
            dataset="builtin:classification",
            batch_size=32,
            epochs=3,
            compare_from_scratch=True,
            optimizer=OptimizerConfig(learning_rate=1e-3, schedule="linear", warmup_fraction=0.1),
        ),
    )
