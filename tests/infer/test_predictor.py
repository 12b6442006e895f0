"""A trained model in Python: `gptjax.load`."""

import csv
import dataclasses
import os
import pathlib
import subprocess
import sys

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import runs

import gptjax
from gptjax.config.schema import MeshConfig, ModelConfig
from gptjax.errors import UserError


@pytest.fixture(scope="module")
def gpt():
    return gptjax.load(runs.trained())


def test_what_a_loaded_model_has(gpt):
    assert isinstance(gpt.config, ModelConfig)
    assert (gpt.config.width, gpt.config.context_length, gpt.config.vocab_size) == (16, 16, 96)
    assert gpt.params["token_embedding"].shape == (96, 16)
    assert gpt.task.labels == ("no", "yes")
    text = "the old man saw a tree"
    assert " ".join(gpt.tokenizer.decode(gpt.tokenizer.encode(text)).split()) == text
    assert gpt.path.startswith(runs.trained())
    assert gpt.summary == runs.summary(runs.trained())
    assert gpt.experiment.finetune.train_file == runs.files().train
    assert gpt.model is gpt.model


def test_what_is_loaded_is_the_best_step_or_the_one_asked_for(gpt):
    for step in runs.steps(runs.trained(), "finetune"):
        one = gptjax.load(f"{runs.trained()}/checkpoints/finetune/{step}")
        saved = runs.arrays(runs.trained(), "finetune", step)
        for path, leaf in jax.tree_util.tree_leaves_with_path(one.params):
            name = "params" + jax.tree_util.keystr(path)
            assert saved[name][2] == np.asarray(leaf).tobytes()
    assert gptjax.load(pathlib.Path(runs.trained(), "checkpoints", "pretrain")).task is None


def test_logits_have_the_promised_shape_and_are_causal(gpt):
    tokens = np.arange(32).reshape(2, 16)
    logits = gpt.lm_logits(tokens)
    assert (logits.shape, logits.dtype) == ((2, 16, 96), jnp.float32)
    assert np.all(np.isfinite(logits))
    changed = tokens.copy()
    changed[:, 10:] += 1
    np.testing.assert_array_equal(gpt.lm_logits(changed)[:, :10], logits[:, :10])
    assert np.abs(gpt.lm_logits(changed)[:, 10:] - logits[:, 10:]).max() > 1e-3


def test_a_model_trained_with_another_machine_s_attention_runs_here(gpt):
    config = dataclasses.replace(gpt.config, attention="pallas")
    elsewhere = dataclasses.replace(gpt, config=config)
    tokens = np.arange(32).reshape(2, 16)
    np.testing.assert_array_equal(elsewhere.lm_logits(tokens), gpt.lm_logits(tokens))
    rows = {"text": ["the old man saw a tree", "a cat"]}
    one, other = (each.predict(rows) for each in (gpt, elsewhere))
    np.testing.assert_array_equal(one.probabilities, other.probabilities)


@pytest.mark.parametrize("ids", [(1, 2, 3, 0), (4, 1, 4, 0)])
def test_packed_logits_are_those_of_each_alone(gpt, ids):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 84, n) for n in (5, 1, 7)]
    row = np.concatenate([*parts, np.zeros(3, int)])[None]
    segments = np.repeat(ids, [5, 1, 7, 3])[None]
    packed = np.asarray(gpt.lm_logits(row, segments))[0]
    start = 0
    for part in parts:
        alone = np.asarray(gpt.lm_logits(part[None]))[0]
        np.testing.assert_allclose(packed[start : start + len(part)], alone, atol=1e-5)
        start += len(part)


def test_packed_rows_may_be_longer_than_the_context(gpt):
    tokens = np.zeros((1, 32), int)
    assert gpt.lm_logits(tokens, np.repeat([1, 2], 16)[None]).shape == (1, 32, 96)
    with pytest.raises(UserError, match="a sequence of 32 tokens exceeds the context of 16"):
        gpt.lm_logits(tokens)
    with pytest.raises(UserError, match=r"must be \[B, T\]"):
        gpt.lm_logits(tokens[0])
    with pytest.raises(UserError, match="must have the shape of tokens"):
        gpt.lm_logits(tokens, tokens[:, :5])


