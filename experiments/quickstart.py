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
        model=ModelConfig(context_length=128, num_layers=4, width=192, num_heads=6, unroll=4),
        tokenizer=TokenizerConfig(vocab_size=6000),
        pretrain=PretrainConfig(
            dataset="builtin",
            batch_size=16,
            steps=800,
            save_every=200,
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50),
        ),
        finetune=FinetuneConfig(
            dataset="builtin:entailment",
            task="entailment",
            text="text",
            text_pair="text_pair",
            batch_size=32,
            epochs=3,
            compare_from_scratch=True,
            optimizer=OptimizerConfig(
                learning_rate=3e-4, schedule="linear", warmup_fraction=0.1
            ),
        ),
    )
