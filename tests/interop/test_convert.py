import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import safetensors.flax
import safetensors.numpy
import small

import gptjax
from gptjax.config.schema import TaskSpec
from gptjax.data.tokens import tokenizer as tokenizer_lib
from gptjax.errors import UserError
from gptjax.interop import arrays as arrays_lib
from gptjax.interop import convert, huggingface, openai
from gptjax.interop.arrays import Weights
from gptjax.model import gpt
from gptjax.parameters import TASK_HEAD_BIAS, TASK_HEAD_KERNEL, TOKEN_EMBEDDING

TASKS = {
    "none": None,
    "classification": TaskSpec("classification", "words", labels=("x", "y", "ü")),
    "entailment": TaskSpec("entailment", "a", "b", label="c", labels=("0", "1")),
    "similarity": TaskSpec("similarity", "a", "b", labels=("0", "1")),
    "multiple_choice": TaskSpec("multiple_choice", "a", choices=("b", "c"), labels=("1", "2")),
    "regression": TaskSpec("regression", "a", "b"),
    "mean": TaskSpec("classification", "words", labels=("x", "y"), mean=True),
}


def make(task: TaskSpec | None = None, tokenizer=None, **changes) -> Weights:
    """Returns a random model whose vocabulary is that of its tokenizer."""
    tokenizer = tokenizer or small.small_tokenizer()
    config = small.config(**({"vocab_size": len(tokenizer)} | changes))
    params = small.params(gpt.make_model(config, task))
    return Weights(config, arrays_lib.flatten(params), tokenizer, task)


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.model == expected.model
    assert found.task == expected.task
    assert found.tokenizer.hash == expected.tokenizer.hash
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert np.array_equal(found.arrays[name], array), name


