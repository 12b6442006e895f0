"""An experiment for test_ablate: two tasks, their files given by flags."""

from gptjax.config.schema import AblationConfig, Experiment, FinetuneConfig


def get_config() -> Experiment:
    """Returns the experiment."""
    tasks = {name: FinetuneConfig(evals_per_epoch=1.0) for name in ("one", "two")}
    return Experiment(name="two_tasks", ablation=AblationConfig(tasks=tasks))
