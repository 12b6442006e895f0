"""Mode `compile`: its report against closed forms, and its errors."""

import functools
import importlib.util
import json

import jax
import pytest
import runs
import small
from compiled_sizes import (
    FLAGS,
    LAYERS,
    LENGTH,
    MATRICES,
    ROWS,
    VECTORS,
    VOCABULARY,
    WIDTH,
    products,
)

from gptjax.config.schema import Experiment, FinetuneConfig, ModelConfig, TokenizerConfig
from gptjax.cost import compile, step_spec
from gptjax.cost.hlo import parse
from gptjax.model import flops, frozen

pytestmark = pytest.mark.devices(8)

# Bytes of the counters in the state (Adam's, the schedule's, two of bad steps, the step), and of
# the seed. Whether the last update was finite takes a byte more.
COUNTERS = 5 * 4
SEED = 4


@pytest.fixture(autouse=True, scope="module")
def _eight_devices():
    """Starts JAX with eight devices. Otherwise `cpu:2` would start it with two, for all tests."""
    assert len(jax.devices()) == 8


@functools.cache
def report(topology: str, *more: str) -> dict:
    result = runs.main("--mode=compile", f"--topology={topology}", *FLAGS, *more)
    assert result.code == 0, result.err
    return json.loads(result.out)


@pytest.mark.slow
def test_launch_prints_one_json_object_and_writes_it(tmp_path):
    path = tmp_path / "report.json"
    process = runs.start(
        "--mode=compile", "--topology=cpu:2", *FLAGS, f"--output={path}", cwd=tmp_path
    )
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    found = json.loads(out)
    assert found == json.loads(path.read_text())
    assert list(tmp_path.iterdir()) == [path], "nothing else is written"
    assert (found["devices"], found["mesh"]) == (2, {"data": 2, "fsdp": 1, "tensor": 1})
    assert found["batch"] == {"rows": ROWS, "row_length": LENGTH, "tokens": ROWS * LENGTH}
    assert (found["vocab_size"], found["parameters"]) == (VOCABULARY, MATRICES + VECTORS)
    assert found["fits"] is found["step_seconds"] is found["mfu"] is None
    assert found["compile_seconds"] > 0


def test_the_arguments_are_the_state_and_the_rows_of_a_device():
    state, rows = 3 * 4 * (MATRICES + VECTORS), 5 * 4 * LENGTH * ROWS // 2
    memory = report("cpu:2")["memory"]
    assert abs(memory["arguments"] - (state + rows + COUNTERS + SEED)) < 8
    assert abs(memory["aliased"] - (state + COUNTERS)) < 8, "the old state makes room for the new"


