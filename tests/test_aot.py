"""What `--mode=compile` reports, against closed forms; its errors; its reading of XLA's text."""

import functools
import importlib.util
import json
import os

import jax
import pytest
import runs
import small

from gptjax import aot, chips, collectives, flops, hlo, hlo_cost, plan
from gptjax.config import Experiment, FinetuneConfig, ModelConfig, TokenizerConfig

LAYERS, WIDTH, LENGTH, VOCABULARY, ROWS = 3, 16, 16, 96, 8
FLAGS = (
    *runs.TINY, f"--config.model.num_layers={LAYERS}", f"--config.pretrain.batch_size={ROWS}",
    "--config.model.residual_dropout=0.1", "--config.model.attention=plain",
)  # fmt: skip
MATRICES = VOCABULARY * WIDTH + LAYERS * 12 * WIDTH**2
VECTORS = LENGTH * WIDTH + LAYERS * (3 + 1 + 4 + 1 + 4) * WIDTH
# The optimizer's and our own counters: Adam's, the schedule's, two of bad steps, the step; the last
# update's finiteness is a byte. Then the seed.
COUNTERS = 5 * 4
SEED = 4

has_libtpu = importlib.util.find_spec("libtpu") or os.environ.get("TPU_LIBRARY_PATH")


@pytest.fixture(autouse=True, scope="module")
def _eight_devices():
    """Started with its eight devices, JAX lends as many as a topology asks for, to other tests too.

    Elsewhere `cpu:2` comes first, and JAX starts with two.
    """
    assert len(jax.devices()) == 8


def products(tokens: int) -> int:
    """Operations of the products of a step that attends to all keys, masked ones too."""
    per_token = LAYERS * (12 * WIDTH**2 + 2 * WIDTH * LENGTH) + VOCABULARY * WIDTH
    return 3 * 2 * per_token * tokens


@functools.cache
def report(topology: str, *more: str) -> dict:
    result = runs.main("--mode=compile", f"--topology={topology}", *FLAGS, *more)
    assert result.code == 0, result.err
    return json.loads(result.out)


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
    # `flops` counts the keys that the mask leaves, (T + 1) / 2 of T.
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
    # Of its forward, a block's last product is not needed again.
    last = LAYERS * 2 * 4 * WIDTH**2 * ROWS * LENGTH / 2
    assert more in (head + blocks * 4 / 3, head + blocks * 4 / 3 - last)


def test_data_parallel_devices_sum_the_gradients_and_nothing_else():
    """The tied embedding's gradient, as input and as output, is summed once; so are the LM loss,
    its weight, that of the task, and the checksums of the batch's five fields.
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
    "cpu:64": "JAX runs with 8 devices",
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
        return plan.vocabulary(Experiment(tokenizer=TokenizerConfig(**values)))[0]

    assert size(vocab_size=500) == 504
    assert size(kind="gpt1") == 40482
    tokenizer = small.small_tokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    assert size(file=str(tmp_path / "tokenizer.json")) == len(tokenizer)
    assert plan.vocabulary(Experiment(model=ModelConfig(vocab_size=9)))[0] == 9


def test_the_sizes_are_those_of_the_checkpoint_to_start_from():
    answers = FinetuneConfig(task="multiple_choice", choices="a,b,c", batch_size=6)
    experiment = Experiment(init_from=runs.trained(), finetune=answers)
    found = plan.build(plan.validated(experiment, "finetune"), "finetune", small.mesh(4))
    assert (found.model.config.vocab_size, found.model.config.width) == (VOCABULARY, WIDTH)
    assert found.assumed["vocab_size"] == "--config.init_from"
    # Three answers of a whole context each lie in one row; eight rows divide by four devices.
    assert found.batch.tokens.shape == (8, 3 * LENGTH)
    assert found.batch.extract.shape == (8, 4, 3)


# As libtpu writes it: no trip count, products as convolutions, S(1) for memory on the chip.
PROGRAM = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[12,4,8], f32[])) -> (s32[], bf16[12,4,8], f32[]) {
  %p = (s32[]{:T(128)}, bf16[12,4,8]{2,1,0:T(8,128)(2,1)}, /*index=2*/f32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[12,4,8]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %y = f32[] get-tuple-element(%p), index=2
  %s = bf16[1,4,8]{2,1,0:S(1)} fusion(%x, %i), kind=kLoop, calls=%take
  %b = bf16[4,8]{1,0:S(1)} bitcast(%s)
  %z = f32[] all-reduce(%y), replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (s32[], bf16[12,4,8], f32[]) tuple(%i, %x, %z)
}

%take (a: bf16[12,4,8], n: s32[]) -> bf16[1,4,8] {
  %a = bf16[12,4,8]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %d = bf16[1,4,8]{2,1,0} dynamic-slice(%a, %n, %zero, %zero), dynamic_slice_sizes={1,4,8}
}

%condition (q: (s32[], bf16[12,4,8], f32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %q = (s32[]{:T(128)}, bf16[12,4,8]{2,1,0}, f32[]) parameter(0)
  %c = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%c, %limit), direction=LT
}

ENTRY %main (k: bf16[12,4,8], l: f32[], w: bf16[768,3,12,64], v: bf16[32,512,768]) -> f32[] {
  %k = bf16[12,4,8]{2,1,0} parameter(0)
  %l = f32[] parameter(1)
  %w = bf16[768,3,12,64]{3,2,1,0} parameter(2)
  %v = bf16[32,512,768]{2,1,0} parameter(3)
  %start = s32[] constant(START)
  %copied = s32[]{:S(1)} copy(%start)
  %state = (s32[], bf16[12,4,8], f32[]) tuple(%copied, %k, %l)
  %loop = (s32[], bf16[12,4,8], f32[]) while(%state), condition=%condition, body=%body
  %r = f32[32,512,3,12,64]{1,4,3,2,0:T(8,128)S(1)} convolution(%v, %w), window={size=1x3x12 \
pad=0_0x2_2x11_11 rhs_reversal=0x1x1}, dim_labels=0bf12_i12o0->0b12f
  ROOT %out = f32[] get-tuple-element(%loop), index=2
}
"""


