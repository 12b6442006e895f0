"""Fine-tunes the small model of a tutorial on pairs of texts, with the loss LM + 0.2 * task.

    python launch.py --config=tutorial \
        --config.finetune.train_file=msr_paraphrase_train.txt \
        --config.finetune.test_file=msr_paraphrase_test.txt

The task head of this model reads the states of all positions. Tests compare the losses and the head
with a float64 reference. The score on MRPC was not measured.
"""

from gptjax.config import Experiment, FinetuneConfig, ModelConfig, TokenizerConfig, recipes


def get_config() -> Experiment:
    """Returns the experiment; it needs the files of MRPC, or others and their columns."""
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
