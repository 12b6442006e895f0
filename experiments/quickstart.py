"""Pretrains on Python's docstrings, then fine-tunes to tell whether the words are in order.

    python launch.py

The pretraining has about 530,000 training tokens. The fine-tuning has 4,936 sentences of other
docstrings, and no module is in two splits. The words of every second sentence are shuffled. A
linear model counts words and pairs of words, so it sees little of their order. At the end the same
fine-tuning runs from random weights, to show the gain of pretraining.

RESULTS
"""

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
        # GPT-1's init_std of 0.02 suits its width of 768. Small models train faster if init_std is
        # about 1 / sqrt(width).
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
            dataset="builtin:word_order",
            # A wrong order can be anywhere in the sentence, and the mean of all states shows it.
            head="mean",
            batch_size=32,
            epochs=3,
            compare_from_scratch=True,
            optimizer=OptimizerConfig(learning_rate=2e-3, schedule="linear", warmup_fraction=0.1),
        ),
    )
