"""The numbers of the page are the model's (`docs/explain_json.md`)."""

import base64
import json
import pathlib
import re

import jax
import loaded
import numpy as np
import pytest
import reference
import small

import gptjax
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.errors import UserError
from gptjax.explain import data, words

FAST = ("",)
KINDS = [
    *FAST,
    *(
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in ("classification", "entailment", "similarity", "multiple_choice", "regression")
    ),
]
LABELS = loaded.LABELS
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Pages(dict):
    """Kind -> the model, its row, and the data of its page as a browser has it."""

    def __missing__(self, kind):
        gpt = loaded.model(kind)
        texts, label = loaded.texts(gpt), LABELS.get(kind)
        page = json.loads(json.dumps(data.explain(gpt, texts, label), allow_nan=False))
        self[kind] = gpt, gpt.read(texts, label), page
        return self[kind]


@pytest.fixture(scope="module")
def pages():
    """The pages of all kinds, each made when a test needs it."""
    return Pages()


def array(text, dtype, *shape):
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_those_of_evaluate(pages, kind):
    gpt, row, page = pages[kind]
    if kind:
        scores = gpt.score([{**row.texts, "label": LABELS[kind]}])
        np.testing.assert_allclose(page["losses"]["lm"], scores["lm_loss"], rtol=1e-5)
        np.testing.assert_allclose(page["losses"]["task"], scores["task_loss"], rtol=1e-5)
        total = scores["task_loss"] + loaded.LM_WEIGHT * scores["lm_loss"]
        np.testing.assert_allclose(page["losses"]["total"], total, rtol=1e-5)
        prediction = gpt.predict([row.texts])
        if kind == "regression":
            np.testing.assert_allclose(
                page["answer"]["prediction"], prediction.labels[0], rtol=1e-5
            )
        else:
            assert page["answer"]["prediction"] == prediction.labels[0]
            shown = page["answer"]["probabilities"]
            np.testing.assert_allclose(shown, prediction.probabilities[0], rtol=1e-5)
    else:
        expected = gpt.score_text([row.texts["text"]])["loss"]
        np.testing.assert_allclose(page["losses"]["lm"], expected, rtol=1e-5)
        assert page["losses"]["total"] == page["losses"]["lm"]