@pytest.mark.parametrize("start", [0, 2])
def test_a_program_of_a_tpu_is_read(start):
    # The product's left side has the spatial dimensions 1 and 1 that the text leaves out.
    text = PROGRAM.replace("START", str(start)).replace("bf16[32,512,768]", "bf16[32,512,768,1,1]")
    module, trips = hlo.parse(text), 12 - start
    assert module.unknown_loops() == []
    totals = collectives.totals(collectives.find(module))
    assert totals == {"all-reduce": {"count": trips, "bytes": 4 * trips}}
    assert hlo_cost.flops(module) == 2 * 32 * 512 * 768 * 3 * 12 * 64
    # A slice of the array, the counter, and the sum's reading and writing; then both matrices, and
    # the counter's first value. What is written to the chip's own memory costs nothing.
    matrices = 2 * (32 * 512 * 768 + 768 * 3 * 12 * 64)
    assert hlo_cost.memory_bytes(module) == trips * (4 * 8 * 2 + 4 + 8) + matrices + 4


def test_a_kernel_counts_as_what_it_says():
    cost = '"cost_estimate":{"flops":"700","transcendentals":"0"}'
    kernel = f'%k = f32[] custom-call(), backend_config={{"custom_call_config":{{,{cost}}}}}'
    text = PROGRAM.replace("START", "0").replace("bf16[32,512,768]", "bf16[32,512,768,1,1]")
    more = hlo.parse(text.replace("  %start = s32[]", f"  {kernel}\n  %start = s32[]"))
    assert hlo_cost.flops(more) == hlo_cost.flops(hlo.parse(text)) + 700


def test_a_loop_of_unknown_length_is_named():
    text = PROGRAM.replace("direction=LT", "direction=NE").replace("START", "0")
    module = hlo.parse(text)
    assert module.unknown_loops() == ["loop"]
    assert collectives.totals(collectives.find(module))["all-reduce"]["count"] == 1


