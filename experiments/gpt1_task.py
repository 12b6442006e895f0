"""A task of the paper by its name, with the paper's hyper-parameters, from a pretrained checkpoint.

    python launch.py --config=experiments/gpt1_task.py:rte --config.init_from=runs/gpt1

mnli, snli, scitail, qnli, rte, story_cloze, race, cola, sst2, mrpc, stsb or qqp; their data sets
and columns stand in gptjax/config/paper_tasks.py. `gpt1_task.py:rte,original` takes another recipe
of gptjax/config/recipes.py: original is what the authors' code does, modern what one would do
today. The data comes from the Hugging Face hub, or from files with the same columns:

    python launch.py --config=experiments/gpt1_task.py:rte --config.init_from=runs/gpt1 \
        --config.finetune.dataset= --config.finetune.train_file=train.tsv \
        --config.finetune.validation_file=dev.tsv

lr 6.25e-5, batch 32, 3 epochs, linear decay with warm-up over 0.2% of training, lambda 0.5,
classifier dropout 0.1 (Radford et al. 2018, section 4.1). Not run here: no accelerator, and the hub
cannot be reached; the tests take a step of each task from small files of its columns.
"""

from gptjax.config import Experiment, ModelConfig, paper_tasks, recipes


def get_config(task_and_recipe: str = "sst2") -> Experiment:
    """Returns the experiment of "TASK" or "TASK,RECIPE"; give it `--config.init_from`."""
    task, _, recipe = task_and_recipe.partition(",")
    experiment = Experiment(
        name=paper_tasks.EXPERIMENTS + task,
        model=ModelConfig(dtype="bfloat16"),
        finetune=paper_tasks.finetune_config(task),
    )
    return recipes.apply(experiment, recipe or "paper")
