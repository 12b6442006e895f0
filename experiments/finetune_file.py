"""Fine-tuning on your own labelled file (CSV, TSV, JSON lines or Parquet), columns by name."""

from gptjax.config import Experiment, FinetuneConfig, ModelConfig, OptimizerConfig, TokenizerConfig


def get_config() -> Experiment:
    """Returns the experiment; give it `--config.finetune.train_file` and the columns."""
    return Experiment(
        name="finetune_file",
        model=ModelConfig(
            context_length=128,
            num_layers=2,
            width=128,
            num_heads=4,
            # A few thousand rows from random weights: what is not held back is learnt by heart.
            embedding_dropout=0.6,
            residual_dropout=0.4,
            head_dropout=0.4,
            init_std=0.09,
            unroll=2,
        ),
        tokenizer=TokenizerConfig(vocab_size=8000),
        finetune=FinetuneConfig(
            batch_size=32,
            epochs=6,
            lm_weight=0.5,
            optimizer=OptimizerConfig(
                learning_rate=1e-3, schedule="linear", warmup_fraction=0.1, weight_decay=0.1
            ),
        ),
    )
