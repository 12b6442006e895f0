"""Stages: their numbers of steps, shapes and labels, counted by hand."""

import collections
import dataclasses
import math

import datasets
import numpy as np
import pytest
import small
from refusals import fails
from sklearn.utils.class_weight import compute_class_weight

from gptjax.config.schema import FinetuneConfig, OptimizerConfig, PretrainConfig, TaskSpec
from gptjax.data import tasks
from gptjax.data.tables.labelled import LabelledTable
from gptjax.data.tables.texts import Texts
from gptjax.model import gpt
from gptjax.model.objective import Objective
from gptjax.train import stages
from gptjax.train.context import Setup

pytestmark = pytest.mark.devices(8)

TEXT = [f"{text}\n" for text in small.texts(60, longest=9)]


@pytest.fixture(scope="module")
def tokenizer():
    return small.small_tokenizer()


def text_data(train=TEXT, validation=TEXT[:7]):
    tables = {"train": train, "validation": validation}
    return {name: Texts.of(list(rows)) for name, rows in tables.items()}


def pretrain(tokenizer, mesh=None, data=None, **changes):
    values = {"dataset": "builtin", "batch_size": 4, "steps": 10, "window": 16}
    values |= {"optimizer": OptimizerConfig()}  # without warm-up
    config = PretrainConfig(**(values | changes))
    model = small.config(vocab_size=len(tokenizer))
    return stages.pretrain(
        config, data or text_data(), Setup(model, tokenizer, mesh or small.mesh(), seed=0)
    )


def label_data(count=20, held=6, labels=("no", "yes", "maybe")):
    def table(rows, seed, where):
        names = [labels[i % len(labels)] for i in range(rows)]
        values = {"text": small.texts(rows, seed), "label": names}
        values |= {"text_pair": small.texts(rows, seed + 1)}
        return LabelledTable(datasets.Dataset.from_dict(values), where)

    return {"train": table(count, 0, "train.csv"), "validation": table(held, 5, "valid.csv")}


def finetune(tokenizer, mesh=None, data=None, **changes):
    config = FinetuneConfig(**({"train_file": "train.csv", "batch_size": 4} | changes))
    model = small.config(vocab_size=len(tokenizer))
    return stages.finetune(
        config, data or label_data(), Setup(model, tokenizer, mesh or small.mesh(), seed=0)
    )


@pytest.mark.parametrize(
    ("kind", "outputs", "summed"),
    [
        ("classification", 3, False),
        ("entailment", 3, False),
        ("similarity", 3, True),
        ("regression", 1, True),
        ("multiple_choice", 1, False),
    ],
)
def test_the_head_is_that_of_the_task(kind, outputs, summed):
    choices = ("a", "b", "c") if kind == "multiple_choice" else ()
    spec = TaskSpec(kind, "text", choices=choices, labels=("0", "1", "2"))
    model = gpt.make_model(small.config(), spec)
    assert (model.num_outputs, model.sum_candidates) == (outputs, summed)
    assert not gpt.make_model(small.config(), None).num_outputs


def test_pretraining_counts(tokenizer):
    stage = pretrain(tokenizer)
    stream = [i for text in TEXT for i in tokenizer.encode(text)]
    assert (stage.name, stage.metric, stage.total_steps) == ("pretrain", "loss", 10)
    assert (stage.eval_every, stage.save_every) == (10, 1000)
    assert not stage.final
    assert stage.spec is None
    assert f"{len(stream):,} training tokens" in stage.notes[0]
    batch = next(iter(stage.batches.iterate(0, 1)))
    assert batch.tokens.shape == (4, 16)
    places = "".join(f",{i}," for i in stream)
    for row in batch.tokens:
        assert "".join(f",{i}," for i in row) in places
    assert pretrain(tokenizer, window=0).batches[0].tokens.shape == (4, 32)
    assert pretrain(tokenizer, eval_every=3).eval_every == 3


@pytest.mark.parametrize("epochs", [0.5, 1.0, 2.5])
def test_pretraining_epochs(tokenizer, epochs):
    stage = pretrain(tokenizer, steps=0, epochs=epochs)
    assert stage.total_steps == math.ceil(epochs * stage.batches.windows / 4)


