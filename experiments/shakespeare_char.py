"""Trains a tiny character model with GPT-1's architecture, like the first example of nanoGPT.

    python launch.py --config=shakespeare_char --config.pretrain.train_files=input.txt
    python launch.py generate --checkpoint=runs/shakespeare_char --prompt='ROMEO:'

The model has 4 layers of width 128 with 4 heads, and a context of 64 characters. It trains for
2,000 steps with batches of 12 and without dropout. The last tenth of the text is held out.

Result on tiny Shakespeare (1.1 MB) with seed 0: the validation loss is 1.72 nats per character over
the whole held-out part, after 2 minutes on 2 cores of an Intel Xeon (2026-11-23).
"""

from gptjax.config import Experiment, ModelConfig, OptimizerConfig, PretrainConfig, TokenizerConfig


def get_config() -> Experiment:
    """Returns the experiment. It reads the text file input.txt by default."""
    return Experiment(
        name="shakespeare_char",
        model=ModelConfig(
            context_length=64,
            num_layers=4,
            width=128,
            num_heads=4,
            embedding_dropout=0.0,
            attention_dropout=0.0,
            residual_dropout=0.0,
            init_std=0.09,
            unroll=4,
        ),
        tokenizer=TokenizerConfig(kind="character"),
        pretrain=PretrainConfig(
            train_files="input.txt",
            line_breaks="keep",
            batch_size=12,
            steps=2000,
            eval_every=500,
            optimizer=OptimizerConfig(
                learning_rate=2e-3, warmup_fraction=0.05, beta2=0.99, weight_decay=0.1
            ),
        ),
    )