@pytest.mark.slow
def test_fsdp_halves_the_state():
    memory = report("cpu:2", "--config.mesh.data=1", "--config.mesh.fsdp=2")["memory"]
    assert abs(memory["aliased"] - (3 * 4 * (MATRICES // 2 + VECTORS) + COUNTERS)) < 8


def test_the_operations_are_those_of_the_model_loops_included():
    found = report("cpu:2")
    assert found["flops_per_device"] == products(ROWS * LENGTH) / 2
    assert found["loops_counted_once"] == []
    assert found["xla_cost_analysis"]["flops_loops_once"] < 0.75 * found["flops_per_device"]
    # `flops` counts the keys that the causal mask allows, (T + 1) / 2 of T on average.
    config = ModelConfig(
        vocab_size=VOCABULARY, context_length=LENGTH, num_layers=LAYERS, width=WIDTH, num_heads=2
    )
    counted = flops.train_flops_per_token(config, LENGTH) * ROWS * LENGTH / 2
    assert found["model_flops_per_device"] == counted
    assert 1 < found["flops_per_device"] / counted < 1.1


@pytest.mark.slow
def test_operations_do_not_depend_on_how_the_layers_are_looped():
    unrolled = report("cpu:2", f"--config.model.unroll={LAYERS}")
    assert unrolled["flops_per_device"] == report("cpu:2")["flops_per_device"]
    sent = (found["collectives"]["all-reduce"]["bytes"] for found in (unrolled, report("cpu:2")))
    assert len(set(sent)) == 1


@pytest.mark.slow
def test_full_remat_adds_a_forward_pass_of_the_blocks():
    more = report("cpu:2", "--config.model.remat=full")["flops_per_device"]
    head = 6 * VOCABULARY * WIDTH * ROWS * LENGTH / 2
    blocks = products(ROWS * LENGTH) / 2 - head
    # The backward pass needs all values of a block's forward pass but its last product.
    last = LAYERS * 2 * 4 * WIDTH**2 * ROWS * LENGTH / 2
    assert more in (head + blocks * 4 / 3, head + blocks * 4 / 3 - last)


def test_data_parallel_devices_sum_the_gradients_and_nothing_else():
    """Besides the gradients there are three sums of losses and weights, and five checksums.

    The gradient of the tied embedding counts once, though it is used as input and as output.
    """
    gradients = 4 * (MATRICES + VECTORS)
    found = report("cpu:2")["collectives"]
    assert list(found) == ["all-reduce"]
    assert found["all-reduce"]["bytes"] == gradients + (3 + 5) * 4
    assert report("cpu:1")["collectives"] == {}


def test_finetuning_says_what_it_assumes():
    found = report("cpu:1", "--stage=finetune", "--config.finetune.batch_size=6")
    assert found["batch"] == {"rows": 6, "row_length": LENGTH, "tokens": 6 * LENGTH}
    assert set(found["assumed"]) == {"vocab_size", "labels", "batch"}
    assert found["parameters"] == MATRICES + VECTORS + 2 * WIDTH + 2
    assert found["flops_per_device"] >= products(6 * LENGTH)


WRONG = {
    "v9:2x2": "must be like v5e:4x4", "": "must be like", "cpu": "must be like",
    "cpu:0": "must be like", "v5e": "must be like", "v5e:2x2x1": "must be like",
    "cpu:64": "JAX runs with 8 devices", "2xcpu:2": "must be like", "0xv5e:2x2": "must be like",
    "65xv5e:2x2": "must be like", "2xv5e": "must be like", "xv5e:2x2": "must be like",
    "2xv4:2x2x1": "publishes no figure of the network between v4 slices",
}  # fmt: skip


@pytest.mark.parametrize("topology", WRONG)
def test_a_wrong_topology_is_one_line(topology):
    error = runs.main("--mode=compile", f"--topology={topology}", *FLAGS).error
    assert WRONG[topology] in error
    assert f"--topology={topology}" in error


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = runs.main("--mode=compile", "--topology=v5e:2x2", *FLAGS).error
    assert "requirements-tpu.txt" in error


BAD_FLAGS = {
    "--config.pretrain.batch_size=3": "must be a multiple of 2",
    "--config.mesh.fsdp=3": "3 does not divide",
    "--config.model.num_heads=3": "must divide",
    "--config.model.vocab_size=0 --config.tokenizer.kind=character": "--config.model.vocab_size",
    "--config=experiments/gpt1_pretrain.py --stage=finetune": "has no finetune part",
}


@pytest.mark.parametrize("more", BAD_FLAGS)
def test_what_does_not_fit_is_one_line(more):
    flags = [] if more.startswith("--config=") else FLAGS
    error = runs.main("--mode=compile", "--topology=cpu:2", *flags, *more.split()).error
    assert BAD_FLAGS[more] in error


def test_the_vocabulary_is_what_a_training_would_have(tmp_path):
    def size(**values):
        return step_spec.vocabulary(Experiment(tokenizer=TokenizerConfig(**values)))[0]

    assert size(vocab_size=500) == 504
    assert size(kind="gpt1") == 40482
    tokenizer = small.small_tokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    assert size(file=str(tmp_path / "tokenizer.json")) == len(tokenizer)
    assert step_spec.vocabulary(Experiment(model=ModelConfig(vocab_size=9)))[0] == 9


def test_the_sizes_are_those_of_the_checkpoint_to_start_from():
    answers = FinetuneConfig(task="multiple_choice", choices="a,b,c", batch_size=6)
    experiment = Experiment(init_from=runs.trained(), finetune=answers)
    found = step_spec.build(step_spec.validated(experiment, "finetune"), "finetune", small.mesh(4))
    assert (found.model.config.vocab_size, found.model.config.width) == (VOCABULARY, WIDTH)
    assert found.assumed["vocab_size"] == "init_from"
    # A row has room for three answers of a whole context. Six rows become eight for four devices.
    assert found.batch.tokens.shape == (8, 3 * LENGTH)
    assert found.batch.extract.shape == (8, 4, 3)


@pytest.mark.parametrize("freeze", [0, 1])
def test_an_average_is_a_second_copy_of_the_trained_parameters(freeze):
    def size(average):
        config = FinetuneConfig(task="classification", freeze=freeze, average=average)
        experiment = Experiment(init_from=runs.trained(), finetune=config)
        mesh, experiment = small.mesh(1), step_spec.validated(experiment, "finetune")
        spec = step_spec.build(experiment, "finetune", mesh)
        state = step_spec.abstract_state(spec, mesh)
        trained = frozen.trained_part(state.params, freeze)
        return [sum(each.size for each in jax.tree.leaves(tree)) for tree in (state, trained)]

    plain, trained = size(0.0)
    assert size(0.9) == [plain + trained, trained]


def test_the_buffers_of_the_peak_are_those_of_the_program():
    found = report("cpu:2")
    memory, largest = found["memory"], found["largest_buffers"]
    whole = found["peak_memory_bytes_per_device"]
    assert memory["arguments"] < memory["buffers_at_peak"] <= whole
    assert sum(e["bytes"] * e["count"] for e in largest) <= memory["buffers_at_peak"]
    sizes = [e["bytes"] * e["count"] for e in largest]
    assert sizes == sorted(sizes, reverse=True)
    for entry in largest:  # nothing is padded on a CPU
        assert entry["bytes"] == sum(shape.bytes for shape in parse._shapes(entry["shape"]))
    [embedding] = [e for e in largest if e["shape"] == f"f32[{VOCABULARY},{WIDTH}]"
                   and e["argument"]]  # fmt: skip
    assert embedding["count"] == 3
    assert "token_embedding" in embedding["op_name"]


def test_the_summary_names_buffers_and_communication():
    found = report("cpu:2")
    text = "\n".join(compile.summary(found))
    assert f"f32[{VOCABULARY},{WIDTH}]" in text
    assert "all-reduce x" in text
    assert "estimate" not in text


def test_a_refused_program_says_what_it_needs():
    text = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (20.81G) exceeds"
    assert compile._bytes_required(text, 10) == int(20.81 * 2**30) + 10
    assert compile._bytes_required("Used 512.5M of 15.75G hbm", 10) == int(512.5 * 2**20)
    assert compile._bytes_required("something else", 10) is None
