"""The communication of a compiled program: its bytes, its least time, its overlap with computation.

A collective is an operation in which several devices exchange data, such as an all-reduce. A
collective overlaps computation if the program starts the collective, computes, and then waits for
the result. Such a collective has one of two forms:

- a pair of instructions, such as `all-gather-start` and `all-gather-done`;
- on a TPU, several fusions. The first fusion starts the collective (`AsyncCollectiveStart`). Each
  of the following fusions computes and transfers a piece of the data at the same time. The last
  fusion ends the collective (`AsyncCollectiveDone`).

During any other collective the device waits.

To exchange data with another TPU slice (a group of chips joined by fast links), a device sends data
to its host and receives data from its host (`send`, `recv`). An attribute of these instructions
names the operation of the hosts, such as an all-reduce. This module counts such a pair as one
collective, `dcn-all-reduce`. The collectives within a slice before and after this exchange are
separate instructions.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.cost import hardware
from gptjax.cost.hlo import flops
from gptjax.cost.hlo.parse import Computation, Instruction, Module

DCN = "dcn-"
"""The prefix of the kind of a collective between slices, over the data-centre network (DCN)."""

_TRANSFER = {
    "ALL_REDUCE": "all-reduce", "ALL_GATHER": "all-gather", "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute",
}  # fmt: skip
_MEMBERS = "_xla_megascale_target"
_START, _DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
# These instructions take no computing time, so they cannot hide any communication.
_IDLE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "copy-start", "copy-done", "slice-start", "slice-done",
    "send", "recv",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective, and the instructions between its start and its end."""

    instruction: Instruction
    kind: str
    bytes: int
    """Bytes of a device's input. For an all-gather, bytes of a device's output."""
    times: int
    """Number of executions in a step."""
    computation: str
    """Name of the computation that holds the collective."""
    window: range
    """Indices of the instructions between the start and the end of the collective. The range is
    empty if the device waits."""
    overlaps: bool
    """Whether an instruction in the window computes."""


def _kind(each: Instruction) -> str:
    name = each.opcode.removesuffix("-start")
    if name == "send":
        transfer = _attribute(each, "_xla_megascale_transfer_type")
        return DCN + _TRANSFER.get(transfer, transfer.lower()) if transfer else ""
    return name if name in flops.COLLECTIVES else ""


def _attribute(each: Instruction, name: str) -> str:
    """Returns the value of an attribute, which is written `name="..."` or `name={{...}}`."""
    braces = r"\{(?:[^{}]|\{[^{}]*\})*\}"
    return each.find(rf'\b{name}="([^"]*)"') or each.find(rf"\b{name}=({braces})")


def find(module: Module) -> list[Collective]:
    """Returns all collectives of a step."""
    return list(_walk(module, module.entry, 1))


def _walk(module: Module, name: str, times: int) -> Iterator[Collective]:
    computation = module.computations[name]
    order = list(computation.values())
    for place, each in enumerate(order):
        if begun := _begun(module, computation, order, place):
            collective, inside, end = begun
            window = range(place + 1, end)
            overlaps = any(_computes(order[index]) for index in window)
            kind, size = _kind(collective), _size(collective, inside)
            yield Collective(collective, kind, size, times, name, window, overlaps)
        elif each.opcode in ("while", "conditional", "call"):
            for inner, count in module.inner(each, computation):
                yield from _walk(module, inner, times * count)


def _begun(
    module: Module, computation: Computation, order: list[Instruction], place: int
) -> tuple[Instruction, Computation, int] | None:
    """Finds the collective that the instruction `order[place]` starts.

    Returns:
      The collective, the computation that holds the collective, and the index at which the window
      of the collective ends. None means that the instruction starts no collective.
    """
    each = order[place]
    if kind := _kind(each):
        # An exchange with other slices ends when its `recv` ends.
        start = order.index(_matching_recv(order, each)) if kind.startswith(DCN) else place
        return each, computation, _end(order, start)
    if each.opcode in ("fusion", "async-start"):
        inside, collective = _fused(module, each)
        if collective and each.opcode == "async-start":
            return collective, inside, _end(order, place)
        if collective and _target(inside, _START):
            return collective, inside, _last_piece(module, order, place, collective)
    return None


def _target(inside: Computation, target: str) -> bool:
    return any(f'custom_call_target="{target}"' in each.attributes for each in inside.values())


