"""The benchmarks compare like with like: the peers compute what we compute, and timings are summed
up as the tables say.

Tolerances. Everything in float32: 1e-3 of a loss of about 4 nats after each of three updates. Where
an implementation computes in bfloat16 (three digits): 2e-2.
"""

import ast
import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import small

from benchmarks import harness, rows, sizes, summary
from gptjax.config.schema import TaskSpec
from gptjax.data import tasks
from gptjax.data.packing import Packer
from gptjax.data.tables.labelled import LabelledTable
from gptjax.interop import arrays, huggingface
from gptjax.model import gpt
from gptjax.model import objective as objective_lib

# Peers of another library train beside ours: minutes in all.
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIZE = sizes.Size("test", 2, 24, 3, 97, 32, 4)
COMMANDS = ("train_step", "finetune", "generate", "predict")


@pytest.fixture(scope="module")
def params():
    """Our random weights; biases and gains too."""
    config = sizes.model_config(SIZE, "float32", 0.0)
    # Wide enough that different texts give different answers.
    model = gpt.make_model(dataclasses.replace(config, init_std=0.2), None)
    return jax.device_get(small.params(model))


@pytest.fixture(scope="module")
def tokens():
    """A batch for each of three steps."""
    shape = (3, SIZE.batch_size, SIZE.context_length)
    return np.random.default_rng(0).integers(0, SIZE.vocab_size, shape)


def ours_as_weights(params, spec=None) -> arrays.Weights:
    config = sizes.model_config(SIZE, "float32", 0.0)
    return arrays.Weights(config, arrays.flatten(params), small.small_tokenizer(), spec)


def fast_gpt(params):
    with_torch = pytest.importorskip("benchmarks.with_torch")
    model = with_torch.FastGPT(SIZE, 0.0)
    model.load_ours(arrays.split_layers(ours_as_weights(params)))
    return model


def openai_gpt(params, folder):
    transformers = pytest.importorskip("transformers")
    huggingface.write(ours_as_weights(params), folder)
    values = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.OpenAIGPTLMHeadModel.from_pretrained(folder, **values)


@pytest.fixture(scope="module")
def our_losses(params, tokens):
    """Of three steps in float32."""
    from benchmarks import with_gptjax

    training = with_gptjax.pretraining(SIZE, "float32", 0.0, params)
    return [training.step(each) for each in tokens]


def assert_trains_alike(training, tokens, expected, tolerance):
    found = [training.step(each) for each in tokens]
    # Three updates that do something.
    assert abs(expected[0] - np.log(SIZE.vocab_size)) < 10
    np.testing.assert_allclose(found, expected, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 2e-2)])
def test_plain_flax_trains_alike(dtype, tolerance, params, tokens, our_losses):
    from benchmarks import with_flax

    training = with_flax.pretraining(SIZE, dtype, 0.0, with_flax.from_ours(params))
    assert_trains_alike(training, tokens, our_losses, tolerance)


