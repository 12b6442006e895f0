"""The tutorial's model: pairs of texts, a task head on all positions, LM + 0.2 * task.

    python launch.py --config=experiments/tutorial.py \
        --config.finetune.train_file=msr_paraphrase_train.txt \
        --config.finetune.test_file=msr_paraphrase_test.txt

Its losses and its head are tested against float64; what it reaches on MRPC was not measured.
"""

from gptjax.config import Experiment, FinetuneConfig, ModelConfig, TokenizerConfig, recipes


def get_config() -> Experiment:
    """Returns the experiment; give it MRPC's files, or others and their columns."""
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