def _fused(module: Module, each: Instruction) -> tuple[Computation, Instruction | None]:
    """Returns the computation that an instruction calls, and the first collective in it, if any."""
    inside = module.computations[each.called("calls")[0]]
    return inside, next((inner for inner in inside.values() if _kind(inner)), None)


def _end(order: list[Instruction], start: int) -> int:
    """Returns the index of the instruction that ends the asynchronous instruction `order[start]`.

    This is the first later `-done` or `-update` instruction that has the result of `order[start]`
    as an operand. If there is none, the instruction is not asynchronous, and the index is
    start + 1.
    """
    name = order[start].name
    ends = ("-done", "-update")
    following = enumerate(order[start + 1 :], start + 1)
    return next((i for i, each in following
                 if name in each.operands and each.opcode.endswith(ends)), start + 1)  # fmt: skip


def _matching_recv(order: Iterable[Instruction], send: Instruction) -> Instruction:
    """Returns the `recv` with the same rendezvous name as a `send`."""
    name = _attribute(send, "_xla_host_transfer_rendezvous")
    return next(each for each in order if each.opcode == "recv"
                and _attribute(each, "_xla_host_transfer_rendezvous") == name)  # fmt: skip


def _last_piece(module: Module, order: list[Instruction], start: int, first: Instruction) -> int:
    """Returns the index at which the window of a collective ends that runs in several fusions.

    All fusions of the collective have the same channel id.

    Args:
      module: the program.
      order: the instructions of the computation.
      start: index of the fusion that starts the collective.
      first: the collective inside that fusion.
    """
    channel, last = first.find(r"(channel_id=\d+)\b"), start + 1
    for place in range(start + 1, len(order)):
        if channel and order[place].opcode == "fusion":
            inside, piece = _fused(module, order[place])
            if piece is not None and f"{channel}," in f"{piece.attributes},":
                # The fusion that ends the collective computes nothing, so the window excludes it.
                # A fusion that transfers a piece also computes, so the window includes it.
                last = place + (not _target(inside, _DONE))
    return last


def _computes(each: Instruction) -> bool:
    return each.opcode not in _IDLE and not each.opcode.endswith(("-start", "-done", "-update")) \
        and not _kind(each)  # fmt: skip


def _size(each: Instruction, computation: Computation) -> int:
    if _kind(each) == DCN + "all-gather":
        return _matching_recv(computation.values(), each).shapes[0].bytes
    size = sum(computation[name].bytes for name in each.operands if name in computation)
    if _kind(each) != "all-gather":
        return size
    # The result of the asynchronous form is the tuple (input, output).
    return each.bytes - (size if each.opcode.endswith("-start") else 0)


def totals(found: Sequence[Collective]) -> dict[str, dict[str, int]]:
    """Returns a mapping of each kind to {"count", "bytes"}, for one step on one device."""
    sums: dict[str, dict[str, int]] = {}
    for each in found:
        entry = sums.setdefault(each.kind, {"count": 0, "bytes": 0})
        entry["count"] += each.times
        entry["bytes"] += each.times * each.bytes
    return sums


def group(attributes: str) -> tuple[int, ...]:
    """Returns the device ids of the first group of a collective, read from its attributes.

    () means that the attributes name no group, so all devices form one group.

    >>> group("replica_groups={{0,2},{1,3}}")
    (0, 2)
    >>> group("replica_groups=[2,2]<=[2,2]T(1,0)")
    (0, 2)
    >>> group("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}")
    (0, 2)
    >>> group("source_target_pairs={{3,0},{0,3}}")
    (3, 0)
    """
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes)
    if listed:
        return tuple(int(part) for part in listed[1].split(","))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, sizes, order = (
            [int(n) for n in (part or "").split(",") if n] for part in iota.groups()
        )
        ids = np.arange(np.prod(sizes)).reshape(sizes).transpose(order or range(len(sizes)))
        return tuple(int(i) for i in ids.reshape(shape)[0])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if mesh:
        axes = {name: int(size) for name, size in re.findall(r"([^,=]+)=(\d+)", mesh[1])}
        names = [part.strip() for part in mesh[2].split(",")]
        ids = np.arange(math.prod(axes.values())).reshape(list(axes.values()))
        index = tuple(slice(None) if axis in names else 0 for axis in axes)
        return tuple(int(i) for i in ids[index].reshape(-1))
    return ()


