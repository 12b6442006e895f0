"""Each task of the paper runs for a step, on small files with the columns of its data set."""

import json
import re

import pytest
import runs

from gptjax.config import paper_tasks
from gptjax.config.paper_tasks import SUBMISSIONS, TASKS
from gptjax.config.schema import FinetuneConfig
from gptjax.data.tables import files as files_lib
from gptjax.errors import UserError
from gptjax.infer import predictor
from gptjax.io import files

PAIR = {"sentence1": "the cat sat on a mat", "sentence2": "a dog ran to the house"}
# One row of each data set, with the columns that its card describes.
ROWS = {
    "mnli": {"premise": "a cat", "hypothesis": "a dog ran", "label": 0, "idx": 1},
    "snli": {"premise": "a cat", "hypothesis": "a dog ran", "label": 0},
    "scitail": {"premise": "a cat", "hypothesis": "a dog ran", "label": "entails"},
    "qnli": {"question": "what ran?", "sentence": "a dog ran", "label": 0, "idx": 1},
    "rte": {**PAIR, "label": 0, "idx": 1},
    "story_cloze": {
        "InputStoryid": "x1", "InputSentence1": "The cat sat.", "InputSentence2": "A dog ran.",
        "InputSentence3": "It saw the cat.", "InputSentence4": "It sang.",
        "RandomFifthSentenceQuiz1": "The cat ran.", "RandomFifthSentenceQuiz2": "The king fell.",
        "AnswerRightEnding": 1,
    },
    "race": {
        "example_id": "high1.txt", "article": "the old man sat near the river",
        "question": "who sat?", "options": ["a cat", "the old man", "a dog", "the king"],
        "answer": "B",
    },
    "cola": {"sentence": "the cat sat on a mat", "label": 0, "idx": 1},
    "sst2": {"sentence": "the cat sat on a mat", "label": 0, "idx": 1},
    "mrpc": {**PAIR, "label": 0, "idx": 1},
    "stsb": {**PAIR, "label": 2.5, "idx": 1},
    "qqp": {"question1": "who sat?", "question2": "who ran?", "label": 0, "idx": 1},
}  # fmt: skip
LABELS = {
    "mnli": (0, 1, 2), "snli": (0, 1, 2, -1), "scitail": ("entails", "neutral"),
    "story_cloze": (1, 2), "race": ("A", "B", "C", "D"), "stsb": (0.0, 2.5, 5.0),
}  # fmt: skip


def write(path, name: str, count: int, **changes) -> str:
    label = TASKS[name].get("label", "label")
    labels = LABELS.get(name, (0, 1))
    with path.open("w") as file:
        for i in range(count):
            row = ROWS[name] | {label: labels[i % len(labels)]} | changes
            file.write(json.dumps(row) + "\n")
    return str(path)


def flags(tmp_path, name: str) -> list[str]:
    return [
        f"--config=experiments/gpt1_task.py:{name}",
        *(flag for flag in runs.TINY if "vocab" not in flag),
        "--config.model.context_length=64", "--config.model.dtype=float32",
        "--config.tokenizer.vocab_size=200", "--config.finetune.dataset=",
        f"--config.finetune.train_file={tmp_path}/train.jsonl",
        "--config.finetune.batch_size=8", "--config.finetune.steps=1", f"--workdir={tmp_path}/w",
    ]  # fmt: skip


def test_the_twelve_of_the_paper():
    assert len(TASKS) == 12
    assert ROWS.keys() == TASKS.keys()
    usual = FinetuneConfig()
    for name in TASKS:
        config = paper_tasks.finetune_config(name)
        # Section 4.1 of the paper; no task changes these values.
        assert config.optimizer == usual.optimizer
        assert (config.batch_size, config.epochs, config.lm_weight) == (32, 3.0, 0.5)
    rate = usual.optimizer
    assert (rate.learning_rate, rate.schedule, rate.warmup_fraction) == (6.25e-5, "linear", 0.002)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_step_of_each(tmp_path, name, monkeypatch):
    monkeypatch.chdir(runs.pathlib.Path(runs.LAUNCH).parent)
    write(tmp_path / "train.jsonl", name, 24)
    write(tmp_path / "dev.jsonl", name, 12)
    dev = f"--config.finetune.validation_file={tmp_path}/dev.jsonl"
    result = runs.main(*flags(tmp_path, name), dev)
    assert result.code == 0, result.err
    config = files.read_json(f"{tmp_path}/w/config.json")["finetune"]
    scores = files.read_json(f"{tmp_path}/w/summary.json")["finetune"]["validation"]
    assert set(config["metrics"].split(",")) < set(scores)
    if name == "snli":
        rows = f"--input={tmp_path}/dev.jsonl"
        result_of = runs.main("--mode=evaluate", f"--checkpoint={tmp_path}/w", rows)
        assert result_of.code == 0, result_of.err
        assert re.search("18 train examples, .*, 6 left out for the label .-1.$", result.out, re.M)
    # Rows to predict have no label.
    result = runs.main(
        "--mode=predict", f"--checkpoint={tmp_path}/w", f"--input={tmp_path}/dev.jsonl",
        f"--output={tmp_path}/out.jsonl",
    )  # fmt: skip
    assert result.code == 0, result.err
    ours = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(ours) == 12
    if name in SUBMISSIONS:
        check_submission(tmp_path, name, [row["prediction"] for row in ours], monkeypatch)


