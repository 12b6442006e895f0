"""Measures what pretraining and the auxiliary LM loss contribute to five tasks, with a small GPT.

    python launch.py ablate --config=ablation --seeds=3 \
        --config.pretrain.train_files='books/*.txt' --config.ablation.tasks.rte.train_file=...

The tasks are SST-2, MRPC, RTE, STS-B and COPA. Each task needs your own training file with the
columns of GLUE. Flags such as `--config.ablation.tasks.TASK.text` set other names of columns. Each
task is fine-tuned from the pretrained model, from random weights, and without the auxiliary LM
loss.

docs/ablation.md has the complete command and its table. The medians of three seeds, averaged over
the tasks, are 62.0 for the complete method, 59.1 without pretraining, and 62.0 without the LM loss.
The pretraining took 12 minutes, and then the fine-tuning runs took 79 minutes, on 2 cores of an
Intel Xeon that other programs used too (2026-11-23).
"""

from gptjax.config import (
    AblationConfig,
    Experiment,
    FinetuneConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TokenizerConfig,
)


def _task(kind: str, text: str, text_pair: str = "", **more) -> FinetuneConfig:
    return FinetuneConfig(
        task=kind,
        text=text,
        text_pair=text_pair,
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="linear", warmup_fraction=0.1),
        **more,
    )


def get_config() -> Experiment:
    """Returns the experiment. It needs text files to pretrain on, and a training file of each task.

    The flags `--config.pretrain.train_files` and `--config.ablation.tasks.TASK.train_file` name the
    files.
    """
    return Experiment(
        name="ablation",
        model=ModelConfig(
            context_length=128, num_layers=3, width=128, num_heads=4, init_std=0.09, unroll=3
        ),
        tokenizer=TokenizerConfig(vocab_size=4000),
        pretrain=PretrainConfig(
            batch_size=16,
            steps=3000,
            eval_every=1000,
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_fraction=0.1, beta2=0.98),
        ),
        ablation=AblationConfig(
            tasks={
                "sst2": _task("classification", "sentence"),
                "mrpc": _task(
                    "similarity", "sentence1", "sentence2", metrics="f1,accuracy", epochs=2
                ),
                "rte": _task("entailment", "sentence1", "sentence2"),
                "stsb": _task(
                    "regression", "sentence1", "sentence2", metrics="pearson,spearman", epochs=2
                ),
                "copa": _task("multiple_choice", "premise", choices="choice1,choice2", epochs=10),
            }
        ),
    )
