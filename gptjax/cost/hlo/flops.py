"""The operations and the memory traffic of a compiled program on one device."""

import re

import numpy as np

from gptjax.cost.hlo.parse import Computation, Execution, Instruction, Module, Shape

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip

# Instructions that read and write no memory themselves. (The body of a loop is counted by itself.)
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "iota",
)  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")
_SLICES = ("slice", "dynamic-slice", "gather")


def flops(module: Module) -> int:
    """Returns the operations of all matrix products of a step; a multiply-add counts as two.

    Elementwise operations do not count. A custom kernel counts by its own estimate (Pallas's
    `cost_estimate`).
    """
    return sum(_product_flops(execution) * execution.times for execution in module.executions())


def flops_and_bytes(module: Module, each: Instruction, computation: Computation) -> tuple[int, int]:
    """Returns operations and memory traffic of an instruction and of all that it calls."""
    executions = list(module.executions_of(each, computation))
    return (
        sum(_product_flops(execution) * execution.times for execution in executions),
        sum(
            _traffic(execution, module) * execution.times
            for execution in executions
            if not execution.fused
        ),
    )


def _product_flops(execution: Execution) -> int:
    if execution.instruction.opcode == "dot":
        left = execution.operand_shapes()[0]
        contracted = execution.instruction.numbers("lhs_contracting_dims")
        depth = int(np.prod([left.dims[axis] for axis in contracted], dtype=np.int64))
        return 2 * execution.instruction.shapes[0].elements * depth
    if execution.instruction.opcode == "convolution":
        return _convolution_flops(execution.instruction, *execution.operand_shapes()[:2])
    if execution.instruction.opcode == "custom-call":
        said = re.search(r'"cost_estimate":\{"flops":"?(\d+)', execution.instruction.attributes)
        return int(said[1]) if said else 0
    return 0


def _window(attributes: str) -> dict[str, str]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    return dict(part.split("=") for part in found[1].split()) if found else {}


def _convolution_flops(instruction: Instruction, left: Shape, right: Shape) -> int:
    """Returns the operations of a convolution, as `HloCostAnalysis::HandleConvolution` does.

    Padding and the holes of a dilation do not count. On a TPU all matrix products are convolutions,
    whose windows are batch or contracted dimensions.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    places_left, places_right, places_out = (labels[i] for i in (1, 2, 3))
    out, window = instruction.shapes[0], _window(instruction.attributes)
    count = out.dims[places_out.index("f")] * right.dims[places_right.index("i")]
    count *= left.dims[places_left.index("b")]
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    count //= int(groups[1]) if groups else 1

    def sizes(name: str, default: str) -> list[str]:
        spatial = len(places_out) - 2
        return window[name].split("x") if name in window else [default] * spatial

    for i, (size, stride, pad, dilate, hole) in enumerate(
        zip(
            sizes("size", "1"),
            sizes("stride", "1"),
            sizes("pad", "0_0"),
            sizes("lhs_dilate", "1"),
            sizes("rhs_dilate", "1"),
            strict=True,
        )
    ):
        positions = np.arange(out.dims[places_out.index(str(i))]) * int(stride)
        taps = np.arange(int(size)) * int(hole)
        index = positions[:, None] + taps[None] - int(pad.split("_")[0])
        length = (left.dims[places_left.index(str(i))] - 1) * int(dilate) + 1
        count *= int(((index >= 0) & (index < length) & (index % int(dilate) == 0)).sum())
    return 2 * count


def memory_bytes(module: Module) -> int:
    """Returns the bytes that a step reads from and writes to the main memory of a device.

    Each instruction reads its operands and writes its results; a fusion counts as one instruction.
    A slice reads only its part of the operand, and an update in place writes only the update.
    Values that XLA keeps in memory on the chip (S(1) in a layout) do not count. This is an
    estimate: caches are not modelled.
    """
    return sum(
        _traffic(execution, module) * execution.times
        for execution in module.executions()
        if not execution.fused
    )


def _traffic(execution: Execution, module: Module) -> int:
    each = execution.instruction
    target = re.search(r'custom_call_target="([^"]*)"', each.attributes)
    if each.opcode in _FREE or (target and target[1] in _FREE_CALLS):
        return 0
    if each.opcode.endswith("-done"):
        return sum(shape.bytes for shape in each.shapes if shape.space == 0)
    # The result of a slice-start is ((source), slice, context). Its slice-done counts the write.
    if each.opcode == "slice-start":
        source, part = each.shapes[:2]
        return part.bytes if source.space == 0 else 0
    reads = [
        _bytes_read(each, i, operand, module)
        for i, name in enumerate(each.operands)
        if (operand := execution.computation.get(name)) is not None
    ]
    # The instruction that ends an asynchronous operation counts the write.
    if each.opcode.endswith("-start") or each.opcode in ("send", "recv"):
        return sum(reads)
    return sum(reads) + _bytes_written(each, execution.computation, module)


def _result_bytes(instruction: Instruction) -> int:
    return sum(shape.bytes for shape in instruction.shapes if shape.space == 0)


def _bytes_read(user: Instruction, place: int, operand: Instruction, module: Module) -> int:
    """Returns the bytes that an instruction reads of its operand number `place`."""
    whole = _result_bytes(operand)
    if user.opcode in _SLICES and place == 0:
        return min(whole, user.shapes[0].bytes)
    if user.opcode == "dynamic-update-slice" and place == 0:
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
    """Returns the bytes that a fusion reads of one of its parameters (or of a bitcast of it)."""
    total = 0
    for user in inside.values():
        for place, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.opcode == "bitcast":
                total += _bytes_read_inside(user.name, inside, module)
            elif user.opcode == "tuple" or user.opcode in COLLECTIVES:
                total += 0  # passed on unread; the start of a collective counts all its pieces
            elif user.opcode in _SLICES and place == 0:
                total += user.shapes[0].bytes
            elif user.opcode == "dynamic-update-slice" and place == 0:
                total += 0
            elif user.opcode == "fusion":
                total += _bytes_read(user, place, inside[name], module)
            else:
                total += sum(shape.bytes for shape in inside[name].shapes)
    return total


def _bytes_written(each: Instruction, computation: Computation, module: Module) -> int:
    if each.opcode == "dynamic-update-slice":
        update = computation[each.operands[1]]
        return sum(shape.bytes for shape in update.shapes) if each.shapes[0].space == 0 else 0
    if each.opcode != "fusion":
        return _result_bytes(each)
    inside = module.computations[each.called("calls")[0]]
    root = next(inner for inner in inside.values() if inner.root)
    leaves = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(leaves) != len(each.shapes):
        return _result_bytes(each)
    total = 0
    for leaf, shape in zip(leaves, each.shapes, strict=True):
        while leaf.opcode == "bitcast" and leaf.operands[0] in inside:
            leaf = inside[leaf.operands[0]]
        if leaf.opcode == "parameter" or leaf.opcode in COLLECTIVES:
            continue  # passed on unwritten; the start of a collective counts all its pieces
        if leaf.opcode == "fusion" and shape.space == 0 and len(leaf.shapes) == 1:
            total += _bytes_written(leaf, inside, module)
        elif leaf.opcode == "dynamic-update-slice" and shape.space == 0:
            total += min(shape.bytes, sum(s.bytes for s in inside[leaf.operands[1]].shapes))
        elif shape.space == 0:
            total += shape.bytes
    return total
