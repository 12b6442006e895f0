"""Fine-tunes a pretrained GPT-1 on your labelled file with the paper's hyper-parameters.

    python launch.py --config=gpt1_finetune --config.init_from=runs/gpt1_pretrain \
        --config.finetune.train_file=train.tsv --config.finetune.text=sentence

The hyper-parameters are a learning rate of 6.25e-5, batches of 32, 3 epochs, a warm-up over 0.2% of
the training and a linear decay, lambda 0.5, and a dropout of 0.1 before the classifier (Radford et
al. 2018, section 4.1). The sizes and the tokenizer are those of `init_from`.

`--config=gpt1_finetune:original` and `:modern` use other recipes (gptjax/config/recipes.py).
`--config.finetune.dataset=nyu-mll/glue:mrpc` reads a data set of the Hugging Face hub instead of a
file.
"""

from gptjax.config import Experiment, FinetuneConfig, ModelConfig, recipes


def get_config(recipe: str = "paper") -> Experiment:
    """Returns the experiment; it needs `--config.init_from`, the training file and its columns."""
    experiment = Experiment(
        name="gpt1_finetune",
        model=ModelConfig(dtype="bfloat16"),
        finetune=FinetuneConfig(),
    )
    return recipes.apply(experiment, recipe)