# Two steps of a ring, one while a product runs and one while nothing does; then a TPU's other form:
# a fusion starts an all-gather, one in a loop does a piece of it, a third ends it.
ASYNC = """HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/library.py"
2 "PACKAGE/model.py"

FileLocations
1 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=1 function_name_id=2 line=90 end_line=90 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}


%start (a: f32[4]) -> (f32[4], f32[8]) {
  %a = f32[4]{0} parameter(0)
  %g = f32[8]{0} all-gather(%a), channel_id=7, replica_groups={{0,1}}, dimensions={0}
  ROOT %c = (f32[4]{0}, f32[8]{0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%piece (b: f32[4], o: f32[8]) -> f32[8] {
  %b = f32[4]{0} parameter(0)
  %o = f32[8]{0} parameter(1)
  ROOT %h = f32[8]{0} all-gather(%b), channel_id=7, replica_groups={{0,1}}, dimensions={0}
}

%end (d: f32[4]) -> f32[8] {
  %d = f32[4]{0} parameter(0)
  %i = f32[8]{0} all-gather(%d), channel_id=7, replica_groups={{0,1}}, dimensions={0}
  ROOT %e = f32[8]{0} custom-call(%i), custom_call_target="AsyncCollectiveDone"
}

%body (p: (s32[], f32[4], f32[8])) -> (s32[], f32[4], f32[8]) {
  %p = (s32[], f32[4]{0}, f32[8]{0}) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %q = f32[4]{0} get-tuple-element(%p), index=1
  %r = f32[8]{0} get-tuple-element(%p), index=2
  %f = f32[8]{0} fusion(%q, %r), kind=kLoop, calls=%piece
  ROOT %t = (s32[], f32[4]{0}, f32[8]{0}) tuple(%n, %q, %f)
}

%condition (q: (s32[], f32[4], f32[8])) -> pred[] {
  %limit = s32[] constant(3)
  %s = (s32[], f32[4]{0}, f32[8]{0}) parameter(0)
  %m = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%m, %limit), direction=LT
}

ENTRY %main (x: f32[4], y: f32[300,300]) -> f32[8] {
  %x = f32[4]{0} parameter(0)
  %y = f32[300,300]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %s1 = (f32[4]{0}, f32[4]{0}) collective-permute-start(%x), channel_id=1, \
source_target_pairs={{0,1},{1,0}}, metadata={op_name="jit(step)/ring" stack_frame_id=2}
  %z = f32[300,300]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %d1 = f32[4]{0} collective-permute-done(%s1)
  %s2 = (f32[4]{0}, f32[4]{0}) collective-permute-start(%d1), channel_id=2, \
source_target_pairs={{0,1},{1,0}}
  %d2 = f32[4]{0} collective-permute-done(%s2)
  %go = (f32[4]{0}, f32[8]{0}) fusion(%d2), kind=kCustom, calls=%start
  %o = f32[8]{0} get-tuple-element(%go), index=1
  %state = (s32[], f32[4]{0}, f32[8]{0}) tuple(%zero, %d2, %o)
  %loop = (s32[], f32[4]{0}, f32[8]{0}) while(%state), condition=%condition, body=%body
  ROOT %stop = f32[8]{0} fusion(%d2), kind=kCustom, calls=%end
}
""".replace("PACKAGE", os.path.dirname(aot.__file__))


class Place:
    def __init__(self, *coords):
        self.coords = coords


def test_what_runs_beside_communication_is_seen_and_pieces_count_once():
    module = hlo.parse(ASYNC)
    found = collectives.find(module)
    assert [each.overlaps for each in found] == [True, False, True]
    assert collectives.totals(found) == {
        "collective-permute": {"count": 2, "bytes": 2 * 16},
        "all-gather": {"count": 1, "bytes": 32},
    }
    # The innermost line of the package, not of the library that it calls.
    assert module.source(found[0].instruction) == "model.py:7"
    entries = collectives.listed(module, found, [None] * 2, None)
    assert {entry["seconds"] for entry in entries} == {None}
    assert [entry["devices"] for entry in entries] == [2, 2, 2]


def test_communication_is_exposed_as_far_as_nothing_hides_it():
    module = hlo.parse(ASYNC)
    found, devices = collectives.find(module), [Place(0, 0), Place(1, 0)]
    product = 2 * 300**3
    # A link of 16 bytes a second: a step of the ring takes 1 s, half of 32 bytes too.
    fast = chips.Chip(product / 0.25, 1, 1e9, 16.0, 4, "")
    total, exposed = collectives.exposed_seconds(module, found, devices, fast)
    assert total == pytest.approx(3.0)
    # One step waits, the other two collectives have 0.25 s of product to hide behind.
    assert exposed == pytest.approx(1 + 2 - 0.25, abs=1e-3)
    slow = chips.Chip(product / 5, 1, 1e9, 16.0, 4, "")
    assert collectives.exposed_seconds(module, found, devices, slow)[1] == pytest.approx(1.0)


def test_the_least_time_of_a_collective_is_that_of_its_links():
    chip = chips.Chip(1.0, 1, 1.0, 10.0, 4, "")

    def seconds(kind, *sides):
        ids = [(x, y) for x in range(sides[0]) for y in range(sides[1])]
        return chips.collective_seconds(kind, 160.0, ids, sides, chip)

    assert seconds("all-gather", 2, 1) == 160 / 2 / 10
    # A ring of four has two links for each, two lines of two one for each of two dimensions.
    assert seconds("all-gather", 4, 1) == seconds("all-gather", 2, 2) == 160 * 3 / 4 / 20
    assert seconds("all-reduce", 4, 4) == 2 * seconds("reduce-scatter", 4, 4)
    assert seconds("all-gather", 4, 4) == 160 * 15 / 16 / 40
    assert seconds("all-reduce", 1, 1) == 0


