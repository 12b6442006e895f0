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
        model=ModelConfig(context_length=128, num_layers=3, width=128, num_heads=4, unroll=3),
        tokenizer=TokenizerConfig(vocab_size=4000),
        pretrain=PretrainConfig(
            dataset="builtin",
            batch_size=16,
            steps=400,
            save_every=200,
            optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=40),
        ),
        finetune=FinetuneConfig(
            dataset="builtin:classification",
            batch_size=32,
            epochs=3,
            compare_from_scratch=True,
            optimizer=OptimizerConfig(learning_rate=1e-3, schedule="linear", warmup_fraction=0.1),
        ),
    )
