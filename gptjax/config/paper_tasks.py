"""The tasks of the paper (Radford et al. 2018, section 4.2), in one table."""

from typing import Any

from gptjax.config.schema import FinetuneConfig
from gptjax.errors import nearest, require


def _glue(name: str, kind: str, first: str, second: str, metrics: str, **more: Any):
    return {
        "dataset": f"nyu-mll/glue:{name}", "task": kind, "text": first, "text_pair": second,
        "metrics": metrics, **more,
    }  # fmt: skip


# Name -> fields of `FinetuneConfig`: the data set, its columns, and the metrics that the paper
# reports.
TASKS: dict[str, dict[str, Any]] = {
    # The "matched" split has the genres of the training data, the "mismatched" one has others.
    "mnli": _glue(
        "mnli", "entailment", "premise", "hypothesis", "accuracy",
        validation_split="validation_matched", test_split="validation_mismatched",
    ),
    # The label -1 marks rows on which the annotators disagreed.
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
    # Its authors give the files on request. The user passes them as train_file and test_file.
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
"""Prefix of the names of the experiments in `experiments/gpt1_task.py`; the task follows it."""

# Task -> the names of the classes in a submission to GLUE's server, by class number; empty if the
# answer is a number. GLUE's other tasks, WNLI and the diagnostics, are not in the paper.
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

# The paper's ablations (its table 5): variant -> task -> score as a fraction, by the first metric
# of the task in the table above. Reports print these scores beside those of a run, marked as the
# paper's: they belong to the full-size GPT-1.
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
    """Returns the fine-tuning of a task, with the paper's hyper-parameters (the defaults).

    Raises:
      UserError: there is no such task.
    """
    require(
        name in TASKS,
        f"the paper has no task {name!r}{nearest(name, TASKS)}; it has {', '.join(TASKS)}",
    )
    return FinetuneConfig(**TASKS[name])