def check_submission(tmp_path, name, predictions, monkeypatch):
    """Checks a submission made from a file, and one from the hub's test split, with labels -1."""
    path = write(tmp_path / "test.jsonl", name, 12, idx=7)
    flags = ["--mode=predict", f"--checkpoint={tmp_path}/w", f"--glue={name}"]
    made = runs.main(*flags, f"--input={path}", f"--output={tmp_path}/glue.tsv")
    assert made.code == 0, made.err
    header, *lines = (tmp_path / "glue.tsv").read_text().splitlines()
    assert header == "index\tprediction"
    index, answers = zip(*(line.split("\t") for line in lines), strict=True)
    assert set(index) == {"7"}, "the index is the file's own"
    names = SUBMISSIONS[name]
    expected = [names[int(each)] for each in predictions] if names else predictions
    if names:
        assert list(answers) == expected
    else:
        assert [float(each) for each in answers] == pytest.approx(
            [min(5, max(0, each)) for each in expected], abs=1e-3
        )
    other = "stsb" if names else "rte"
    refused = runs.main(
        *flags[:2], f"--glue={other}", f"--input={path}", f"--output={tmp_path}/x.tsv"
    )
    assert f"--glue={other}: its answers are" in refused.error
    asked = []

    def load_hub(dataset, split):
        asked.append((dataset, split))
        return files_lib.read_table(path, ())

    # The run read a file. A run on the hub would have the task's data set in its configuration.
    monkeypatch.setattr(files_lib, "load_hub", load_hub)
    loaded = predictor.load

    def load(*args, **kwargs):
        gpt = loaded(*args, **kwargs)
        gpt.meta.experiment["finetune"]["dataset"] = TASKS[name]["dataset"]
        return gpt

    monkeypatch.setattr(predictor, "load", load)
    made = runs.main(*flags, "--split=test", f"--output={tmp_path}/hub.tsv")
    assert made.code == 0, made.err
    assert asked == [(TASKS[name]["dataset"], "test")]
    assert (tmp_path / "hub.tsv").read_bytes() == (tmp_path / "glue.tsv").read_bytes()
    assert "or --split, if the model" in runs.main(*flags, f"--output={tmp_path}/hub.tsv").error


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("race", {"options": ["a", "b"]}, "row 25, column options: has 2 elements"),
        (
            "race",
            {"options": "a b c d"},
            "column 'options': cannot keep list (line 1), str (line 25)",
        ),
        (
            "race",
            {"answer": "E"},
            "column answer: labels A, B, C, D, E do not number the 4 answers",
        ),
        ("stsb", {"label": "high"}, "column 'label': cannot keep float (line 1), str (line 25)"),
        ("stsb", {"label": None}, "row 25, column label: '' is not a number"),
        ("sst2", {"label": None}, "row 25, column label: the label is empty"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, name, changes, message, monkeypatch):
    monkeypatch.chdir(runs.pathlib.Path(runs.LAUNCH).parent)
    path = tmp_path / "train.jsonl"
    write(path, name, 24)
    bad = json.dumps(json.loads(path.read_text().splitlines()[0]) | changes)
    path.write_text(path.read_text() + bad + "\n")
    write(tmp_path / "dev.jsonl", name, 12)
    dev = f"--config.finetune.validation_file={tmp_path}/dev.jsonl"
    error = runs.main(*flags(tmp_path, name), dev).error
    assert message in error
    assert "train.jsonl" in error


def test_a_column_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(runs.pathlib.Path(runs.LAUNCH).parent)
    (tmp_path / "train.jsonl").write_text('{"article": "a", "options": [], "answer": "A"}\n' * 3)
    assert "no column 'question'" in runs.main(*flags(tmp_path, "race")).error


def test_an_unknown_task_is_named():
    with pytest.raises(UserError, match="did you mean 'mnli'"):
        paper_tasks.finetune_config("mnlii")
    result = runs.main("--config=experiments/gpt1_task.py:mnlii")
    assert "did you mean 'mnli'" in result.error


def test_no_label_left(tmp_path, monkeypatch):
    monkeypatch.chdir(runs.pathlib.Path(runs.LAUNCH).parent)
    write(tmp_path / "train.jsonl", "snli", 8, label=-1)
    dev = f"--config.finetune.validation_file={write(tmp_path / 'dev.jsonl', 'snli', 8)}"
    assert "every row has the label '-1'" in runs.main(*flags(tmp_path, "snli"), dev).error
