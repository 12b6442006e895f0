"""Small trainings on rows in memory, called from Python, that several tests share."""

import datasets
import runs

from gptjax.config.schema import (
    Experiment,
    FinetuneConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
)
from gptjax.train.progress import Reporter

SPLITS = {"train": (64, 1), "validation": (21, 2), "test": (19, 3)}


class Recorder(Reporter):
    """Keeps all messages and progress."""

    def __init__(self):
        self.lines, self.statuses, self.calls = [], [], []

    def say(self, text):
        self.lines.append(text)

    def begin(self, stage, total_steps, start_step):
        self.calls.append(("begin", stage, total_steps, start_step))

    def update(self, status):
        self.statuses.append(status)

    def end(self):
        self.calls.append("end")


def experiment(**changes) -> Experiment:
    """Returns an experiment with the model of `runs.TINY`."""
    model = ModelConfig(
        num_layers=1, width=16, num_heads=2, context_length=16, unroll=1, init_std=0.2,
        vocab_size=96, embedding_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0,
        head_dropout=0.0,
    )  # fmt: skip
    return Experiment(model=model, tokenizer=TokenizerConfig(vocab_size=80), **changes)


def finetuning(**changes) -> FinetuneConfig:
    """Returns the fine-tuning of `runs.files().finetune`, without its files."""
    optimizer = OptimizerConfig(learning_rate=0.02, schedule="linear", warmup_fraction=0.002)
    return FinetuneConfig(**({"batch_size": 8, "steps": 40, "optimizer": optimizer} | changes))


def tables() -> dict[str, dict[str, datasets.Dataset]]:
    """Returns the rows of the files in `runs.files()`."""
    rows = {name: datasets.Dataset.from_list(runs.rows(*size)) for name, size in SPLITS.items()}
    return {"finetune": rows}
