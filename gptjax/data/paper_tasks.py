"""The tasks of the paper (Radford et al. 2018, section 4.2), in one table."""

from typing import Any

from gptjax.config import FinetuneConfig, nearest
from gptjax.errors import require


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
