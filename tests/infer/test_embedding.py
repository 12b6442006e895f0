"""The vectors of `gpt.embed`, against GPT-1 in float64 NumPy."""

import loaded
import numpy as np
import pytest
import reference
import small

from gptjax.errors import UserError

CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("classification", {}), ("classification", {"mean": True}),
        ("classification", {"windows": 3, "context_length": 8}), ("entailment", {}),
        ("similarity", {}), ("multiple_choice", {}), ("regression", {}),
    ],
)  # fmt: skip
def test_a_vector_is_what_the_task_head_reads(kind, changes):
    gpt = loaded.model(kind, **changes)
    texts = small.texts(9, seed=3)
    rows = [
        {name: texts[(i + 2 * c) % 9] for c, name in enumerate(gpt.task.text_columns)}
        for i in range(9)
    ]
    found = gpt.embed(rows)
    params = reference.cast(gpt.params)
    for row, vector in zip(rows, found, strict=True):
        read = gpt.read(row)
        states = [reference.hidden(params, read.batch.tokens[0, a:b]) for a, b in read.sequences]
        ends = [x.mean(axis=0) if gpt.task.mean else x[-1] for x in states]
        if kind in ("similarity", "regression"):
            ends = np.sum(ends, axis=0)
        elif kind != "multiple_choice":
            ends = np.mean(ends, axis=0)
        np.testing.assert_allclose(vector, ends, **CLOSE)
    # The head itself, on these vectors, gives the prediction.
    head = params["task_head"]
    outputs = found.astype(float) @ head["kernel"] + head["bias"]
    predicted = gpt.predict(rows)
    if kind == "regression":
        np.testing.assert_allclose(outputs[:, 0], predicted.labels, rtol=1e-4, atol=1e-4)
    else:
        logits = outputs[..., 0] if kind == "multiple_choice" else outputs
        names = [predicted.label_names[i] for i in logits.argmax(axis=1)]
        assert names == predicted.labels


def test_a_language_model_gives_the_mean_state():
    gpt = loaded.model("")
    texts = small.texts(40, seed=4)
    found = gpt.embed(texts)
    params = reference.cast(gpt.params)
    for text, vector in zip(texts, found, strict=True):
        states = reference.hidden(params, np.array(gpt.tokenizer.encode(text)))
        np.testing.assert_allclose(vector, states.mean(axis=0), **CLOSE)
    assert gpt.embed([]).shape == (0, 24)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a cat", "is a single text"), (["a cat", ""], "text 2 has no tokens"),
        (["a", "cat " * 99], "text 2 has"), ([{"text": "a"}], "1 is a dict"),
    ],
)  # fmt: skip
def test_wrong_texts_are_one_line(rows, message):
    with pytest.raises(UserError, match=message):
        loaded.model("").embed(rows)


def test_no_rows_give_no_vectors():
    assert loaded.model("classification").embed({"text": []}).shape == (0, 24)
