"""The same text in other models, and another text in the same model."""

import dataclasses
import itertools
import os
import shutil

import jax
import loaded
import numpy as np
import pytest
import runs
import small
from scipy import special

import gptjax
from gptjax.config import schema
from gptjax.data.tokens import tokenizer
from gptjax.errors import UserError
from gptjax.explain import comparison, data

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def other(gpt, **changes):
    """A model of the same kind with other parameters."""
    rng = np.random.default_rng(3)
    moved = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(p.dtype), gpt.params)
    return dataclasses.replace(gpt, **{"params": moved, "path": "runs/other", **changes})


def steps_of(folder):
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "similarity"])
def test_another_model_is_shown_as_it_is_alone(kind):
    gpt = loaded.model(kind)
    texts, label = loaded.texts(gpt), loaded.LABELS.get(kind)
    changed = other(gpt)
    alone = data.explain(changed, texts, label, compare=[])
    page = data.explain(gpt, texts, label, compare=[changed])
    assert alone["comparison"] == {"checkpoints": [], "left_out": [], "other": None}
    theirs, own = page["comparison"]["checkpoints"]
    assert (theirs["shown"], own["shown"]) == (False, True)
    for name in ("lm", "task", "total"):
        assert theirs["losses"][name] == alone["losses"][name]
        assert own["losses"][name] == page["losses"][name]
    assert theirs["surprise"] == alone["lm"]["surprise"]
    assert own["surprise"] == page["lm"]["surprise"]
    assert theirs["answer"] == (alone["answer"]["probabilities"] if kind else None)
    for place, best in enumerate(theirs["next"]):
        top = alone["lm"]["top"][place]
        assert [each["id"] for each in best] == [each["id"] for each in top[:3]]
        probabilities = np.exp([each["logit"] for each in top[:3]]) / np.exp(
            alone["lm"]["logsumexp"][place]
        )
        np.testing.assert_allclose([each["p"] for each in best], probabilities, atol=1e-6)
    assert np.ptp(own["heads"]) == 0 == own["heads"][0][0]
    np.testing.assert_allclose(own["states"], 1, atol=1e-12)


def test_distances_are_those_of_the_arrays():
    gpt = loaded.model("")
    changed, text = other(gpt), loaded.texts(gpt)
    names = ["attention", "embedding", "blocks"]
    a, b = gpt.inside(text, names), changed.inside(text, names)
    entry = data.explain(gpt, text, compare=[changed])["comparison"]["checkpoints"][0]
    layers, heads, length, _ = a["attention"].shape
    for layer in range(layers):
        for head in range(heads):
            # Total variation: the weight that must move to turn one distribution into the other.
            moved = [
                np.maximum(a["attention"][layer, head, t] - b["attention"][layer, head, t], 0).sum()
                for t in range(length)
            ]
            np.testing.assert_allclose(entry["heads"][layer][head], np.mean(moved), **CLOSE)
    for n in range(layers + 1):
        x, y = (each["embedding"] if n == 0 else each["blocks"][n - 1] for each in (a, b))
        units = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (x, y)]
        np.testing.assert_allclose(
            entry["states"][n], np.einsum("td,td->t", *units).mean(), **CLOSE
        )


@pytest.mark.slow
def test_a_model_of_other_sizes_has_no_distances():
    gpt = loaded.model("")
    bigger = dataclasses.replace(loaded.model("", num_heads=4, width=32), path="runs/bigger")
    entry = data.explain(gpt, loaded.texts(gpt), compare=[bigger])["comparison"]["checkpoints"][0]
    assert entry["heads"] is None
    assert entry["states"] is None
    assert entry["losses"]["lm"] > 0


@pytest.mark.slow
def test_another_task_has_no_answer():
    gpt, language = loaded.model("classification"), loaded.model("")
    page = data.explain(gpt, "the cat sat on a mat", 1, compare=[language])
    entry = page["comparison"]["checkpoints"][0]
    assert entry["answer"] is None
    assert entry["losses"]["task"] is None
    assert entry["losses"]["total"] is None
    # The language model reads the row of the task, with its special tokens.
    ids = gpt.read("the cat sat on a mat").batch.tokens[0]
    logits = np.asarray(language.lm_logits(ids[None]))[0].astype(float)
    nats = special.logsumexp(logits, axis=1)[:-1] - logits[np.arange(len(ids) - 1), ids[1:]]
    known = [value for value in entry["surprise"] if value is not None]
    np.testing.assert_allclose(known, nats[: len(known)], **CLOSE)


