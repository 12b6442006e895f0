"""Named activations, changes, lens and attribution, against GPT-1 in float64 NumPy."""

import loaded
import numpy as np
import pytest
import reference

import gptjax
from gptjax.errors import UserError
from gptjax.infer import inside
from gptjax.infer.inside import AXES, Changes
from gptjax.ops.attention import plain

KINDS = ("", "classification", "entailment", "similarity", "multiple_choice", "regression")
# float32 against float64, for values near 1.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def everything(gpt, changes=None):
    row = gpt.read(loaded.texts(gpt))
    names = [name for name in AXES if gpt.task or name != "task_logits"]
    return row, gpt.inside(row, names, changes)


def types_of(gpt, row, a, b):
    return row.batch.token_types[0, a:b] if gpt.config.segment_types else None


def block_by_block(params, x_TD, activation="gelu_tanh"):
    """The activations of one sequence, from the formulas, with the embedding given."""
    act = {"gelu_tanh": reference.gelu, "relu": reference.relu}[activation]
    found = {name: [] for name in AXES}
    for index in range(len(params["blocks"]["norm1"]["scale"])):
        p = reference.layer(params["blocks"], index)
        a = p["attention"]
        qkv = np.einsum("td,dihk->tihk", x_TD, a["qkv"]["kernel"]) + a["qkv"]["bias"]
        q, k, v = (np.moveaxis(x, 1, 0) for x in np.moveaxis(qkv, 1, 0))
        scores = q @ np.moveaxis(k, 1, 2) / np.sqrt(q.shape[-1])
        weights = reference.softmax(np.where(np.tri(len(x_TD), dtype=bool), scores, -np.inf))
        heads = np.moveaxis(weights @ v, 0, 1)
        attention_out = np.einsum("thk,hkd->td", heads, a["out"]["kernel"]) + a["out"]["bias"]
        norm1 = reference.layer_norm(x_TD + attention_out, p["norm1"])
        ffn = act(norm1 @ p["ffn_in"]["kernel"] + p["ffn_in"]["bias"])
        ffn_out = ffn @ p["ffn_out"]["kernel"] + p["ffn_out"]["bias"]
        x_TD = reference.layer_norm(norm1 + ffn_out, p["norm2"])
        for name, value in (
            ("qkv", qkv), ("scores", scores), ("attention", weights), ("heads", heads),
            ("attention_out", attention_out), ("norm1", norm1), ("ffn", ffn), ("ffn_out", ffn_out),
            ("blocks", x_TD),
        ):  # fmt: skip
            found[name].append(value)
    return {name: np.stack(value) for name, value in found.items() if value}