@pytest.mark.parametrize("kind", KINDS)
def test_surprise_and_top_tokens_are_those_of_the_logits(pages, kind):
    gpt, row, page = pages[kind]
    logits = np.asarray(gpt.lm_logits(row.batch.tokens, row.batch.segment_ids))[0].astype(float)
    nats = -reference.log_softmax(logits)
    lm = page["lm"]
    for t, surprise in enumerate(lm["surprise"]):
        if surprise is None:
            assert t + 1 in [b for _, b in row.sequences]
            assert lm["next"][t] is None
            continue
        assert lm["next"][t]["id"] == row.batch.tokens[0, t + 1]
        np.testing.assert_allclose(surprise, nats[t, row.batch.tokens[0, t + 1]], **CLOSE)
        order = np.argsort(-logits[t], kind="stable")[: len(lm["top"][t])]
        np.testing.assert_allclose([e["logit"] for e in lm["top"][t]], logits[t][order], **CLOSE)
        assert sum(e["id"] not in lm["never_drawn"] for e in lm["top"][t]) == 50
        drawn = np.where(gpt.never_drawn, -np.inf, logits[t])
        total = np.log(np.exp(drawn).sum())
        np.testing.assert_allclose(lm["drawn_logsumexp"][t], total, **CLOSE)
        top = page["lens"]["top"][-1][t]
        np.testing.assert_allclose([e["p"] for e in top], np.exp(-nats[t][order[:5]]), **CLOSE)
        rank = 1 + (logits[t] > logits[t, row.batch.tokens[0, t + 1]]).sum()
        assert page["lens"]["rank"][-1][t] == rank
    mean = np.mean([s for s in lm["surprise"] if s is not None])
    np.testing.assert_allclose(mean, page["losses"]["lm"], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_travels_whole(pages, kind):
    gpt, row, page = pages[kind]
    length, shape = row.length, (2, 3)
    weights = gpt.inside(row, ["attention"])["attention"]
    lower = np.tril_indices(length)
    sent = array(page["attention"]["weights"], "u1", *shape, len(lower[0]))
    assert np.abs(sent / 255 - weights[:, :, *lower]).max() <= 0.5 / 255 + 1e-6
    visible = np.zeros((length, length), bool)
    for a, b in row.sequences:
        visible[a:b, a:b] = np.tri(b - a)
    np.testing.assert_array_equal(array(page["attention"]["visible"], "u1", -1), visible[lower])
    keys = array(page["attention"]["top"]["keys"], "<u2", *shape, length, 8)
    values = array(page["attention"]["top"]["values"], "<f4", *shape, length, 8)
    size = min(8, length)
    taken = np.take_along_axis(weights, keys[..., :size].astype(int), -1)
    np.testing.assert_allclose(values[..., :size], taken, atol=1e-6)
    np.testing.assert_allclose(values[..., 0], weights.max(-1), atol=1e-6)
    for head in page["heads"]:
        q, k, v, out = (array(head[name], "<f4", length, 8) for name in ("q", "k", "v", "out"))
        scores = np.where(visible, q @ k.T / np.sqrt(8), -np.inf)
        own = weights[head["layer"], head["head"]]
        np.testing.assert_allclose(reference.softmax(scores), own, **CLOSE)
        np.testing.assert_allclose(own @ v, out, **CLOSE)
        pattern = next(
            p for p in page["patterns"] if (p["layer"], p["head"]) == (head["layer"], head["head"])
        )
        first = [own[t, a] for a, b in row.sequences for t in range(a + 1, b)]
        np.testing.assert_allclose(pattern["first"], np.mean(first), **CLOSE)
        previous = [own[t, t - 1] for a, b in row.sequences for t in range(a + 1, b)]
        np.testing.assert_allclose(pattern["previous"], np.mean(previous), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_table_has_every_parameter_once(pages, kind):
    gpt, row, page = pages[kind]
    leaves = small.jax.tree.leaves(gpt.params)
    assert page["model"]["parameters"] == sum(x.size for x in leaves)
    assert sum(step["parameters"] for step in page["steps"]) == page["model"]["parameters"]
    norms = {(s["name"], s["layer"]): s["norm"] for s in page["steps"]}
    blocks = gpt.inside(row, ["blocks"])["blocks"]
    for layer in range(2):
        expected = np.linalg.norm(blocks[layer], axis=-1).mean()
        np.testing.assert_allclose(norms["norm2", layer], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_words_and_sequences_are_those_of_the_row(pages, kind):
    gpt, row, page = pages[kind]
    assert [t["id"] for t in page["tokens"]] == row.batch.tokens[0].tolist()
    assert [(s["start"], s["stop"]) for s in page["sequences"]] == row.sequences
    if kind:
        assert [s["extract"] for s in page["sequences"]] == [b - 1 for _, b in row.sequences]
    # The tokenizer's own text leaves out what it does not know.
    known = [word for word in page["words"] if word["text"] != tokenizer_lib.UNKNOWN]
    text = gpt.tokenizer.decode(row.batch.tokens[0])
    assert "".join(word["text"] for word in known) == "".join(text.split())
    for word in known:
        assert word["steps"][0] == list(word["text"])
        sizes = [len(step) for step in word["steps"]]
        assert sizes == list(range(sizes[0], sizes[-1] - 1, -1))
    for token in page["tokens"]:
        assert (token["word"] is None) == (token["kind"] != "text")


def test_the_merges_of_a_word_end_in_its_tokens():
    trained = tokenizer_lib.train_bpe(small.texts(200), 90)
    for word in {*small.WORDS.split(), "unseenword", "catmat", "aaa"}:
        pieces = [trained.token(i) for i in trained.encode(word)]
        if tokenizer_lib.UNKNOWN not in pieces:
            assert words.Merges(trained).steps(pieces)[-1] == pieces


def test_the_documented_keys_are_the_keys(pages):
    documented = pathlib.Path(data.__file__).parents[2] / "docs" / "explain_json.md"
    table = documented.read_text(encoding="utf-8").split("## ")[0]
    keys = {
        name
        for row in re.findall(r"^\| (`.*?) \|", table, re.M)
        for name in re.findall(r"`(\w+)`", row)
    }
    for page in (pages[kind][2] for kind in FAST):
        assert set(page) == keys
        for name in (
            "model",
            "answer",
            "losses",
            "embedding",
            "attention",
            "lens",
            "lm",
            "attribution",
            "training",
            "input",
            "task",
        ):
            row = next(line for line in table.splitlines() if f"| `{name}` |" in line)
            assert set(page[name] or ()) <= set(re.findall(r"\w+", row)), name


@pytest.mark.slow
def test_equal_texts_give_equal_pages():
    gpt = loaded.model("classification")
    pages = [json.dumps(data.explain(gpt, "a cat sat", 1)) for _ in range(2)]
    assert pages[0] == pages[1]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", " ", "\u202ecat\x1b[31m</script>", "x" * 10000, "\ud800"])
def test_any_text_gives_a_page(text):
    page = data.explain(loaded.model("classification"), text)
    json.dumps(page, allow_nan=False).encode()
    assert page["input"]["cut"] == (len(text) > 100)


def test_a_head_that_does_not_exist_is_one_line():
    with pytest.raises(UserError, match=r"there is no head 5\.0"):
        data.explain(loaded.model("classification"), "a cat", heads=[(5, 0)])


def test_a_long_computation_is_announced(monkeypatch):
    gpt = loaded.model("classification")
    assert data.how_long(gpt, "a cat") == ""
    length = gpt.read("a cat").length
    count = sum(x.size for x in jax.tree.leaves(gpt.params))
    monkeypatch.setattr(data, "_LONG_FLOPS", 2 * count * length**2)
    assert data.how_long(gpt, "a cat").startswith(f"{length} tokens; ")
    monkeypatch.setattr(data, "_LONG_FLOPS", 2 * count * length**2 + 1)
    assert data.how_long(gpt, "a cat") == ""
    assert data.how_long(loaded.model(""), "a cat " * 5) == ""


@pytest.mark.slow
def test_one_matrix_and_a_flattened_head_have_a_page():
    """One matrix for all embeddings: the softmax of the LM head has outputs for positions too.

    A flattened head reads the states of all positions of a padded sequence.
    """
    gpt = loaded.unusual()
    texts, label = loaded.texts(gpt), LABELS["entailment"]
    page = data.explain(gpt, texts, label)
    row = gpt.read(texts, label)
    found = gpt.inside(row, ["blocks", "task_logits"])
    x_TD = found["blocks"][-1].astype(float)
    params = reference.cast(gpt.params)

    rows = np.concatenate([params["token_embedding"], params["position_embedding"]])
    log_p = reference.log_softmax(x_TD @ rows.T)
    known = [t for t, value in enumerate(page["lm"]["surprise"]) if value is not None]
    nats = [-log_p[t, row.batch.tokens[0, t + 1]] for t in known]
    np.testing.assert_allclose([page["lm"]["surprise"][t] for t in known], nats, **CLOSE)
    np.testing.assert_allclose(page["losses"]["lm"], np.mean(nats), **CLOSE)
    scores = gpt.score([{**row.texts, "label": label}])
    np.testing.assert_allclose(page["losses"]["lm"], scores["lm_loss"], rtol=1e-5)
    np.testing.assert_allclose(page["losses"]["task"], scores["task_loss"], rtol=1e-5)
    for best in page["lens"]["top"][-1][:3]:
        place = page["lens"]["top"][-1].index(best)
        for each in best:
            np.testing.assert_allclose(each["p"], np.exp(log_p[place, each["id"]]), **CLOSE)

    head = params["task_head"]
    logits = np.einsum("sd,sdo->o", x_TD, head["kernel"]) + head["bias"]
    np.testing.assert_allclose(page["answer"]["logits"], logits, **CLOSE)
    assert page["model"]["head"] == "flatten"
    assert sum(step["parameters"] for step in page["steps"]) == page["model"]["parameters"]
    kinds = [token["kind"] for token in page["tokens"]]
    assert len(kinds) == 24
    assert "padding" in kinds
    for token, kind in zip(page["tokens"], kinds, strict=True):
        assert token["seen"] == (kind != "padding")
    np.testing.assert_allclose(page["lens"]["task"][-1], page["answer"]["probabilities"], **CLOSE)
    assert abs(page["attribution"]["error"]) < 0.01 * abs(page["attribution"]["difference"]) + 1e-4

    # A flattened head reads zeros in the place of a hidden token.
    hidden = gpt.inside(row, ["blocks", "task_logits"], gptjax.Changes(hidden_tokens=[2]))
    x_TD = hidden["blocks"][-1].astype(float)
    x_TD[2] = 0
    logits = np.einsum("sd,sdo->o", x_TD, head["kernel"]) + head["bias"]
    np.testing.assert_allclose(hidden["task_logits"], logits, **CLOSE)
    output = page["attribution"]["output"]
    left_out = page["attribution"]["methods"]["leave_one_out"][2]
    np.testing.assert_allclose(left_out, page["answer"]["logits"][output] - logits[output], **CLOSE)
