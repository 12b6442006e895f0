"""Fine-tunes the small model of a tutorial on pairs of texts, with the loss LM + 0.2 * task.

    python launch.py --config=tutorial \
        --config.finetune.train_file=msr_paraphrase_train.txt \
        --config.finetune.test_file=msr_paraphrase_test.txt

The files are the training and test files of MRPC. The task head of this model reads the hidden
states of all positions. Tests compare the losses and the task head with a float64 reference. The
score on MRPC was not measured.
"""

from gptjax.config import Experiment, FinetuneConfig, ModelConfig, TokenizerConfig, recipes


def get_config() -> Experiment:
    """Returns the experiment. It needs the files of MRPC.

    Other files need flags for their columns, because the default columns are those of MRPC.
    """
    experiment = Experiment(
        name="tutorial",
        model=ModelConfig(context_length=128),
        tokenizer=TokenizerConfig(vocab_size=8000),
        finetune=FinetuneConfig(
            task="entailment", text="#1 String", text_pair="#2 String", label="Quality",
            metrics="accuracy,f1", epochs=6,
        ),
    )  # fmt: skip
    return recipes.apply(experiment, "tutorial")
