"""Pretrains on Python's docstrings, then fine-tunes to tell whether the words are in order.

    python launch.py

The pretraining has about 530,000 training tokens. The fine-tuning has 4,936 sentences of the same
docstrings. The words of every second sentence are shuffled. No module is in two splits, so the
pretraining has not read the validation and test sentences. A linear model counts words and pairs of
words, so it sees little of their order. At the end the same fine-tuning runs from random weights,
to show the gain of pretraining.

Results on 2 cores of an Intel Xeon (Python 3.11, jax 0.10.2, 2026-11-27), seed 0:

    test accuracy with pretraining      84.9%
    test accuracy from random weights   77.4%
    linear model of the same rows       77.5%
    majority-class baseline             50.0%

Seeds 1 and 2 have 84.6% and 82.7% with pretraining, and 79.0% and 78.4% from random weights. The
perplexity after pretraining is 162.0 with seed 0. The run needs 1.9 GB of memory, and 2 minutes and
49 seconds in all, or less if an earlier run has filled the caches.
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
