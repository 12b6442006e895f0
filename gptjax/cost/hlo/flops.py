"""Counts the floating-point operations and the memory traffic of a compiled program."""

import math
import re
from collections.abc import Iterable

import numpy as np

from gptjax.cost.hlo.parse import Computation, Execution, Instruction, Module, Shape

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip

# These instructions read and write no memory themselves. The instructions inside a loop, branch or
# call are counted separately.
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "iota",
)  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")
# Attribute of a convolution's window -> the value in each dimension if the attribute is absent.
_WINDOW = {"size": "1", "stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
_SLICES = ("slice", "dynamic-slice", "gather")


def flops_and_bytes(module: Module, executions: Iterable[Execution]) -> tuple[int, int]:
    """Returns the operations of all matrix products, and the bytes of main-memory traffic.

    Both are numbers for one device. A multiply-add is two floating-point operations.
    Elementwise operations are not counted. For a custom kernel, the number is the kernel's own
    estimate (`cost_estimate` in Pallas).

    The traffic is an estimate, because caches are not modelled. Each instruction reads its operands
    and writes its results, and a fusion is one instruction. A slice reads only its part of the
    operand, and an update in place writes only the update. Values that XLA keeps in memory on the
    chip (S(1) in a layout) are not counted.

    Args:
      module: the program.
      executions: the executions to count, such as `module.executions()`.
    """
    flops = traffic = 0
    for each in executions:
        flops += _product_flops(each) * each.times
        if not each.fused:
            traffic += _traffic(each, module) * each.times
    return flops, traffic


def _product_flops(execution: Execution) -> int:
    each = execution.instruction
    if each.opcode == "dot":
        left = execution.operand_shapes()[0]
        depth = math.prod(left.dims[axis] for axis in each.numbers("lhs_contracting_dims"))
        return 2 * each.shapes[0].elements * depth
    if each.opcode == "convolution":
        return _convolution_flops(each, *execution.operand_shapes()[:2])
    if each.opcode == "custom-call":
        return int(each.find(r'"cost_estimate":\{"flops":"?(\d+)') or 0)
    return 0


def _convolution_flops(instruction: Instruction, left: Shape, right: Shape) -> int:
    """Returns the number of floating-point operations of a convolution.

    The number agrees with XLA's `HloCostAnalysis::HandleConvolution`. Products with padding or with
    the holes of a dilation are not counted. On a TPU, XLA turns all matrix products into
    convolutions, and batch or contracted dimensions of a product become window dimensions.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    places_left, places_right, places_out = (labels[i] for i in (1, 2, 3))
    out = instruction.shapes[0]
    count = out.dims[places_out.index("f")] * right.dims[places_right.index("i")]
    count *= left.dims[places_left.index("b")]
    count //= int(instruction.find(r"batch_group_count=(\d+)") or 1)
    window = dict(part.split("=") for part in instruction.find(r"window=\{([^}]*)\}").split())
    values = (
        window[name].split("x") if name in window else [default] * (len(places_out) - 2)
        for name, default in _WINDOW.items()
    )
    for i, (size, stride, pad, dilate, hole) in enumerate(zip(*values, strict=True)):
        positions = np.arange(out.dims[places_out.index(str(i))]) * int(stride)
        taps = np.arange(int(size)) * int(hole)
        index = positions[:, None] + taps[None] - int(pad.split("_")[0])
        length = (left.dims[places_left.index(str(i))] - 1) * int(dilate) + 1
        count *= int(((index >= 0) & (index < length) & (index % int(dilate) == 0)).sum())
    return 2 * count


def _traffic(execution: Execution, module: Module) -> int:
    each = execution.instruction
    if each.opcode in _FREE or each.find(r'custom_call_target="([^"]*)"') in _FREE_CALLS:
        return 0
    if each.opcode.endswith("-done"):
        return each.main_memory_bytes
    # The result of a slice-start is ((source), slice, context). The write is counted at the
    # slice-done.
    if each.opcode == "slice-start":
        source, part = each.shapes[:2]
        return part.bytes if source.space == 0 else 0
    read = sum(
        _bytes_read(each, i, operand, module)
        for i, name in enumerate(each.operands)
        if (operand := execution.computation.get(name)) is not None
    )
    # The write is counted at the instruction that ends the asynchronous operation.
    if each.opcode.endswith("-start") or each.opcode in ("send", "recv"):
        return read
    return read + _bytes_written(each, execution.computation, module)


def _updates(user: Instruction, place: int) -> bool:
    """Returns whether an instruction updates operand number `place` in place, without a read."""
    return user.opcode == "dynamic-update-slice" and place == 0


def _bytes_read(user: Instruction, place: int, operand: Instruction, module: Module) -> int:
    """Returns the bytes that the instruction `user` reads of its operand number `place`."""
    whole = operand.main_memory_bytes
    if user.opcode in _SLICES and place == 0:
        return min(whole, user.shapes[0].bytes)
    if _updates(user, place):
        return 0
    if user.opcode != "fusion" or whole == 0:
        return whole
    inside = module.computations[user.called("calls")[0]]
    parameter = next(
        each.name for each in inside.values()
        if each.opcode == "parameter" and each.operands == (str(place),)
    )  # fmt: skip
    return min(whole, _bytes_read_inside(parameter, inside, module))


def _bytes_read_inside(name: str, inside: Computation, module: Module) -> int:
    """Returns the bytes that a fusion reads of a parameter (or of a bitcast of a parameter).

    Args:
      name: name of the parameter or bitcast.
      inside: the computation of the fusion.
      module: the program.
    """
    total = 0
    for user in inside.values():
        for place, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.opcode == "bitcast":
                total += _bytes_read_inside(user.name, inside, module)
            elif user.opcode == "fusion":
                total += _bytes_read(user, place, inside[name], module)
            elif user.opcode in _SLICES and place == 0:
                total += user.shapes[0].bytes
            # A tuple only passes the operand on, without a read. The bytes of a collective are
            # counted at the instruction that starts it, for all of its pieces.
            elif user.opcode not in ("tuple", *COLLECTIVES) and not _updates(user, place):
                total += inside[name].bytes
    return total


def _bytes_written(each: Instruction, computation: Computation, module: Module) -> int:
    if each.opcode == "dynamic-update-slice":
        return computation[each.operands[1]].bytes if each.shapes[0].space == 0 else 0
    if each.opcode != "fusion":
        return each.main_memory_bytes
    inside = module.computations[each.called("calls")[0]]
    root = next(inner for inner in inside.values() if inner.root)
    leaves = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(leaves) != len(each.shapes):
        return each.main_memory_bytes
    total = 0
    for leaf, shape in zip(leaves, each.shapes, strict=True):
        while leaf.opcode == "bitcast" and leaf.operands[0] in inside:
            leaf = inside[leaf.operands[0]]
        if leaf.opcode == "parameter" or leaf.opcode in COLLECTIVES:
            # A parameter is only passed on, without a write. The bytes of a collective are counted
            # at the instruction that starts it, for all of its pieces.
            continue
        if leaf.opcode == "fusion" and shape.space == 0 and len(leaf.shapes) == 1:
            total += _bytes_written(leaf, inside, module)
        elif leaf.opcode == "dynamic-update-slice" and shape.space == 0:
            total += min(shape.bytes, inside[leaf.operands[1]].bytes)
        elif shape.space == 0:
            total += shape.bytes
    return total
