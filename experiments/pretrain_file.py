"""Pretrains a small GPT on your own text files.

    python launch.py --config=pretrain_file --config.pretrain.train_files='books/*.txt'

The default is 2,000 steps of 2,048 tokens. If the lines of a file are wrapped at a fixed width
(many books are), the lines of each paragraph are joined.

Result on six novels (5.3 MB, 1.2 million training tokens, the last tenth of the text held out) with
seed 0: the validation loss is 4.68 nats per token and the perplexity is 107.9, after 15 minutes on
2 cores of an Intel Xeon that other programs used too (2026-11-23).
"""

from gptjax.config import Experiment, ModelConfig, OptimizerConfig, PretrainConfig, TokenizerConfig


def get_config() -> Experiment:
    """Returns the experiment. It needs `--config.pretrain.train_files`."""
    return Experiment(
        name="pretrain_file",
        model=ModelConfig(
            context_length=128, num_layers=4, width=192, num_heads=6, init_std=0.07, unroll=4
        ),
        tokenizer=TokenizerConfig(vocab_size=8000),
        pretrain=PretrainConfig(
            batch_size=16,
            steps=2000,
            eval_every=500,
            optimizer=OptimizerConfig(learning_rate=2e-3, warmup_fraction=0.1, beta2=0.98),
        ),
    )