def is_subsequence(some, of):
    rest = iter(of)
    return all(each in rest for each in some)


def test_tokens_are_matched_in_order():
    rng = np.random.default_rng(0)
    for _ in range(100):
        ids, others = (rng.integers(0, 6, rng.integers(1, 9)).tolist() for _ in range(2))
        found = comparison.match(ids, others)
        pairs = [(i, j) for j, i in enumerate(found) if i is not None]
        assert all(ids[i] == others[j] for i, j in pairs)
        assert pairs == sorted(pairs)
        assert len({i for i, _ in pairs}) == len(pairs)
        assert comparison.match(ids, ids) == list(range(len(ids)))
        # As many as in any choice of tokens: each subsequence of the shorter, longest first.
        short, long = sorted((ids, others), key=len)
        most = max(
            size
            for size in range(len(short) + 1)
            for chosen in itertools.combinations(short, size)
            if is_subsequence(chosen, long)
        )
        assert len(pairs) == most


@pytest.mark.slow
def test_a_change_spreads_to_later_tokens_only():
    gpt = loaded.model("classification")
    texts = "the cat sat on a mat", "the cat ran on a mat"
    page = data.explain(gpt, texts[0], 1, compare=[], other_text=texts[1])
    found = page["comparison"]["other"]
    alone = data.explain(gpt, texts[1], compare=[])
    assert found["answer"] == alone["answer"]["probabilities"]
    assert found["losses"] == {name: alone["losses"][name] for name in ("lm", "task", "total")}
    assert found["surprise"] == alone["lm"]["surprise"]
    assert found["task"] == alone["lens"]["task"]
    assert [each["id"] for each in found["tokens"]] == [each["id"] for each in alone["tokens"]]
    first = found["match"].index(None)
    distances = np.array(
        [[np.nan if value is None else value for value in row] for row in found["distance"]]
    )
    assert np.nanmax(distances[:, :first]) < 1e-6
    assert np.nanmax(distances[0]) < 1e-6  # no other embedding has changed
    after = [j for j, i in enumerate(found["match"]) if i is not None and j > first]
    assert (distances[1:, after] > 1e-5).all()


def test_equal_texts_have_no_distance():
    gpt = loaded.model("")
    text = loaded.texts(gpt)
    found = data.explain(gpt, text, compare=[], other_text=text)["comparison"]["other"]
    assert found["match"] == list(range(len(found["tokens"])))
    np.testing.assert_allclose(found["distance"], 0, atol=1e-6)


@pytest.mark.slow
def test_the_run_gives_its_checkpoints():
    workdir = runs.trained()
    gpt = gptjax.load(workdir)
    kept = comparison.kept(gpt)
    steps = [
        (stage, step)
        for stage in ("pretrain", "finetune")
        for step in steps_of(f"{workdir}/checkpoints/{stage}")
    ]
    assert kept == [f"{workdir}/checkpoints/{stage}/{step}" for stage, step in steps]
    # Other names of the same checkpoint are this checkpoint, and each is shown once.
    step = gpt.path
    odd = [
        workdir,
        step,
        f"{step}/",
        f"{workdir}/checkpoints/pretrain",
        f"{workdir}/./checkpoints/pretrain",
    ]
    few = data.explain(gpt, "the old man saw a tree", compare=odd)["comparison"]["checkpoints"]
    assert [(each["stage"], each["shown"]) for each in few] == [
        ("finetune", True),
        ("pretrain", False),
    ]
    entries = gpt.explain("the old man saw a tree", "yes").data["comparison"]["checkpoints"]
    assert [(each["stage"], each["step"]) for each in entries] == steps
    assert [each["path"] for each in entries if each["shown"]] == [gpt.path]


