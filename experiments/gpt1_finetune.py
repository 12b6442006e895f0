"""Fine-tunes a pretrained GPT-1 on your labelled file with the paper's hyper-parameters.

    python launch.py --config=gpt1_finetune --config.init_from=runs/gpt1_pretrain \
        --config.finetune.train_file=train.tsv --config.finetune.text=sentence

The paper is Radford et al. 2018. The hyper-parameters of its section 4.1 are a learning rate of
6.25e-5, batches of 32 examples, 3 epochs, a warm-up over 0.2% of the training with a linear decay
after it, a weight of 0.5 for the LM loss (lambda), and a dropout of 0.1 before the task head. The
sizes of the model and the tokenizer come from the checkpoint in `init_from`.

`--config=gpt1_finetune:original` and `--config=gpt1_finetune:modern` use other recipes, which
gptjax/config/recipes.py describes. `--config.finetune.dataset=nyu-mll/glue:mrpc` reads a data set
of the Hugging Face hub instead of a file.
"""

from gptjax.config import Experiment, FinetuneConfig, ModelConfig, recipes


def get_config(recipe: str = "paper") -> Experiment:
    """Returns the experiment with the given recipe.

    It needs `--config.init_from`, `--config.finetune.train_file` and names of columns.
    """
    experiment = Experiment(
        name="gpt1_finetune",
        model=ModelConfig(dtype="bfloat16"),
        finetune=FinetuneConfig(),
    )
    return recipes.apply(experiment, recipe)