def test_numbers_too_large_for_the_device(gpt):
    """More than the vocabulary is all of it; a seed has 32 bits."""
    kept = [gpt.generate("the", 5, top_k=k, seed=3) for k in (0, len(gpt.tokenizer), 3 * 10**9)]
    assert kept[0] == kept[1] == kept[2]
    seeds = [0, 1, 2**31, 2**32 - 1]
    assert len({gpt.generate("the", 10, seed=seed)[0] for seed in seeds}) == len(seeds)
    for seed in (2**32, 2**64, -1):
        with pytest.raises(UserError, match=r"^`seed`=-?\d+: must be 0 to 4294967295$"):
            gpt.generate("the", 5, seed=seed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda gpt: gpt.lm_logits([[1.0, 2.7]]), "`tokens`: must be integers, not float64"),
        (lambda gpt: gpt.lm_logits(np.array([[True]])), "`tokens`: must be integers, not bool"),
        (lambda gpt: gpt.lm_logits([[1, 2], [3]]), "`tokens`: is no array of integers"),
        (lambda gpt: gpt.lm_logits([["a"]]), "`tokens`: must be integers"),
        (
            lambda gpt: gpt.lm_logits(np.array([[2**32 + 1]])),
            "`tokens`: 4294967297 is out of its range, 0 to 95",
        ),
        (lambda gpt: gpt.lm_logits([[-1]]), "`tokens`: -1 is out of its range, 0 to 95"),
        (lambda gpt: gpt.lm_logits([[96]]), "`tokens`: 96 is out of its range, 0 to 95"),
        (
            lambda gpt: gpt.lm_logits([[1, 2]], [[1, 2**32]]),
            "`segment_ids`: 4294967296 is out of its range",
        ),
        (lambda gpt: gpt.lm_logits([[1]], [[0.5]]), "`segment_ids`: must be integers"),
        (lambda gpt: gpt.score_text("one text"), "`texts`: is a single text; write [text]"),
        (lambda gpt: gpt.score_text(["a cat"], window=1), "`window`=1: must be 0, or 2 to 16"),
        (lambda gpt: gpt.score_text(["a cat"], window=17), "`window`=17: must be 0, or 2 to 16"),
        (lambda gpt: gpt.score_text(["a cat"], window=-3), "`window`=-3: must be 0, or 2 to 16"),
        (lambda gpt: gpt.generate(b"the"), "`prompt`: is bytes; give a text"),
        (lambda gpt: gpt.generate(["the", "cat"]), "`prompt`: must be integers"),
        (lambda gpt: gpt.generate([1.5]), "`prompt`: must be integers"),
        (lambda gpt: gpt.generate([96]), "`prompt`: 96 is out of its range, 0 to 95"),
        (lambda gpt: gpt.generate("the", 2.5), "`max_new_tokens`=2.5: must be an integer"),
        (lambda gpt: gpt.generate("the", num_samples=1.5), "`num_samples`=1.5: must be"),
    ],
)
def test_what_is_out_of_its_range_is_one_line(gpt, call, message):
    with pytest.raises(UserError) as error:
        call(gpt)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int32])
def test_integers_of_any_type_are_token_ids(gpt, dtype):
    tokens = np.arange(8).reshape(1, 8)
    np.testing.assert_array_equal(gpt.lm_logits(tokens.astype(dtype)), gpt.lm_logits(tokens))


def test_the_score_of_a_text_does_not_depend_on_its_form(gpt):
    texts = runs.sentences(20)
    expected = gpt.score_text(texts)
    assert gpt.score_text(iter(texts)) == expected
    assert gpt.score_text(texts, window=16) == expected
    ids = [i for text in texts for i in gpt.tokenizer.encode(text)]
    assert expected["unknown_tokens"] == ids.count(gpt.tokenizer.unknown_id) / len(ids) > 0


def test_unknown_tokens_are_counted(gpt):
    rows = [{"text": "\u6f22 \u5b57", "label": "yes"}, {"text": "a cat", "label": "no"}]
    ids = [i for row in rows for i in gpt.tokenizer.encode(row["text"])]
    expected = ids.count(gpt.tokenizer.unknown_id) / len(ids)
    assert gpt.predict(rows).unknown == pytest.approx(expected)
    assert gpt.score(rows)["unknown_tokens"] == pytest.approx(expected)