def test_the_buffers_of_the_peak_are_those_of_the_program():
    found = report("cpu:2")
    memory, largest = found["memory"], found["largest_buffers"]
    whole = found["peak_memory_bytes_per_device"]
    assert memory["arguments"] < memory["buffers_at_peak"] <= whole
    assert sum(e["bytes"] * e["count"] for e in largest) <= memory["buffers_at_peak"]
    sizes = [e["bytes"] * e["count"] for e in largest]
    assert sizes == sorted(sizes, reverse=True)
    for entry in largest:  # nothing is padded on a CPU
        assert entry["bytes"] == sum(shape.bytes for shape in hlo._shapes(entry["shape"]))
    [embedding] = [e for e in largest if e["shape"] == f"f32[{VOCABULARY},{WIDTH}]"
                   and e["argument"]]  # fmt: skip
    assert embedding["count"] == 3
    assert "token_embedding" in embedding["op_name"]


def test_the_summary_names_buffers_and_communication():
    found = report("cpu:2")
    text = "\n".join(aot.summary(found))
    assert f"f32[{VOCABULARY},{WIDTH}]" in text
    assert "all-reduce x" in text
    assert "estimate" not in text


def test_a_refused_program_says_what_it_needs():
    text = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (20.81G) exceeds"
    assert aot._required(text, 10) == int(20.81 * 2**30) + 10
    assert aot._required("Used 512.5M of 15.75G hbm", 10) == int(512.5 * 2**20)
    assert aot._required("something else", 10) is None


def test_the_roofline_is_the_longer_of_its_two_parts():
    chip = chips.Chip(100.0, 1, 10.0, 1.0, 4, "")
    assert chips.roofline(chip, 200.0, 5.0).step_seconds == 2.0
    assert chips.roofline(chip, 200.0, 50.0).step_seconds == 5.0
    assert chips.roofline(chip, 200.0, 50.0, 0.25).step_seconds == 5.25


@pytest.mark.skipif(not has_libtpu, reason="libtpu is not installed")
@pytest.mark.parametrize(("topology", "devices"), [("v5e:2x2", 4), ("v4:2x2x1", 4), ("v6e:1x1", 1)])
def test_a_tpu_is_compiled_for_without_one(topology, devices):
    found = report(topology)
    assert found["devices"] == devices
    assert found["fits"] is True
    assert found["loops_counted_once"] == []
    # The compiler may write a small product as elementwise work.
    assert 0.5 < found["flops_per_device"] * devices / products(ROWS * LENGTH) < 1.05
    assert 0 < found["mfu"] < 1
    assert ("all-reduce" in found["collectives"]) == (devices > 1)
    sent = found["communication"]
    assert sum(e["count"] * e["bytes"] for e in sent) == sum(
        entry["bytes"] for entry in found["collectives"].values()
    )
    parts = found["estimate"]
    assert (parts["communication_seconds"] > 0) == (devices > 1)
    assert parts["exposed_communication_seconds"] <= parts["communication_seconds"]
    roof = max(parts["compute_seconds"], parts["memory_seconds"])
    assert found["step_seconds"] == roof + parts["exposed_communication_seconds"]
    # Of the three copies of a matrix (the parameters, Adam's two), each is an argument.
    held = [e for e in found["largest_buffers"] if e["argument"]]
    assert held[0]["count"] % 3 == 0
    assert held[0]["op_name"].startswith("state.")


@pytest.mark.skipif(not has_libtpu, reason="libtpu is not installed")
def test_what_a_tpu_cannot_hold_is_said():
    found = report(
        "v5e:1x1", "--config.pretrain.batch_size=1024", "--config.model.context_length=4096",
        "--config.model.num_heads=16",
    )  # fmt: skip
    assert found["fits"] is False
    assert found["peak_memory_bytes_per_device"] > chips.CHIPS["v5e"].memory_bytes
    assert found["step_seconds"] is None
    # The message of libtpu has the same sum, to two decimals of GiB, arguments included or not.
    total = found["memory"]["buffers_at_peak"]
    said = aot._required(found["refused"], 0)
    assert total == pytest.approx(said, rel=0.01)
    largest = found["largest_buffers"][0]
    assert largest["bytes"] * largest["count"] > total / 20
    assert not largest["argument"]