PRECISIONS = [("float32", 1e-3), ("autocast", 2e-2), ("bfloat16", 2e-2)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_fast_pytorch_trains_alike(dtype, tolerance, params, tokens, our_losses):
    pytest.importorskip("torch")
    from benchmarks import with_torch

    training = with_torch.pretraining(SIZE, dtype, 0.0, model=fast_gpt(params))
    assert_trains_alike(training, tokens, our_losses, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS[:2])
def test_transformers_trains_alike(dtype, tolerance, params, tokens, our_losses, tmp_path):
    pytest.importorskip("torch")
    model = openai_gpt(params, tmp_path)
    from benchmarks import with_transformers

    training = with_transformers.pretraining(SIZE, dtype, 0.0, model)
    assert_trains_alike(training, tokens, our_losses, tolerance)


def test_dropout_is_on_in_the_peers(params, tokens):
    pytest.importorskip("torch")
    from benchmarks import with_torch

    model = fast_gpt(params)
    for module in (model, *model.blocks):
        module.dropout = sizes.DROPOUT
    training = with_torch.pretraining(SIZE, "float32", sizes.DROPOUT, model=model)
    losses = {training._loss(with_torch.torch.from_numpy(tokens[0])).item() for _ in range(3)}
    assert len(losses) == 3


def test_all_generate_the_same(params, tmp_path):
    pytest.importorskip("torch")
    theirs = openai_gpt(params, tmp_path)
    from benchmarks import with_gptjax, with_torch, with_transformers

    prompt = np.arange(3, 12)
    expected = with_gptjax.Generation(SIZE, "float32", params)(prompt, 2, 12)
    fast = with_torch.Generation(SIZE, "float32", fast_gpt(params))
    slow = with_transformers.Generation(SIZE, "float32", model=theirs)
    np.testing.assert_array_equal(fast(prompt, 2, 12), expected)
    np.testing.assert_array_equal(slow(prompt, 2, 12), expected)
    assert len(set(expected[0])) > 1


@pytest.mark.parametrize("kind", ["transformers", "pytorch"])
@pytest.mark.parametrize("task", ["similarity", "entailment", "classification"])
def test_the_joint_loss_is_ours(kind, task, params, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from benchmarks import with_transformers

    data = rows.synthetic(6, pairs=task != "classification")
    for row in data:  # short enough for the test's context, and some that are not
        row["text"] = " ".join(row["text"].split()[:2])
    tokenizer = small.small_tokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    path = rows.write_csv(data, tmp_path / "train.csv")
    sequences, labels, classes = with_transformers.read_examples(
        path, with_transformers.fast_tokenizer(str(tmp_path / "tokenizer.json")), task, 32
    )
    loss, examples, head = our_joint_loss(data, task, params, tokenizer)
    assert [list(each) for each in examples.tokens] == sequences
    np.testing.assert_array_equal(examples.labels, labels)

    model = with_transformers.JointModel(SIZE, kind, classes, dropout=0.0)
    model.decoder = fast_gpt(params) if kind == "pytorch" else openai_gpt(params, tmp_path)
    with torch.no_grad():
        model.task_head.weight.copy_(torch.tensor(np.array(head["kernel"]).T))
        model.task_head.bias.copy_(torch.tensor(np.array(head["bias"])))
    batch = next(with_transformers.batches(sequences, labels, len(labels), tokenizer.padding_id))
    np.testing.assert_allclose(model.loss(*batch).item(), loss, rtol=1e-4)


def our_joint_loss(data, task, params, tokenizer):
    """Returns our loss of packed examples, the examples, and the task head's weights."""
    columns = {name: [row[name] for row in data] for name in data[0]}
    spec = TaskSpec(task, "text", "" if task == "classification" else "text_pair")
    spec = tasks.find_labels(spec, LabelledTable(columns, "rows"))
    examples = tasks.encode(spec, LabelledTable(columns, "rows"), tokenizer, SIZE.context_length)
    model = gpt.make_model(sizes.model_config(SIZE, "float32", 0.0), spec)
    own = params | {"task_head": small.params(model)["task_head"]}
    batch, _ = Packer(examples.lengths, len(data), 0).pack(examples, np.arange(len(data)))
    objective = objective_lib.Objective(task, sizes.LM_WEIGHT)
    sums = objective_lib.forward(model, objective, own, batch)[0]
    loss = objective_lib.joint(objective, sums, objective_lib.weights(batch))
    return float(loss), examples, own["task_head"]


def test_one_epoch_visits_every_example_once():
    pytest.importorskip("transformers")
    from benchmarks import with_transformers

    rng = np.random.default_rng(0)
    sequences = [[i] * rng.integers(1, 20) for i in range(70) for _ in range(2)]
    found = list(with_transformers.batches(sequences, np.arange(70), 16, padding=-1))
    assert sorted(label for each in found for label in each[2].tolist()) == list(range(70))
    assert [len(each[2]) for each in found] == [16, 16, 16, 16, 6]
    for tokens, lengths, labels in found:
        tokens, lengths = tokens.numpy(), lengths.numpy()
        assert tokens.shape[1] == lengths.max()
        np.testing.assert_array_equal(tokens[:, 0], np.repeat(labels.numpy(), 2))
        np.testing.assert_array_equal((tokens >= 0).sum(1), lengths)


def test_synthetic_rows_have_the_lengths_of_mrpc():
    data = rows.synthetic(500, pairs=True)
    lengths = [len(row[name].split()) - 1 for row in data for name in ("text", "text_pair")]
    assert 20 < np.mean(lengths) < 24
    assert 4 < np.std(lengths) < 6
    assert {row["label"] for row in data[:2]} == {"0", "1"}
    assert data == rows.synthetic(500, pairs=True)


ABOUT = summary.About("name", "Title", "token", "step", flops_per_unit=1e6)


@pytest.fixture
def flags():
    """The benchmarks' flags as given on the command line; back to their defaults afterwards."""

    def given(*arguments):
        harness.FLAGS.unparse_flags()
        harness.FLAGS(["test", *arguments])

    given()
    yield given
    for name in harness.FLAGS:
        harness.FLAGS[name].value = harness.FLAGS[name].default


def result(name, *rounds, error=""):
    spec = {"task": "train_step", "implementation": name.partition("-")[0]}
    records = [
        {"seconds": seconds, "first_seconds": 9.0, "units": 100, "peak_bytes": 2**31,
         "load_before": 0.5, "losses": [4.0, 3.0]}
        for seconds in rounds
    ]  # fmt: skip
    return harness.Result(harness.Variant(name, spec), records, error)


def test_medians_and_ratios(flags):
    top = harness.Result(
        harness.Variant("torch-bfloat16", {"task": "ceiling", "implementation": "torch"}),
        [{"flops": 1e9, "load_before": 0.0}, {"flops": 2e9, "load_before": 0.0}],
    )
    # The machine is three times slower in the second round, for both.
    ours = result("ours-bfloat16/huge_pages", [1.0, 2.0, 1.0], [3.0, 3.0, 3.0])
    peer = result("pytorch-float32/huge_pages", [2.0, 2.0, 2.0], [6.0, 9.0, 9.0])
    dead = result("flax-float32/tuned", error="ended by SIGKILL (out of memory?)")
    document = summary.summarise(ABOUT, [top, ours, peer, dead])
    first, second, third = document["rows"]
    assert first["seconds_median"] == 2.5
    assert first["units_per_second"] == 40
    assert first["compile_seconds"] == 6.5
    assert first["flops"] == 100 * 1e6 / 2.5
    assert first["share"] == {"torch": first["flops"] / 2e9}
    assert second["ratio"] == {"median": 2.5, "lowest": 2.0, "highest": 3.0}
    assert third == {"name": "flax-float32/tuned", "error": "ended by SIGKILL (out of memory?)"}
    assert json.loads(json.dumps(document))["records"]["ours-bfloat16/huge_pages"]
    text = summary.markdown(ABOUT, document)
    assert "did not run: ended by SIGKILL" in text
    assert "2.50 (2.00 - 3.00)" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| ours-bfloat16/huge_pages")


def test_variants_are_chosen_by_name(flags):
    cases = {
        f"{name}-float32": {"implementation": name, "dtype": "float32"} for name in ("ours", "flax")
    }
    flags("--allocators=all")
    assert len(harness.variants("train_step", cases, {})) == 6
    flags("--allocators=system,tuned", "--only=flax")
    names = [each.name for each in harness.variants("train_step", cases, {"size": "tiny"})]
    assert names == ["flax-float32/system", "flax-float32/tuned"]
    flags("--only=*/huge_pages")
    assert len(harness.variants("train_step", cases, {})) == 2
    for wrong, said in (("--only=flx-float32", "'flax-float32'"), ("--allocators=tund", "'tuned'")):
        flags(wrong)
        with pytest.raises(harness.UserError, match=said):
            harness.variants("train_step", cases, {})


def test_a_worker_that_dies_is_a_row(flags):
    good = harness.ceilings()[0]
    bad = harness.Variant("jax-float33", {**good.spec, "dtype": "float33"})
    saved = []
    found = harness.run([good, bad], 1, saved.append, timeout=120)
    assert found[0].records[0]["flops"] > 0
    assert found[0].records[0]["peak_bytes"] > 2**20
    assert "float33" in found[1].error
    assert saved == [found]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--size=gpt2"], "did you mean 'gpt1'?"), (["--nonsense"], "nonsense"), (["x"], "x")],
)
def test_wrong_use_is_one_line(name, arguments, said):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{name}.py", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_files_and_functions_are_short():
    for path in (ROOT / "benchmarks").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 400
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{path.name}: {node.name}"
