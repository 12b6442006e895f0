"""The tasks of the paper (Radford et al. 2018, section 4.2), and its published scores."""

from typing import Any

from gptjax.config.schema import FinetuneConfig
from gptjax.errors import nearest, require


def _task(
    dataset: str, task: str, text: str, text_pair: str = "", metrics: str = "accuracy", **more: str
) -> dict[str, Any]:
    columns = {"text": text, "text_pair": text_pair}
    return {"dataset": dataset, "task": task, **columns, "metrics": metrics, **more}


# Name of a task -> fields of `FinetuneConfig`: the data set, its columns, and the metrics that the
# paper reports.
TASKS: dict[str, dict[str, Any]] = {
    # The "matched" split has the genres of the training data. The "mismatched" split has other
    # genres.
    "mnli": _task(
        "nyu-mll/glue:mnli", "entailment", "premise", "hypothesis",
        validation_split="validation_matched", test_split="validation_mismatched",
    ),
    # The label -1 marks rows on which the annotators disagreed.
    "snli": _task(
        "stanfordnlp/snli", "entailment", "premise", "hypothesis", test_split="test",
        ignore_label="-1",
    ),
    "scitail": _task(
        "allenai/scitail:tsv_format", "entailment", "premise", "hypothesis", test_split="test"
    ),
    "qnli": _task("nyu-mll/glue:qnli", "entailment", "question", "sentence"),
    "rte": _task("nyu-mll/glue:rte", "entailment", "sentence1", "sentence2"),
    # The authors of Story Cloze give the files on request. The user passes the files as train_file
    # and test_file.
    "story_cloze": _task(
        "", "multiple_choice", "+".join(f"InputSentence{i}" for i in range(1, 5)),
        choices="RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2", label="AnswerRightEnding",
    ),
    "race": _task(
        "ehovy/race:all", "multiple_choice", "article+question", test_split="test",
        choices="options[0],options[1],options[2],options[3]", label="answer",
    ),
    "cola": _task("nyu-mll/glue:cola", "classification", "sentence", metrics="matthews,accuracy"),
    "sst2": _task("nyu-mll/glue:sst2", "classification", "sentence"),
    "mrpc": _task(
        "nyu-mll/glue:mrpc", "similarity", "sentence1", "sentence2", "f1,accuracy",
        test_split="test",
    ),
    "stsb": _task(
        "nyu-mll/glue:stsb", "regression", "sentence1", "sentence2", "pearson,spearman"
    ),
    "qqp": _task("nyu-mll/glue:qqp", "similarity", "question1", "question2", "f1,accuracy"),
}  # fmt: skip

EXPERIMENTS = "gpt1_"
"""The prefix of experiment names in `experiments/gpt1_task.py`. The name of the task follows it."""

# Task -> the names of the classes in a submission to GLUE's server, in the order of the class
# numbers. An empty tuple means that the answer is a number. WNLI and the diagnostics, which GLUE
# has too, are missing, because the paper does not use them.
SUBMISSIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("cola", "sst2", "mrpc", "qqp"), ("0", "1")),
    "stsb": (),
    "mnli": ("entailment", "neutral", "contradiction"),
    **dict.fromkeys(("qnli", "rte"), ("entailment", "not_entailment")),
}

# The ablations of the paper (its table 5): variant -> task -> score as a fraction. The score is the
# first metric of the task in `TASKS`. Reports print it beside the score of a run and mark it as the
# paper's score, because it belongs to the full-size GPT-1.
PUBLISHED: dict[str, dict[str, float]] = {
    variant: dict(
        zip(("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"), scores, strict=True)
    )
    for variant, scores in (
        ("full", (0.454, 0.913, 0.823, 0.820, 0.703, 0.818, 0.881, 0.560)),
        ("no_pretraining", (0.189, 0.840, 0.794, 0.309, 0.655, 0.757, 0.712, 0.538)),
        ("no_lm", (0.479, 0.920, 0.849, 0.832, 0.698, 0.811, 0.869, 0.544)),
    )
}


def finetune_config(name: str) -> FinetuneConfig:
    """Returns the fine-tuning configuration of a task, with the paper's hyper-parameters.

    These hyper-parameters are the defaults of `FinetuneConfig`.

    Raises:
      UserError: there is no such task.
    """
    require(
        name in TASKS,
        f"the paper has no task {name!r}{nearest(name, TASKS)}; it has {', '.join(TASKS)}",
    )
    return FinetuneConfig(**TASKS[name])