@pytest.mark.slow
def test_totals_have_the_weights_of_the_page():
    """Another run can have another lambda. Its losses are weighed as those of the page."""
    gpt = loaded.model("classification")
    experiment = schema.from_dict(schema.Experiment, gpt.meta.experiment, "test")
    finetune = dataclasses.replace(experiment.finetune, lm_weight=7.0)
    experiment = dataclasses.replace(experiment, finetune=finetune)
    meta = dataclasses.replace(gpt.meta, experiment=schema.to_dict(experiment))
    page = data.explain(gpt, "the cat sat on a mat", 1, compare=[other(gpt, meta=meta)])
    losses = page["comparison"]["checkpoints"][0]["losses"]
    expected = losses["task"] + loaded.LM_WEIGHT * losses["lm"]
    np.testing.assert_allclose(losses["total"], expected, rtol=1e-6)
    texts = [each["text"] for each in page["comparison"]["checkpoints"][1]["next"][3]]
    assert texts == [each["text"] for each in page["lm"]["top"][3][:3]]


@pytest.mark.slow
def test_sequences_are_matched_with_their_own():
    """The second answer is equal in both texts, although the first has changed."""
    gpt = loaded.model("multiple_choice")
    texts = loaded.texts(gpt)
    changed = texts | {gpt.task.choices[0]: texts[gpt.task.choices[0]] + " again"}
    found = data.explain(gpt, texts, compare=[], other_text=changed)["comparison"]["other"]
    row, other_row = gpt.read(texts), gpt.read(changed)
    (start, stop), (new_start, new_stop) = row.sequences[1], other_row.sequences[1]
    assert found["match"][new_start:new_stop] == list(range(start, stop))
    assert found["losses"]["task"] is None


def test_large_models_are_compared_only_by_name(monkeypatch):
    gpt = loaded.model("")
    monkeypatch.setattr(comparison, "kept", lambda _: ["somewhere"])
    assert comparison._found(gpt) == ["somewhere"]
    monkeypatch.setattr(comparison, "_MOST_PARAMETERS", 10)
    assert comparison._found(gpt) == []


@pytest.mark.parametrize(
    "path", ["/finetune/7", "/models/pretrain/117", "/a/finetune/²", "hf://a/b"]
)
def test_other_places_keep_no_checkpoints(path):
    gpt = dataclasses.replace(loaded.model(""), path=path)
    assert comparison.kept(gpt) == []


def test_many_checkpoints_are_thinned():
    paths = [str(i) for i in range(100)]
    for own in (0, 1, 50, 98, 99):
        chosen = comparison._evenly(paths, own)
        assert len(chosen) <= 12
        assert {"0", "99", str(own)} <= set(chosen)
        assert chosen == sorted(chosen, key=int)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_left_out_and_named(tmp_path):
    workdir = runs.copy(tmp_path)
    stage = f"{workdir}/checkpoints/pretrain"
    step = steps_of(stage)[-1]
    shutil.rmtree(f"{stage}/{step}/params")
    gpt = gptjax.load(workdir)
    found = data.explain(gpt, "the old man saw a tree")["comparison"]
    (left_out,) = found["left_out"]
    assert left_out["name"] == f"{stage}/{step}"
    assert "damaged" in left_out["reason"]
    with pytest.raises(UserError, match="damaged"):
        data.explain(gpt, "the old man saw a tree", compare=[f"{stage}/{step}"])


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        (lambda gpt: ["nowhere"], "`compare`=nowhere: no checkpoint there"),
        (lambda gpt: "runs/a", "`compare`: is a str; give a list of models or paths"),
        (lambda gpt: gpt, "`compare`: is a GPT; give a list of models or paths"),
        (lambda gpt: (each for each in ["a"]), "`compare`: is a generator; give a list"),
        (lambda gpt: [None], "`compare`: has a NoneType; give models or paths"),
        (lambda gpt: [other(gpt)] * 33, "`compare`: 33 models; give at most 32"),
        (
            lambda gpt: [other(gpt, config=dataclasses.replace(gpt.config, context_length=3))],
            "`compare`: runs/other reads 3 tokens",
        ),
        (
            lambda gpt: [other(gpt, tokenizer=tokenizer.train_bpe([small.WORDS], 55))],
            "`compare`: runs/other has another tokenizer",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(compare, message):
    gpt = loaded.model("")
    with pytest.raises(UserError, match=message):
        data.explain(gpt, loaded.texts(gpt), compare=compare(gpt))


def test_the_other_text_is_named_in_errors():
    gpt = loaded.model("")
    with pytest.raises(UserError, match=r"`other_text`: has \d+ tokens, and the context"):
        data.explain(gpt, loaded.texts(gpt), compare=[], other_text="a cat " * 500)
