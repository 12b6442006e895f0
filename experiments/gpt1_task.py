"""Fine-tunes a pretrained GPT-1 on a task of the paper: --config=gpt1_task:TASK.

    python launch.py --config=gpt1_task:rte --config.init_from=runs/gpt1

TASK is mnli, snli, scitail, qnli, rte, story_cloze, race, cola, sst2, mrpc, stsb or qqp.
gptjax/config/paper_tasks.py has the data sets and columns of the tasks. A second word, for example
in `--config=gpt1_task:rte,original`, chooses a recipe of gptjax/config/recipes.py: `original`
reproduces OpenAI's code, and `modern` trains GPT-1 with the methods of today. The data comes from
the Hugging Face hub, or from files with the same columns:

    python launch.py --config=gpt1_task:rte --config.init_from=runs/gpt1 \
        --config.finetune.dataset= --config.finetune.train_file=train.tsv \
        --config.finetune.validation_file=dev.tsv

The hyper-parameters are the same as in the experiment `gpt1_finetune`. The full training runs have
not been made in this project, which has no accelerator and cannot reach the hub. The tests train
one step of each task on small files with the same columns.
"""

from gptjax.config import Experiment, ModelConfig, paper_tasks, recipes


def get_config(task_and_recipe: str = "sst2") -> Experiment:
    """Returns the experiment of "TASK" or "TASK,RECIPE". It needs `--config.init_from`."""
    task, _, recipe = task_and_recipe.partition(",")
    experiment = Experiment(
        name=paper_tasks.EXPERIMENTS + task,
        model=ModelConfig(dtype="bfloat16"),
        finetune=paper_tasks.finetune_config(task),
    )
    return recipes.apply(experiment, recipe or "paper")