def test_pretraining_fingerprint_is_that_of_the_training_text(tokenizer):
    same = pretrain(tokenizer, batch_size=8, data=text_data(validation=TEXT[3:9]))
    assert pretrain(tokenizer).fingerprint == same.fingerprint
    assert pretrain(tokenizer, data=text_data(TEXT[1:])).fingerprint != same.fingerprint


def test_pretraining_mistakes(tokenizer):
    mesh = small.mesh(data=2, fsdp=2)
    message = fails(pretrain, tokenizer, mesh=mesh, batch_size=6)
    assert message.startswith("`pretrain.batch_size`=6: must be a multiple of 4")
    optimizer = OptimizerConfig(accumulation=3)
    message = fails(pretrain, tokenizer, mesh=mesh, batch_size=8, optimizer=optimizer)
    assert "multiple of 12" in message
    pretrain(tokenizer, mesh=mesh, batch_size=12, optimizer=optimizer)
    message = fails(pretrain, tokenizer, optimizer=OptimizerConfig(warmup_steps=10))
    assert message == "`pretrain.optimizer.warmup_steps`=10: must be below the 10 steps"
    message = fails(pretrain, tokenizer, data=text_data(validation=["\n"]))
    assert "the validation text is empty; give validation_files" in message
    assert "`pretrain`" in fails(pretrain, tokenizer, data=text_data(TEXT[:1]))


def test_finetuning_counts(tokenizer):
    data = label_data() | {"test": label_data(held=9)["validation"]}
    stage = finetune(tokenizer, data=data, epochs=2.2)
    assert (stage.name, stage.metric) == ("finetune", "accuracy")
    assert stage.total_steps == math.ceil(2.2 * 20 / 4)
    assert stage.eval_every == 5
    assert stage.spec.labels == ("maybe", "no", "yes")
    assert stage.model.num_outputs == 3
    assert (stage.objective.kind, stage.objective.lm_weight) == ("classification", 0.5)
    assert list(stage.final) == ["validation", "test"]
    assert "20 train examples" in stage.notes[0]
    labels = collections.Counter()
    for batch in stage.batches.iterate(0, 5):
        assert batch.example_mask.sum() == 4
        labels.update(batch.labels[batch.example_mask > 0].tolist())
    assert labels == {1: 7, 2: 7, 0: 6}  # one epoch of 20 rows, whose labels take turns
    assert list(finetune(tokenizer).final) == ["validation"]
    assert finetune(tokenizer, steps=3).total_steps == 3
    assert finetune(tokenizer, evals_per_epoch=2.0).eval_every == 2
    assert finetune(tokenizer, evals_per_epoch=100.0).eval_every == 1


@pytest.mark.parametrize(("classes", "warned"), [(20, False), (21, True), (30, True)])
def test_a_column_of_too_many_labels_is_warned_of(tokenizer, classes, warned):
    data = label_data(count=40, labels=[str(i) for i in range(classes)])
    notes = finetune(tokenizer, data=data).notes
    text = f"warning: column label has {classes} different labels in 40 training rows"
    assert any(note.startswith(text) for note in notes) == warned


def test_balanced_class_weights_are_those_of_scikit_learn(tokenizer):
    """Only the training has them, and their mean over the training examples is 1."""
    data = label_data(labels=("no", "no", "no", "yes", "maybe", "no"))
    stage = finetune(tokenizer, data=data, class_weights="balanced", label_smoothing=0.25)
    labels = [stage.spec.labels.index(name) for name in data["train"].columns(["label"])["label"]]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert stage.objective.class_weights == pytest.approx(expected)
    assert np.array(stage.objective.class_weights)[labels].mean() == pytest.approx(1)
    assert stage.objective.label_smoothing == 0.25
    assert any("class weights maybe 2.22, no 0.476, yes 2.22" in note for note in stage.notes)
    plain = finetune(tokenizer, data=data)
    assert plain.objective == Objective("classification", 0.5)
    params = small.params(stage.model)
    assert stage.validate(params) == plain.validate(params)