def logits(found: Weights, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns our LM logits, and those of the task head at the last token (None without one)."""
    model, params = gpt.make_model(found.model, found.task), arrays_lib.unflatten(found.arrays)
    ids = jnp.asarray(ids)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    x = gpt.run(model, params, ids, jnp.ones_like(ids), positions, method="hidden")
    lm = np.asarray(gpt.run(model, params, x, method="lm_logits"))
    if found.task is None:
        return lm, None
    last = jnp.full((len(ids), 1, 1), ids.shape[1] - 1)
    head = gpt.run(model, params, x, jnp.ones_like(ids), last, method="task_logits")
    return lm, np.asarray(head).squeeze(1)


@pytest.mark.parametrize("form", convert.FORMATS)
@pytest.mark.parametrize("task", TASKS)
def test_reading_what_was_written_gives_every_bit(tmp_path, form, task):
    # The vocabulary is larger than the tokenizer's, as when it is rounded up for the hardware.
    written = make(TASKS[task], vocab_size=128, activation="relu", residual_dropout=0.25)
    convert.FORMATS[form].write(written, tmp_path)
    assert_equal(convert.FORMATS[form].read(tmp_path), written)


@pytest.mark.parametrize("task", TASKS)
def test_transformers_reads_what_was_written(tmp_path, task):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    written = make(TASKS[task])
    architecture = huggingface.write(written, tmp_path)
    model, loading = getattr(transformers, architecture).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(loading.values()), loading
    model.eval()
    ids = np.random.default_rng(0).integers(0, written.num_ordinary_tokens, (3, 12))
    with torch.no_grad():
        found = model(torch.tensor(ids)[None] if task == "multiple_choice" else torch.tensor(ids))
    lm, scores = logits(written, ids)
    close = {"rtol": 0, "atol": 2e-5 * np.abs(lm).max()}
    if task == "multiple_choice":
        np.testing.assert_allclose(found.logits[0], lm, **close)
        np.testing.assert_allclose(found.mc_logits.ravel(), scores.ravel(), **close)
    elif task in ("classification", "entailment"):
        np.testing.assert_allclose(found.logits, scores, **close)
        labels = [model.config.id2label[i] for i in range(len(written.task.labels))]
        assert tuple(labels) == written.task.labels
    else:
        np.testing.assert_allclose(found.logits, lm, **close)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The cat sat — on a mat, some_start_ dogs"
    assert tokenizer(text, add_special_tokens=False).input_ids == written.tokenizer.encode(text)
    assert tokenizer.pad_token_id == written.tokenizer.padding_id
    assert tokenizer.cls_token_id == written.tokenizer.extract_id


@pytest.mark.parametrize("task", ["none", "classification", "multiple_choice"])
def test_what_transformers_saves_is_read(tmp_path, task):
    """The arrays are equal to the bit, except for the head of a classification.

    transformers has no bias there, so that it is read with a bias of 0.
    """
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    written = make(TASKS[task])
    (tmp_path / "ours").mkdir()
    architecture = huggingface.write(written, tmp_path / "ours")
    model = getattr(transformers, architecture).from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(
        tmp_path / "theirs"
    )
    found = huggingface.read(tmp_path / "theirs")
    for name, array in written.arrays.items():
        if task == "classification" and name in (TASK_HEAD_KERNEL, TASK_HEAD_BIAS):
            continue
        assert np.array_equal(found.arrays[name], array), name
    ids = np.random.default_rng(0).integers(0, written.num_ordinary_tokens, (3, 12))
    for ours, theirs in zip(logits(written, ids), logits(found, ids), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)


def test_other_weights_in_the_folder_make_its_side_files_void(tmp_path):
    task = TASKS["multiple_choice"]
    huggingface.write(make(task), tmp_path)
    path = tmp_path / "model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    arrays["multiple_choice_head.summary.bias"] += 1
    safetensors.numpy.save_file(arrays, path)
    found = huggingface.read(tmp_path)
    assert np.array_equal(found.arrays[TASK_HEAD_BIAS], arrays["multiple_choice_head.summary.bias"])
    assert found.task.choices == ("choice1", "choice2")


def test_half_precision_is_read_as_it_is(tmp_path):
    written = make()
    huggingface.write(written, tmp_path)
    path = tmp_path / "model.safetensors"
    arrays = {
        name: jnp.asarray(array, jnp.bfloat16)
        for name, array in safetensors.numpy.load_file(path).items()
    }
    safetensors.flax.save_file(arrays, path)
    found = huggingface.read(tmp_path)
    for name, array in written.arrays.items():
        expected = np.asarray(jnp.asarray(array, jnp.bfloat16), np.float32)
        assert np.array_equal(found.arrays[name], expected), name


def release(folder: pathlib.Path) -> Weights:
    """Writes a folder like OpenAI's release, without special tokens and side files."""
    written = make(width=64, num_heads=1, vocab_size=len(small.small_tokenizer()))
    openai.write(written, folder)
    for name in ("gptjax.json", "gptjax.safetensors"):
        (folder / name).unlink()
    return written


def test_the_release_and_its_special_tokens(tmp_path):
    written = release(tmp_path)
    assert openai.read(tmp_path).tokenizer.exact
    found = openai.read(tmp_path, exact=False)
    own = written.num_ordinary_tokens
    assert len(found.arrays[TOKEN_EMBEDDING]) == own + 4
    for name, array in written.arrays.items():
        rows = slice(own) if name == TOKEN_EMBEDDING else slice(None)
        assert np.array_equal(found.arrays[name][rows], array[rows]), name
    drawn = found.arrays[TOKEN_EMBEDDING][own:]
    assert 0.015 < drawn.std() < 0.025
    assert found.model.num_heads == 1
    text = "the cat sat"
    assert found.tokenizer.encode(text) == written.tokenizer.encode(text)
    assert found.tokenizer.start_id == own


def test_the_release_has_openais_shapes(tmp_path):
    """The expected shapes are those of `params_shapes.json`, for two layers of width 24."""
    openai.write(make(), tmp_path)
    shapes = json.loads((tmp_path / "params_shapes.json").read_text())
    layer = [
        [1, 24, 72], [72], [1, 24, 24], [24], [24], [24], [1, 24, 96], [96], [1, 96, 24], [24],
        [24], [24],
    ]  # fmt: skip
    assert shapes == [[32, 24], [make().num_ordinary_tokens, 24], *layer, *layer]


def edit(path: pathlib.Path, change) -> None:
    arrays = safetensors.numpy.load_file(path)
    change(arrays)
    safetensors.numpy.save_file(arrays, path)


def set_json(path: pathlib.Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


H = "transformer.h.1.mlp.c_fc.weight"
BROKEN = {
    "missing": (
        lambda d: edit(d / "model.safetensors", lambda a: a.pop(H)), "missing 1/ffn_in/kernel",
    ),
    "extra": (
        lambda d: edit(d / "model.safetensors", lambda a: a.update({"new.weight": np.ones(3)})),
        "extra new.weight",
    ),
    "shape": (
        lambda d: edit(d / "model.safetensors", lambda a: a.update({H: np.ones((24, 95))})),
        "1/ffn_in/kernel is [24, 95], not [24, 96]",
    ),
    "not finite": (
        lambda d: edit(d / "model.safetensors", lambda a: a[H].fill(np.nan)), "not finite",
    ),
    "untied": (
        lambda d: edit(
            d / "model.safetensors",
            lambda a: a.update({"lm_head.weight": 2 * a["transformer.tokens_embed.weight"]}),
        ),
        "not the token embedding",
    ),
    "cut short": (
        lambda d: (d / "model.safetensors").write_bytes(
            (d / "model.safetensors").read_bytes()[:-100]
        ),
        "is damaged",
    ),
    "another model": (lambda d: set_json(d / "config.json", model_type="gpt2"), "openai-gpt"),
    "activation": (lambda d: set_json(d / "config.json", afn="silu"), "afn is 'silu'"),
    "a size of text": (lambda d: set_json(d / "config.json", n_embd="24"), "cannot be read as"),
    "no heads": (lambda d: set_json(d / "config.json", n_head=0), "cannot be read as"),
    "millions of layers": (
        lambda d: set_json(d / "config.json", n_layer=3_000_000),
        "has 3000000 layers, the weights 2",
    ),
    "dropout": (lambda d: set_json(d / "config.json", attn_pdrop=5), "attention_dropout=5"),
    "integers": (
        lambda d: edit(
            d / "model.safetensors", lambda a: a.update({H: np.ones((24, 96), np.int8)})
        ),
        "quantised",
    ),
    "tokenizer": (lambda d: (d / "tokenizer.json").write_text("[]"), "tokenizer.json"),
    "merges": (
        lambda d: (d / "tokenizer.json").write_text('{"model": {"vocab": {}, "merges": null}}'),
        "tokenizer.json",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: No such file"),
    "config": (lambda d: (d / "config.json").write_text("{"), "cannot be read as JSON"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
    "a pickle": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "save_pretrained(OTHER)",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_line(tmp_path, case):
    folder = tmp_path / "f"
    folder.mkdir()
    huggingface.write(make(), folder)
    (folder / "gptjax.json").unlink()
    change, message = BROKEN[case]
    change(folder)
    result = runs.main("--mode=import", f"--input={folder}", f"--output={tmp_path}/w")
    assert message in result.error
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


BROKEN_RELEASE = {
    "missing": (lambda d: (d / "params_3.npy").unlink(), "params_3.npy: No such file"),
    "short": (lambda d: np.save(d / "params_3.npy", np.ones(3)), "numbers, but params_shapes.json"),
    "text": (lambda d: (d / "params_3.npy").write_text("hello"), "not an array of numbers"),
    "a pickle": (
        lambda d: np.save(d / "params_3.npy", np.array([{}]), allow_pickle=True),
        "not an array of numbers",
    ),
    "shapes": (lambda d: (d / "params_shapes.json").write_text('[["a"]]'), "list of shapes"),
    "infinite": (lambda d: (d / "params_shapes.json").write_text("[[Infinity]]"), "cannot be read"),
    "no vocabulary": (lambda d: (d / "encoder_bpe_40000.json").unlink(), "No such file"),
    "another vocabulary": (
        lambda d: (d / "encoder_bpe_40000.json").write_text('{"<unk>": 0}'),
        "vocab_40000.bpe: line",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_RELEASE)
def test_a_broken_release_is_one_line(tmp_path, case):
    folder = tmp_path / "f"
    folder.mkdir()
    release(folder)
    change, message = BROKEN_RELEASE[case]
    change(folder)
    result = runs.main(
        "--mode=import", f"--input={folder}", f"--output={tmp_path}/w", "--format=openai"
    )
    assert message in result.error
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_what_a_format_cannot_say_is_refused(tmp_path):
    for changes, message in (({"segment_types": 2}, "segment"), ({"ffn_width": 50}, "50 wide")):
        for form in convert.FORMATS.values():
            with pytest.raises(UserError, match=message):
                form.write(make(**changes), tmp_path)
    characters = tokenizer_lib.train_characters(["abc"])
    with pytest.raises(UserError, match="vocabulary/merges"):
        openai.write(make(tokenizer=characters), tmp_path)
    huggingface.write(make(tokenizer=characters), tmp_path)
    assert huggingface.read(tmp_path).tokenizer.hash == characters.hash


def test_a_bias_that_cannot_be_folded_is_refused(tmp_path):
    found = make(TASKS["classification"])
    for name in ("blocks/norm2/bias", TASK_HEAD_BIAS):
        found.arrays[name] = found.arrays[name].copy()
    found.arrays["blocks/norm2/bias"][-1] = 0
    with pytest.raises(UserError, match="bias"):
        huggingface.write(found, tmp_path)
    found.arrays[TASK_HEAD_BIAS][:] = 0
    assert huggingface.write(found, tmp_path) == "OpenAIGPTForSequenceClassification"


@pytest.mark.parametrize("form", convert.FORMATS)
def test_the_temperature_goes_along(tmp_path, form):
    """It is a score of the checkpoint, divides the logits, and survives an export and an import."""
    workdir = runs.copy(tmp_path)
    plain = gptjax.load(workdir)
    path = pathlib.Path(workdir, "checkpoints", "finetune", "scores.json")
    scores = json.loads(path.read_text())
    scores[pathlib.Path(plain.path).name]["temperature"] = 2.5
    path.write_text(json.dumps(scores))
    export = ("--mode=export", f"--input={workdir}", f"--format={form}", f"--output={tmp_path}/out")
    assert runs.main(*export).code == 0
    back = ("--mode=import", f"--input={tmp_path}/out", f"--format={form}")
    assert runs.main(*back, f"--output={tmp_path}/back").code == 0
    rows = [{"text": "good the cat", "label": "no"}, {"text": "bad a dog", "label": "no"}]
    before = plain.predict(rows)
    # softmax(z / T) is proportional to softmax(z)^(1 / T), for the old temperature and the new one.
    power = before.probabilities.astype(np.float64) ** (plain.temperature / 2.5)
    expected = power / power.sum(axis=1, keepdims=True)
    for folder in (workdir, f"{tmp_path}/back"):
        loaded = gptjax.load(folder)
        assert loaded.temperature == 2.5
        found = loaded.predict(rows)
        assert found.labels == before.labels
        np.testing.assert_allclose(found.probabilities, expected, rtol=1e-4)
        score = loaded.score(rows)
        assert score["calibrated_task_loss"] == pytest.approx(
            -np.log(found.probabilities[:, 0]).mean(), rel=1e-5
        )
        assert score["task_loss"] == pytest.approx(plain.score(rows)["task_loss"], rel=1e-5)
    side = pathlib.Path(tmp_path, "out", "gptjax.json")
    values = json.loads(side.read_text())
    del values["temperature"]  # as earlier versions wrote it
    side.write_text(json.dumps(values))
    assert runs.main(*back, f"--output={tmp_path}/old").code == 0
    assert gptjax.load(f"{tmp_path}/old").temperature == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("form", convert.FORMATS)
def test_through_the_command_line(tmp_path, form):
    """An exported and imported model predicts the same, and a training can start from it."""
    flags = ("--mode=export", f"--input={runs.trained()}", f"--format={form}")
    result = runs.main(*flags, f"--output={tmp_path}/there")
    assert result.code == 0, result.err
    result = runs.main(
        "--mode=import", f"--input={tmp_path}/there", f"--output={tmp_path}/back",
        f"--format={form}",
    )  # fmt: skip
    assert result.code == 0, result.err
    before, after = gptjax.load(runs.trained()), gptjax.load(f"{tmp_path}/back")
    for x, y in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        assert np.array_equal(x, y)
    evaluate = ("--mode=evaluate", f"--checkpoint={tmp_path}/back")
    assert "so it names no data; give --input" in runs.main(*evaluate).error
    assert runs.main(*evaluate, f"--input={runs.files().test}").code == 0
    rows = [{"text": "good the cat"}, {"text": "bad a dog"}, {"text": ""}]
    ours, theirs = before.predict(rows), after.predict(rows)
    assert ours.labels == theirs.labels
    assert np.array_equal(ours.probabilities, theirs.probabilities)
    (tmp_path / "usual").write_text("")
    usual = (tmp_path / "usual").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "there").iterdir()} == {usual}
    again = runs.main(*flags, f"--output={tmp_path}/there")
    assert "not empty" in again.error
    result = runs.main(
        *runs.files().finetune, "--config.pretrain=none", f"--config.init_from={tmp_path}/back",
        f"--workdir={tmp_path}/w", "--config.finetune.steps=2",
    )  # fmt: skip
    assert result.code == 0, result.err


def test_exact_words_travel_and_transformers_gets_the_pair(tmp_path):
    transformers = pytest.importorskip("transformers")
    release(tmp_path)
    found = openai.read(tmp_path)
    (tmp_path / "hf").mkdir()
    huggingface.write(found, tmp_path / "hf")
    assert_equal(huggingface.read(tmp_path / "hf"), found)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert type(theirs).__name__ == "OpenAIGPTTokenizer"
    for token in ("_start_", "_delimiter_", "_classify_", "<pad>", "<unk>"):
        assert theirs.convert_tokens_to_ids(token) == found.tokenizer.token_id(token)
    assert theirs("the cat sat").input_ids == make().tokenizer.encode("the cat sat")
    # Without our side files the vocabulary in their format is read, for which `exact` is the
    # default again.
    (tmp_path / "hf" / "gptjax.json").unlink()
    assert huggingface.read(tmp_path / "hf").tokenizer.hash == found.tokenizer.hash
    result = runs.main(
        "--mode=import", f"--input={tmp_path}", f"--output={tmp_path}/w", "--format=openai",
        "--config.tokenizer.words=fast",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert not gptjax.load(tmp_path / "w").tokenizer.exact


@pytest.mark.parametrize("change", ["labels", "one"])
def test_a_head_that_is_no_classifier_of_ours_is_refused(tmp_path, change):
    huggingface.write(make(TASKS["classification"]), tmp_path)
    (tmp_path / "gptjax.json").unlink()
    if change == "labels":
        set_json(tmp_path / "config.json", id2label={"0": "a", "1": "a", "2": "b"})
    else:
        edit(
            tmp_path / "model.safetensors",
            lambda a: a.update({"score.weight": a["score.weight"][:1]}),
        )
    with pytest.raises(UserError, match=r"score\.weight must be of two classes"):
        huggingface.read(tmp_path)


def test_a_head_without_our_special_tokens_is_left(tmp_path):
    """Such a head was trained to read another token than our extract token."""
    found = make(TASKS["classification"])
    plain = found.arrays | {
        TOKEN_EMBEDDING: found.arrays[TOKEN_EMBEDDING][: found.num_ordinary_tokens]
    }
    huggingface.write(Weights(found.model, plain, found.tokenizer, found.task), tmp_path)
    for name in ("gptjax.json", "tokenizer.json"):
        (tmp_path / name).unlink()
    pair = tokenizer_lib.vocabulary_pair(found.tokenizer)
    (tmp_path / "vocab.json").write_text(json.dumps(pair[0]))
    (tmp_path / "merges.txt").write_text("\n".join(pair[1]))
    read = huggingface.read(tmp_path)
    assert read.task is None
    assert TASK_HEAD_KERNEL not in read.arrays
    assert len(read.arrays[TOKEN_EMBEDDING]) == found.num_ordinary_tokens + 4