def slices(target: str) -> int:
    """Returns the number of slices that exchange data, read from `_xla_megascale_target`.

    >>> slices("{1,2,3,4}x{0:3}"), slices("{{100000,300000},{100001,300001}}")
    (4, 2)
    >>> slices("{100001->300000}")
    2
    """
    first = re.match(r"\{+([^{}]*)\}", target)
    return 2 if not first or "->" in target else first[1].count(",") + 1


def seconds(each: Collective, devices: Sequence[Any], chip: hardware.Chip) -> float:
    """Returns the least time of one execution of a collective, computed with `hardware`.

    Args:
      each: the collective.
      devices: the devices of one slice, in the order of their ids in the program.
      chip: the published figures of the devices.
    """
    if each.kind.startswith(DCN):
        count = slices(_attribute(each.instruction, _MEMBERS))
        return hardware.network_seconds(each.kind.removeprefix(DCN), each.bytes, count, chip)
    members = group(each.instruction.attributes) or range(len(devices))
    places = [tuple(devices[i].coords) for i in members]
    sides = tuple(max(d.coords[axis] for d in devices) + 1 for axis in range(len(places[0])))
    return hardware.collective_seconds(each.kind, each.bytes, places, sides, chip)


def total_and_exposed_seconds(
    module: Module, found: Sequence[Collective], devices: Sequence[Any], chip: hardware.Chip
) -> tuple[float, float]:
    """Returns the time of all collectives of a step, and the part that computation does not hide.

    The second time is computed for each computation (such as a loop body). It is the total time of
    the collectives that overlap computation, minus the roofline time of the instructions that run
    during them, but at least 0. An instruction that runs during several collectives is subtracted
    only once. The time of the collectives for which the device waits is added.
    """
    total = exposed = 0.0
    for name in dict.fromkeys(each.computation for each in found):
        here = [each for each in found if each.computation == name]
        times = here[0].times
        hideable = sum(seconds(each, devices, chip) for each in here if each.overlaps)
        waiting = sum(seconds(each, devices, chip) for each in here if not each.overlaps)
        places = {place for each in here for place in each.window}
        computation = module.computations[name]
        order = list(computation.values())
        beside = (
            module.executions_of(order[i], computation) for i in places if _computes(order[i])
        )
        costs = (flops.flops_and_bytes(module, executions) for executions in beside)
        hidden = sum(hardware.roofline(chip, *cost).step_seconds for cost in costs)
        total += times * (hideable + waiting)
        exposed += times * (waiting + max(0.0, hideable - hidden))
    return total, exposed


def entries(
    module: Module, found: Sequence[Collective], devices: Sequence[Any], chip: hardware.Chip | None
) -> list[dict[str, Any]]:
    """Returns the entries of the report, sorted by "count" times "bytes", largest first.

    Equal collectives share one entry. Its "bytes" are those of one execution, its "count" and
    "seconds" are the sums over all executions. "seconds" is None if `chip` is None.
    """
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for each in found:
        instruction = each.instruction
        members = group(instruction.attributes)
        entry: dict[str, Any] = {
            "collective": each.kind,
            "bytes": each.bytes,
            "devices": len(members) or len(devices),
            "overlaps_compute": each.overlaps,
            "asynchronous": len(each.window) > 0 or instruction.opcode.endswith("-start"),
            "op_name": instruction.op_name,
            "source": module.source(instruction),
        }
        if each.kind == "collective-permute":
            entry["devices"] = 2
        elif each.kind.startswith(DCN):
            entry["devices"] = slices(_attribute(instruction, _MEMBERS))
        nothing = {"count": 0, "seconds": None if chip is None else 0.0}
        same = merged.setdefault(tuple(entry.values()), entry | nothing)
        same["count"] += each.times
        if chip is not None:
            same["seconds"] += each.times * seconds(each, devices, chip)
    return sorted(merged.values(), key=lambda entry: -entry["count"] * entry["bytes"])


def summary(entry: Mapping[str, Any]) -> str:
    """Returns an entry of `entries` as a line of text."""
    kind = "overlaps compute" if entry["overlaps_compute"] else "waits"
    return (
        f"{entry['count'] * entry['bytes'] / 1e6:10.1f} MB  {entry['collective']} x "
        f"{entry['count']} over {entry['devices']}, {kind}  {entry['source']}"
    )
