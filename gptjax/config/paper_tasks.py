"""The tasks of the paper (Radford et al. 2018, section 4.2), in one table."""

from typing import Any

from gptjax.config.schema import FinetuneConfig
from gptjax.errors import nearest, require


def _glue(name: str, kind: str, first: str, second: str, metrics: str, **more: Any):
    return {
        "dataset": f"nyu-mll/glue:{name}", "task": kind, "text": first, "text_pair": second,
        "metrics": metrics, **more,
    }  # fmt: skip


# Fields of `FinetuneConfig`: where the data is, what its columns mean, what the paper reports.
TASKS: dict[str, dict[str, Any]] = {
    # Validated on the genres of the training data, tested on others.
    "mnli": _glue(
        "mnli", "entailment", "premise", "hypothesis", "accuracy",
        validation_split="validation_matched", test_split="validation_mismatched",
    ),
    # -1: the annotators did not agree.
    "snli": {
        "dataset": "stanfordnlp/snli", "task": "entailment", "text": "premise",
        "text_pair": "hypothesis", "metrics": "accuracy", "test_split": "test",
        "ignore_label": "-1",
    },
    "scitail": {
        "dataset": "allenai/scitail:tsv_format", "task": "entailment", "text": "premise",
        "text_pair": "hypothesis", "metrics": "accuracy", "test_split": "test",
    },
    "qnli": _glue("qnli", "entailment", "question", "sentence", "accuracy"),
    "rte": _glue("rte", "entailment", "sentence1", "sentence2", "accuracy"),
    # Its files are given on request only; give them as train_file and test_file.
    "story_cloze": {
        "task": "multiple_choice", "text": "+".join(f"InputSentence{i}" for i in range(1, 5)),
        "choices": "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2",
        "label": "AnswerRightEnding", "metrics": "accuracy",
    },
    "race": {
        "dataset": "ehovy/race:all", "task": "multiple_choice", "text": "article+question",
        "choices": "options[0],options[1],options[2],options[3]", "label": "answer",
        "metrics": "accuracy", "test_split": "test",
    },
    "cola": _glue("cola", "classification", "sentence", "", "matthews,accuracy"),
    "sst2": _glue("sst2", "classification", "sentence", "", "accuracy"),
    "mrpc": _glue("mrpc", "similarity", "sentence1", "sentence2", "f1,accuracy", test_split="test"),
    "stsb": _glue("stsb", "regression", "sentence1", "sentence2", "pearson,spearman"),
    "qqp": _glue("qqp", "similarity", "question1", "question2", "f1,accuracy"),
}  # fmt: skip

EXPERIMENTS = "gpt1_"
"""`experiments/gpt1_task.py` calls a task's experiment this and its name."""

# Task -> the answers that GLUE's server takes, in the order of the class numbers of its data; none
# for a number. (Its other tasks, WNLI and the diagnostics, are not in the paper.)
SUBMISSIONS: dict[str, tuple[str, ...]] = {
    "cola": ("0", "1"),
    "sst2": ("0", "1"),
    "mrpc": ("0", "1"),
    "qqp": ("0", "1"),
    "stsb": (),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
}

# What the paper reports of its ablations (its table 5), as fractions; from the whole GPT-1, and its
# GLUE scores are of the first metric of each task above. For reading beside ours, never as ours.
PUBLISHED: dict[str, dict[str, float]] = {
    "full": {
        "cola": 0.454, "sst2": 0.913, "mrpc": 0.823, "stsb": 0.820, "qqp": 0.703, "mnli": 0.818,
        "qnli": 0.881, "rte": 0.560,
    },
    "no_pretraining": {
        "cola": 0.189, "sst2": 0.840, "mrpc": 0.794, "stsb": 0.309, "qqp": 0.655, "mnli": 0.757,
        "qnli": 0.712, "rte": 0.538,
    },
    "no_lm": {
        "cola": 0.479, "sst2": 0.920, "mrpc": 0.849, "stsb": 0.832, "qqp": 0.698, "mnli": 0.811,
        "qnli": 0.869, "rte": 0.544,
    },
}  # fmt: skip


def finetune_config(name: str) -> FinetuneConfig:
    """Returns a task with the paper's hyper-parameters, which are the defaults.

    Raises:
      UserError: there is no such task.
    """
    require(
        name in TASKS,
        f"the paper has no task {name!r}{nearest(name, TASKS)}; it has {', '.join(TASKS)}",
    )
    return FinetuneConfig(**TASKS[name])
