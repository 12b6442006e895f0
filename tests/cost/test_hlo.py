"""Programs in XLA's text, and their operations, traffic and collectives, counted by hand."""

import pathlib

import pytest

from gptjax.cost import hardware
from gptjax.cost.hlo import collectives, flops, parse

# The style of libtpu: no trip counts, products as convolutions, S(1) for memory on the chip.
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


def costs(module: parse.Module) -> tuple[int, int]:
    """Operations and memory traffic of a step."""
    return flops.flops_and_bytes(module, module.executions())


@pytest.mark.parametrize("start", [0, 2])
def test_a_program_of_a_tpu_is_read(start):
    # The product's left side also has two spatial dimensions of size 1, absent in the text.
    text = PROGRAM.replace("START", str(start)).replace("bf16[32,512,768]", "bf16[32,512,768,1,1]")
    module, trips = parse.parse(text), 12 - start
    assert module.unknown_loops() == []
    totals = collectives.totals(collectives.find(module))
    assert totals == {"all-reduce": {"count": trips, "bytes": 4 * trips}}
    assert costs(module)[0] == 2 * 32 * 512 * 768 * 3 * 12 * 64
    # Each iteration reads a slice of the array and the counter, and reads and writes the sum.
    # Outside the loop, both matrices and the counter's first value are read. Writes to memory on
    # the chip do not count.
    matrices = 2 * (32 * 512 * 768 + 768 * 3 * 12 * 64)
    assert costs(module)[1] == trips * (4 * 8 * 2 + 4 + 8) + matrices + 4


def test_a_kernel_counts_as_what_it_says():
    cost = '"cost_estimate":{"flops":"700","transcendentals":"0"}'
    kernel = f'%k = f32[] custom-call(), backend_config={{"custom_call_config":{{,{cost}}}}}'
    text = PROGRAM.replace("START", "0").replace("bf16[32,512,768]", "bf16[32,512,768,1,1]")
    more = parse.parse(text.replace("  %start = s32[]", f"  {kernel}\n  %start = s32[]"))
    assert costs(more)[0] == costs(parse.parse(text))[0] + 700


def test_a_loop_of_unknown_length_is_named():
    text = PROGRAM.replace("direction=LT", "direction=NE").replace("START", "0")
    module = parse.parse(text)
    assert module.unknown_loops() == ["loop"]
    assert collectives.totals(collectives.find(module))["all-reduce"]["count"] == 1


# Two collective-permutes, of which one runs beside a product. Then the form of a TPU: one fusion
# starts an all-gather, another one transfers a piece of it, a third ends it.
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
""".replace("PACKAGE", str(pathlib.Path(parse.__file__).parents[2]))


class Place:
    def __init__(self, *coords):
        self.coords = coords


def test_what_runs_beside_communication_is_seen_and_pieces_count_once():
    module = parse.parse(ASYNC)
    found = collectives.find(module)
    assert [each.overlaps for each in found] == [True, False, True]
    assert collectives.totals(found) == {
        "collective-permute": {"count": 2, "bytes": 2 * 16},
        "all-gather": {"count": 1, "bytes": 32},
    }
    # The innermost line in gptjax, not that of the library that it calls.
    assert module.source(found[0].instruction) == "model.py:7"
    entries = collectives.entries(module, found, [None] * 2, None)
    assert {entry["seconds"] for entry in entries} == {None}
    assert [entry["devices"] for entry in entries] == [2, 2, 2]


def test_communication_is_exposed_as_far_as_nothing_hides_it():
    module = parse.parse(ASYNC)
    found, devices = collectives.find(module), [Place(0, 0), Place(1, 0)]
    product = 2 * 300**3
    # A link sends 16 bytes in a second: each collective-permute takes 1 s, and so does the
    # all-gather, which receives half of 32 bytes.
    fast = hardware.Chip(product / 0.25, 1, 1e9, 16.0, 1.0, 4, "")
    total, exposed = collectives.total_and_exposed_seconds(module, found, devices, fast)
    assert total == pytest.approx(3.0)
    # One collective-permute overlaps nothing. The other two overlap a product of 0.25 s.
    assert exposed == pytest.approx(1 + 2 - 0.25, abs=1e-3)
    slow = hardware.Chip(product / 5, 1, 1e9, 16.0, 1.0, 4, "")
    assert collectives.total_and_exposed_seconds(module, found, devices, slow)[1] == pytest.approx(
        1.0
    )


# An all-reduce over four slices and an all-gather over two, in the style of libtpu.
SLICES = """HloModule jit_step, is_scheduled=true