@pytest.mark.parametrize("kind", KINDS)
def test_each_activation_is_that_of_the_formulas(kind):
    gpt = loaded.model(kind)
    row, found = everything(gpt)
    params = reference.cast(gpt.params)
    states = []
    for a, b in row.sequences:
        tokens = row.batch.tokens[0, a:b]
        x_TD = params["token_embedding"][tokens] + params["position_embedding"][: b - a]
        np.testing.assert_allclose(found["embedding"][a:b], x_TD, **CLOSE)
        for name, value in block_by_block(params, x_TD).items():
            got = found[name]
            if AXES[name].endswith("TS"):
                got = got[:, :, a:b, a:b]
                if name == "scores":
                    value = np.where(np.tri(b - a, dtype=bool), value, plain.HIDDEN_SCORE)
            else:
                got = got[:, a:b]
            np.testing.assert_allclose(got, value, err_msg=name, **CLOSE)
        states.append(reference.hidden(params, tokens))
        np.testing.assert_allclose(
            found["logits"][a:b], reference.lm_logits(params, states[-1]), rtol=1e-4, atol=1e-4
        )
    if kind:
        outputs = reference.task_outputs(params, kind, [x[-1] for x in states])
        np.testing.assert_allclose(found["task_logits"], outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_is_causal_and_divides_the_sequences(kind):
    gpt = loaded.model(kind)
    row, found = everything(gpt)
    visible = np.zeros((row.length, row.length), bool)
    for a, b in row.sequences:
        visible[a:b, a:b] = np.tri(b - a)
    for name, hidden in (("scores", plain.HIDDEN_SCORE), ("attention", 0.0)):
        assert np.all((found[name] == hidden) == ~visible), name
    np.testing.assert_allclose(found["attention"].sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_changes_no_logit(kind):
    gpt = loaded.model(kind)
    row, found = everything(gpt)
    np.testing.assert_array_equal(gpt.inside(row, ["logits"])["logits"], found["logits"])
    plain_logits = gpt.lm_logits(row.batch.tokens, row.batch.segment_ids)[0]
    np.testing.assert_allclose(found["logits"], plain_logits, **CLOSE)
    if kind:
        predicted = gpt.predict([row.texts])
        shown = found["task_logits"]
        if kind == "regression":
            np.testing.assert_allclose(predicted.labels, shown, **CLOSE)
        else:
            probabilities = reference.softmax(shown.astype(float) / gpt.temperature)
            np.testing.assert_allclose(predicted.probabilities[0], probabilities, **CLOSE)


def test_the_mean_head_and_windows_are_read_as_in_predict():
    for changes in (
        {"mean": True},
        {"windows": 3, "context_length": 6},
        {"mean": True, "windows": 3},
    ):
        gpt = loaded.model("classification", **changes)
        row, found = everything(gpt)
        assert (len(row.sequences) > 1) == ("context_length" in changes)
        probabilities = reference.softmax(found["task_logits"].astype(float) / gpt.temperature)
        np.testing.assert_allclose(
            gpt.predict([row.texts]).probabilities[0], probabilities, **CLOSE
        )


def test_switched_off_heads_are_those_of_a_model_whose_output_kernel_is_zero():
    gpt = loaded.model("classification")
    off = [(0, 1), (1, 0), (1, 2)]
    row, found = everything(gpt, Changes(heads_off=off))
    params = reference.cast(gpt.params)
    for layer, head in off:
        params["blocks"]["attention"]["out"]["kernel"][layer, head] = 0
        assert not found["heads"][layer, :, head].any()
    states = reference.hidden(params, row.batch.tokens[0])
    np.testing.assert_allclose(found["blocks"][-1], states, **CLOSE)
    every = [(layer, head) for layer in range(2) for head in range(3)]
    _, found = everything(gpt, Changes(heads_off=every))
    bias = params["blocks"]["attention"]["out"]["bias"]
    np.testing.assert_allclose(
        found["attention_out"], np.tile(bias[:, None], (1, row.length, 1)), **CLOSE
    )


def test_a_hidden_token_is_seen_by_no_other():
    gpt = loaded.model("classification")
    row, found = everything(gpt, Changes(hidden_tokens=[2, 4]))
    hidden = np.isin(np.arange(row.length), [2, 4])
    states = reference.hidden(reference.cast(gpt.params), row.batch.tokens[0], padding=hidden)
    np.testing.assert_allclose(found["blocks"][-1][~hidden], states[~hidden], **CLOSE)


def test_a_replaced_state_is_the_state_that_the_rest_reads():
    gpt = loaded.model("classification")
    row, before = everything(gpt)
    same = {(n, 3): x[3] for n, x in enumerate([before["embedding"], *before["blocks"]])}
    _, found = everything(gpt, Changes(states=same))
    for name, value in before.items():
        np.testing.assert_allclose(found[name], value, err_msg=name, **CLOSE)
    other = everything(gpt, Changes(hidden_tokens=[1]))[1]
    places = {(1, t): other["blocks"][0][t] for t in range(row.length)}
    _, found = everything(gpt, Changes(states=places))
    params = reference.cast(gpt.params)
    second = reference.layer(params["blocks"], slice(1, 2))
    expected = block_by_block({**params, "blocks": second}, other["blocks"][0].astype(float))
    np.testing.assert_allclose(found["blocks"][1], expected["blocks"][0], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_lens_reads_each_state_with_the_heads(kind):
    gpt = loaded.model(kind)
    row, found = everything(gpt)
    states = np.concatenate([found["embedding"][None], found["blocks"]])
    logits = inside.lm_lens(gpt.opened, gpt.params, states)
    table = reference.cast(gpt.params)["token_embedding"]
    np.testing.assert_allclose(logits, states @ table.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits[-1], found["logits"], **CLOSE)
    if kind:
        outputs = np.asarray(inside.task_lens(gpt.opened, gpt.params, states, row.batch))
        np.testing.assert_allclose(outputs[-1], found["task_logits"], **CLOSE)
        assert outputs.shape == (3, len(found["task_logits"]))


def output_of(gpt, row, output, scale=None):
    """An output of the task head in float64, with the token embeddings of the row scaled [T]."""
    params, ids = reference.cast(gpt.params), row.batch.tokens[0]
    states = []
    for a, b in row.sequences:
        factors = np.ones(b - a) if scale is None else scale[a:b]
        x_TD = factors[:, None] * params["token_embedding"][ids[a:b]]
        x_TD = x_TD + params["position_embedding"][: b - a]
        states.append(block_by_block(params, x_TD)["blocks"][-1])
    return reference.task_outputs(params, gpt.task.kind, [x[-1] for x in states])[output]


@pytest.mark.parametrize(
    "kind",
    ["similarity", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:]
                     if kind != "similarity")],
)  # fmt: skip
def test_attribution_is_complete_and_its_gradients_are_right(kind):
    gpt = loaded.model(kind)
    row = gpt.read(loaded.texts(gpt))
    special = {gpt.tokenizer.start_id, gpt.tokenizer.delimiter_id, gpt.tokenizer.extract_id}
    is_text = ~np.isin(row.batch.tokens[0], list(special))
    output = 0
    found = inside.attribution(gpt.opened, gpt.params, row.batch, output, is_text)
    whole, nothing = output_of(gpt, row, output), output_of(gpt, row, output, ~is_text * 1.0)
    assert abs(found.difference - (whole - nothing)) < 1e-4
    assert abs(found.error) < 0.01 * max(0.1, abs(found.difference))
    for name in ("integrated_gradients", "gradient_x_input", "leave_one_out"):
        assert not getattr(found, name)[~is_text].any()
    for token in np.flatnonzero(is_text)[::3]:
        step = 1e-4 * (np.arange(row.length) == token)
        slope = (
            output_of(gpt, row, output, 1 + step) - output_of(gpt, row, output, 1 - step)
        ) / 2e-4
        assert abs(found.gradient_x_input[token] - slope) < 1e-3
        hidden = gpt.inside(row, ["task_logits"], Changes(hidden_tokens=[int(token)]))
        without = hidden["task_logits"][output]
        assert abs(found.leave_one_out[token] - (whole - without)) < 1e-4


@pytest.mark.parametrize(
    ("kind", "keep", "changes", "message"),
    [
        ("", ["atention"], {}, "`keep`: there is no 'atention'; did you mean 'attention'?"),
        ("", ["task_logits"], {}, "is a language model and has no task_logits"),
        ("", ["logits"], {"heads_off": [(2, 0)]}, "`heads_off`: there is no head (2, 0)"),
        ("", ["logits"], {"hidden_tokens": [99]}, "`hidden_tokens`: there is no token 99"),
        ("", ["logits"], {"states": {(0, 99): np.zeros(24)}}, "there is no state (0, 99)"),
        ("", ["logits"], {"states": {(1, 0): np.zeros(3)}}, "must be [24], not (3,)"),
    ],
)
def test_wrong_wishes_are_one_line(kind, keep, changes, message):
    gpt = loaded.model(kind)
    with pytest.raises(UserError) as error:
        gpt.inside(loaded.texts(gpt), keep, gptjax.Changes(**changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "texts", "label", "message"),
    [
        ("", "cat", None, "`text`: has "),
        ("", "cat " * 99, None, "the context of the model has 32"),
        ("", {"text": "cat"}, None, "reads one text"), ("", "a cat", "x", "is a language model"),
        ("similarity", "cat", None, "reads 2 texts: text, pair"),
        ("similarity", {"text": "cat"}, None, "pair"),
        ("classification", "cat", "seven", "label 'seven' was not seen in training"),
        ("regression", {"text": "a", "pair": "b"}, "much", "'much' is not a number"),
    ],
)  # fmt: skip
def test_wrong_texts_are_one_line(kind, texts, label, message):
    with pytest.raises(UserError) as error:
        loaded.model(kind).read(texts, label)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