def test_an_iterator_is_read_once(gpt, tmp_path):
    rows = runs.rows(11, 5)
    expected = gpt.predict(rows)
    path = runs.write(tmp_path / "rows.csv", rows)
    texts = [row["text"] for row in rows]
    with open(path, newline="") as file:
        forms = [csv.DictReader(file), (row for row in rows), {"text": (text for text in texts)}]
        for form in forms:
            found = gpt.predict(form)
            assert found.labels == expected.labels
            np.testing.assert_array_equal(found.probabilities, expected.probabilities)
    assert gpt.score(iter(rows)) == gpt.score(rows)


def test_rows_may_come_as_mappings_or_as_columns(gpt):
    rows = runs.rows(11, 5)
    one = gpt.predict(rows)
    other = gpt.predict({"text": [row["text"] for row in rows]})
    assert one.labels == other.labels
    np.testing.assert_array_equal(one.probabilities, other.probabilities)
    assert one.probabilities.shape == (11, 2)
    np.testing.assert_allclose(one.probabilities.sum(axis=1), 1, atol=1e-6)
    assert one.label_names == ("no", "yes")
    assert [one.label_names[i] for i in one.probabilities.argmax(axis=1)] == one.labels
    assert (one.cut, one.empty) == (0, 0)


@pytest.mark.parametrize(
    "form",
    [
        lambda rows: {"text": tuple(row["text"] for row in rows)},
        lambda rows: {"text": np.array([row["text"] for row in rows])},
        lambda rows: {"text": pd.Series([row["text"] for row in rows])},
        pd.DataFrame,
        # Columns that are not read may hold anything; the rows count, not their index.
        lambda rows: pd.DataFrame(rows, index=range(5, 16)).assign(other=[object()] * 11),
        pa.Table.from_pylist,
        datasets.Dataset.from_list,
        lambda rows: datasets.Dataset.from_list(rows).with_format("numpy"),
    ],
)
def test_tables_of_all_kinds_give_the_same_predictions(gpt, form):
    rows = runs.rows(11, 5)
    expected, found = gpt.predict(rows), gpt.predict(form(rows))
    assert found.labels == expected.labels
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA])
def test_a_missing_text_is_an_empty_one(gpt, missing):
    frame = pd.DataFrame({"text": ["a cat", missing]}, dtype=object)
    assert gpt.predict(frame).empty == 1