ENTRY %main (x: f32[4], y: f32[300,300]) -> f32[8] {
  %x = f32[4]{0} parameter(0)
  %y = f32[300,300]{1,0} parameter(1)
  %token = token[] after-all()
  %s1 = (f32[4]{0}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="a",_xla_megascale_target="{1,2,3,4}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %r1 = (f32[4]{0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="a",_xla_megascale_target="{1,2,3,4}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %e1 = token[] send-done(%s1), channel_id=2, is_host_transfer=true
  %z = f32[300,300]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %d1 = (f32[4]{0}, token[]) recv-done(%r1), channel_id=1, is_host_transfer=true
  %g = f32[4]{0} get-tuple-element(%d1), index=0
  %s2 = (f32[4]{0}, u32[], token[]) send(%g, %token), channel_id=3, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="b",\
_xla_megascale_target={{100000,200000},{300000,400000}},_xla_megascale_transfer_type="ALL_GATHER"}
  %r2 = (f32[8]{0}, u32[], token[]) recv(%token), channel_id=4, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="b",\
_xla_megascale_target={{100000,200000},{300000,400000}},_xla_megascale_transfer_type="ALL_GATHER"}
  %e2 = token[] send-done(%s2), channel_id=3, is_host_transfer=true
  %d2 = (f32[8]{0}, token[]) recv-done(%r2), channel_id=4, is_host_transfer=true
  ROOT %h = f32[8]{0} get-tuple-element(%d2), index=0
}
"""


def test_what_is_sent_between_slices_is_a_collective():
    module = parse.parse(SLICES)
    found = collectives.find(module)
    assert [each.overlaps for each in found] == [True, False]
    assert collectives.totals(found) == {
        "dcn-all-reduce": {"count": 1, "bytes": 16},
        "dcn-all-gather": {"count": 1, "bytes": 32},
    }
    entries = collectives.entries(module, found, [Place(0, 0)] * 4, None)
    assert {entry["collective"]: entry["devices"] for entry in entries} == {
        "dcn-all-reduce": 4, "dcn-all-gather": 2,
    }  # fmt: skip
    # A device sends 24 bytes for the first and 16 for the second. A product of half a second
    # overlaps the first.
    product = 2 * 300**3
    chip = hardware.Chip(product / 0.5, 1, 1e12, 1.0, 16.0, 4, "")
    total, exposed = collectives.total_and_exposed_seconds(module, found, [Place(0, 0)] * 4, chip)
    assert total == pytest.approx(24 / 16 + 16 / 16)
    assert exposed == pytest.approx(24 / 16 - 0.5 + 16 / 16, abs=1e-3)
    # A send reads its bytes and a recv writes them. The product reads its matrix twice.
    assert costs(module)[1] == 2 * 16 + 16 + 32 + 3 * 4 * 300**2


def test_the_least_time_of_a_collective_is_that_of_its_links():
    chip = hardware.Chip(1.0, 1, 1.0, 10.0, 1.0, 4, "")

    def seconds(kind, *sides):
        ids = [(x, y) for x in range(sides[0]) for y in range(sides[1])]
        return hardware.collective_seconds(kind, 160.0, ids, sides, chip)

    assert seconds("all-gather", 2, 1) == 160 / 2 / 10
    # Two links for each chip: both in the ring of four, or one in each dimension of 2 x 2.
    assert seconds("all-gather", 4, 1) == seconds("all-gather", 2, 2) == 160 * 3 / 4 / 20
    assert seconds("all-reduce", 4, 4) == 2 * seconds("reduce-scatter", 4, 4)
    assert seconds("all-gather", 4, 4) == 160 * 15 / 16 / 40
    assert seconds("all-reduce", 1, 1) == 0


def test_the_roofline_is_the_longer_of_its_two_parts():
    chip = hardware.Chip(100.0, 1, 10.0, 1.0, 1.0, 4, "")
    assert hardware.roofline(chip, 200.0, 5.0).step_seconds == 2.0
    assert hardware.roofline(chip, 200.0, 50.0).step_seconds == 5.0
    assert hardware.roofline(chip, 200.0, 50.0, 1.0, 0.25).step_seconds == 5.25
