"""The tiny character model that nanoGPT's users know, with GPT-1's architecture.

python launch.py --config=experiments/shakespeare_char.py --config.pretrain.train_files=input.txt
"""

from gptjax.config import Experiment, ModelConfig, OptimizerConfig, PretrainConfig, TokenizerConfig


def get_config() -> Experiment:
    """Returns the experiment; give it the text file."""
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
                learning_rate=2e-3, warmup_steps=100, beta2=0.99, weight_decay=0.1
            ),
        ),
    )