def test_the_labels_of_a_data_frame_are_scored(gpt):
    rows = runs.rows(20, 6)
    expected = gpt.score({name: [row[name] for row in rows] for name in ("text", "label")})
    assert gpt.score(pd.DataFrame(rows)) == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a cat", "`rows`: is a str; give a mapping of column names to lists"),
        ({"text": "a cat"}, "`rows`: column 'text' is a str; give a list with one value a row"),
        (["a cat"], "`rows`: row 1 is a str; give a mapping of column names to values"),
        (
            datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": ["a"]})),
            "`rows`: has several splits; give one of them, such as ['test']",
        ),
        (
            datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(),
            "`rows`: is a stream; give a datasets.Dataset",
        ),
        (
            pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]),
            "`rows`: 2 columns have the name 'text'; rename them",
        ),
        (
            pd.DataFrame([["a", "b"]], columns=["text", "text"]),
            "`rows`: 2 columns have the name 'text'; rename them",
        ),
        ({"text": {"a cat"}}, "`rows`: column 'text' is a set; give a list with one value a row"),
        ({"text": [["a", "cat"]]}, "`rows`: row 1, column text: is a list, not a text or a number"),
        (pd.DataFrame({"texts": ["a"]}), "`rows`: no column 'text'; did you mean 'texts'?"),
    ],
)
def test_what_is_no_table_of_the_task_is_one_line(gpt, rows, message):
    with pytest.raises(UserError) as error:
        gpt.predict(rows)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_loading_and_using_a_model_prints_nothing(tmp_path):
    """Neither Python code nor the libraries that it calls."""
    code = (
        "import gptjax\n"
        f"gpt = gptjax.load({runs.trained()!r})\n"
        "gpt.predict([{'text': 'a cat'}])\n"
        "gpt.generate('the', 3)\n"
        "gpt.lm_logits([[1, 2, 3]])\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False,
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.path.dirname(runs.LAUNCH)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_prompt_may_be_given_as_token_ids(gpt):
    ids = gpt.tokenizer.encode("the cat")
    assert gpt.generate(ids, 5, seed=3) == gpt.generate("the cat", 5, seed=3)


def test_the_model_has_learned_what_is_separable(gpt):
    rows = runs.rows(100, 6)
    right = [a == row["label"] for a, row in zip(gpt.predict(rows).labels, rows, strict=True)]
    scores = gpt.score({name: [row[name] for row in rows] for name in ("text", "label")})
    assert scores["accuracy"] == pytest.approx(np.mean(right))
    assert scores["accuracy"] > 0.9
    assert scores["floor_accuracy"] < 0.7


def test_strange_rows(gpt):
    assert gpt.predict([]).labels == []
    found = gpt.predict([{"text": None}, {"text": ""}, {"text": "x " * 999}, {"text": 7}])
    assert len(found.labels) == 4
    assert (found.cut, found.empty) == (1, 2)
    with pytest.raises(UserError, match=r"no column 'text'; did you mean 'texts'\?"):
        gpt.predict([{"texts": "a"}])
    with pytest.raises(UserError, match="different lengths"):
        gpt.score({"text": ["a", "b"], "label": ["yes"]})
    with pytest.raises(UserError, match="label 'maybe' was not seen in training"):
        gpt.score({"text": ["a"], "label": ["maybe"]})
    with pytest.raises(UserError, match="was not fine-tuned for a task"):
        gptjax.load(f"{runs.trained()}/checkpoints/pretrain").predict([{"text": "a"}])


@pytest.mark.usefixtures("eight_devices")
def test_the_answer_does_not_depend_on_the_mesh(gpt):
    rows = runs.rows(9, 7)
    other = gptjax.load(runs.trained(), mesh_config=MeshConfig(data=2, fsdp=2, tensor=2))
    assert other.params["token_embedding"].sharding.mesh.shape == {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
    }
    np.testing.assert_allclose(
        other.predict(rows).probabilities, gpt.predict(rows).probabilities, atol=1e-5
    )


def test_generation_begins_with_the_prompt_and_repeats_with_its_seed(gpt):
    one = gpt.generate("the cat", 12, seed=3, num_samples=3)
    assert gpt.generate("the cat", 12, seed=3, num_samples=3) == one
    assert gpt.generate("the cat", 12, seed=4, num_samples=3) != one
    assert all(text.split()[:2] == ["the", "cat"] for text in one)
    assert len(set(one)) > 1
    greedy = gpt.generate("the cat", 5, temperature=0, num_samples=2)
    assert greedy[0] == greedy[1]
    assert gpt.generate("the cat", 5, temperature=1, top_k=1) == greedy[:1]
    assert [text.split() for text in gpt.generate("the cat", 0)] == [["the", "cat"]]
    assert len(gpt.tokenizer.encode(gpt.generate("the cat", 40)[0])) > 20  # beyond the context
    assert isinstance(gpt.generate("", 5)[0], str)


def test_greedy_generation_follows_the_logits(gpt):
    ids = gpt.tokenizer.encode("the cat")
    greedy = gpt.tokenizer.encode(gpt.generate("the cat", 4, temperature=0)[0])
    special = [gpt.tokenizer.start_id, gpt.tokenizer.delimiter_id, gpt.tokenizer.extract_id]
    special += [gpt.tokenizer.padding_id, gpt.tokenizer.unknown_id]
    for _ in range(4):
        logits = np.array(gpt.lm_logits([ids])[0, -1])
        logits[special] = logits[len(gpt.tokenizer) :] = -np.inf
        ids.append(int(logits.argmax()))
    assert gpt.tokenizer.decode(ids).split() == gpt.tokenizer.decode(greedy).split()


def test_nothing_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no checkpoint there"):
        gptjax.load(str(tmp_path))