def test_a_class_that_only_the_held_out_rows_have_changes_no_weight(tokenizer):
    data = label_data(labels=("no", "no", "yes"))
    parts = label_data(labels=("no", "maybe"))
    data["validation"] = dataclasses.replace(parts["validation"], part_of=data["train"].source)
    stage = finetune(tokenizer, data=data, class_weights="balanced")
    assert stage.spec.labels == ("maybe", "no", "yes")
    two = compute_class_weight(
        "balanced", classes=np.array(["no", "yes"]), y=data["train"].columns(["label"])["label"]
    )
    assert stage.objective.class_weights == pytest.approx((1, *two))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_longest_sequence_is_that_of_any_split(tokenizer, split):
    """Attention ignores keys beyond the longest sequence, so that every split has to count."""
    data = label_data()
    table = data[split].rows
    long = " ".join(["sea"] * 20)
    texts = [long, *table["text"][1:]]
    rows = table.remove_columns("text").add_column("text", texts)
    data[split] = LabelledTable(rows, data[split].source)
    stage = finetune(tokenizer, data=data)
    spec = TaskSpec("classification", "text", labels=("no", "yes", "maybe"))
    found = tasks.encode(
        spec, LabelledTable({"text": [long], "label": ["no"]}, "x"), tokenizer, 1000
    )
    longest = min(len(found.tokens[0]), stage.model.config.context_length)
    assert stage.model.max_sequence_length == longest
    assert longest > finetune(tokenizer).model.max_sequence_length


def test_baselines_are_the_majority_answer(tokenizer):
    data = label_data(labels=("a", "b"))
    rows = {"text": small.texts(8), "label": list("aaabaaab")}
    data["validation"] = LabelledTable(datasets.Dataset.from_dict(rows), "valid.csv")
    baselines = finetune(tokenizer, data=data, metrics="accuracy").baselines
    assert list(baselines) == ["validation"]
    assert baselines["validation"]["accuracy"] == pytest.approx(6 / 8)


def test_rows_divide_among_devices_and_micro_batches(tokenizer):
    stage = finetune(
        tokenizer, mesh=small.mesh(data=2, fsdp=2), batch_size=10,
        optimizer=OptimizerConfig(accumulation=3),
    )  # fmt: skip
    for batch in stage.batches.iterate(0, 4):
        assert batch.tokens.shape[0] % 12 == 0
        assert batch.example_mask.sum() == 10


def test_finetuning_fingerprint_is_that_of_texts_and_labels(tokenizer):
    first = finetune(tokenizer)
    assert finetune(tokenizer, data=label_data(held=5), batch_size=8).fingerprint == (
        first.fingerprint
    )
    assert finetune(tokenizer, data=label_data(count=19)).fingerprint != first.fingerprint
    flipped = finetune(tokenizer, data=label_data(labels=("yes", "no", "maybe")))
    assert flipped.fingerprint != first.fingerprint


def test_finetuning_mistakes(tokenizer):
    data = label_data()
    data["validation"] = label_data(labels=("no", "perhaps"))["validation"]
    message = fails(finetune, tokenizer, data=data)
    assert message.startswith("valid.csv: row 2, column label: label 'perhaps'")
    message = fails(finetune, tokenizer, data=label_data(labels=("same",)))
    assert message.startswith("train.csv: column label: ")
    for algorithm in ("adamw", "openai"):
        optimizer = OptimizerConfig(warmup_steps=7, algorithm=algorithm)
        message = fails(finetune, tokenizer, steps=7, optimizer=optimizer)
        assert message == "`finetune.optimizer.warmup_steps`=7: must be below the 7 steps"
    assert fails(finetune, tokenizer, transfer="3") == (
        "`finetune.transfer`=3: the model has 2 layers"
    )


def test_texts_for_the_tokenizer_are_those_of_training():
    assert list(text_data()["train"]) == TEXT
    many = [f"row {i}" for i in range(2500)]
    assert list(text_data(train=many)["train"]) == many
    data = label_data()
    config = FinetuneConfig(task="similarity", text_pair="text_pair")
    expected = [*data["train"].rows["text"], *data["train"].rows["text_pair"]]
    assert list(stages.finetune_texts(data, config)) == expected
