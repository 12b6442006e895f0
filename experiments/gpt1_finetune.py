"""GPT-1 fine-tuning by the paper's recipe, from a pretrained checkpoint.

    python launch.py --config=experiments/gpt1_finetune.py --config.init_from=runs/gpt1_pretrain \
        --config.finetune.train_file=train.tsv --config.finetune.text=sentence

lr 6.25e-5, batch 32, 3 epochs, linear decay with warm-up over 0.2% of training, lambda 0.5,
classifier dropout 0.1 (Radford et al. 2018, section 4.1). The sizes and the tokenizer are those
of `init_from`. Other recipes of gptjax/config/recipes.py by name: `gpt1_finetune.py:original`,
`:modern`; `--config.finetune.dataset=nyu-mll/glue:mrpc` reads from the hub instead of a file.
"""

from gptjax.config import Experiment, FinetuneConfig, ModelConfig, recipes


def get_config(recipe: str = "paper") -> Experiment:
    """Returns the experiment; give it `--config.init_from`, the training file and its columns."""
    experiment = Experiment(
        name="gpt1_finetune",
        model=ModelConfig(dtype="bfloat16"),
        finetune=FinetuneConfig(),
    )
    return recipes.apply(experiment, recipe)
