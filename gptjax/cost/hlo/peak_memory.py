"""The largest buffers at the moment of a program's peak memory, from XLA's buffer assignment.

With the compiler option `xla_dump_to`, XLA writes three text files: the program, the memory address
of each value (the buffer assignment), and the first and the last instruction that needs each value
(the live ranges). XLA writes these files for CPUs and TPUs, and also for a program that it rejects
because the program needs too much memory.
"""

import collections
import dataclasses
import glob
import os
import pathlib
import re
from typing import Any

from gptjax.cost.hlo import parse

_ASSIGNMENT, _RANGES = "-buffer-assignment.txt", "-live-range.txt"
_ALLOCATION = re.compile(r"^allocation (\d+): size (\d+),(.*)$")
_VALUE = re.compile(
    r"^ value: <\d+ ([\w.\-]+)(\{[\d,]*\})?.*? @\d+> \(size=(\d+),offset=(\d+)\): (.*)$"
)
_RANGE = re.compile(r"^    ([\w.\-]+\{[\d,]*\}):(\d+)-(\d+)$")
# These opcodes say nothing about the use of a buffer. A buffer holds several values one after
# another, and the report prefers to name the buffer after a value with another opcode.
_CARRIERS = (
    "parameter", "while", "conditional", "tuple", "get-tuple-element", "custom-call", "broadcast",
    "copy", "copy-start", "copy-done", "bitcast", "call",
)  # fmt: skip
# The instruction that is used for a value whose name is not in the program.
_UNKNOWN = parse.Instruction("", (), "", (), "", False)


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value of the program, its address and size in bytes, and its live range."""

    name: str
    allocation: int
    offset: int
    size: int
    shape: str
    first: int
    last: int


def largest(folder: str, limit: int = 12) -> dict[str, Any] | None:
    """Returns the largest buffers in main memory at the time of the peak.

    Args:
      folder: the folder that the compiler option `xla_dump_to` named.
      limit: the largest number of entries.

    Returns:
      {"bytes": the sum of all buffers, "largest": entries}, or None if the folder lacks XLA's text
      files. An entry is {"name", "opcode", "shape", "bytes", "count", "argument", "op_name",
      "source"}. It stands for "count" buffers of one shape, each with a size of "bytes". "argument"
      is true for arguments and results of the step, and false for temporary buffers. Temporary
      buffers of one entry also have the same opcode, op_name and source. The entries are sorted by
      "count" times "bytes", largest first.
    """
    # The largest file belongs to the step, and the other files to small helper programs.
    files = glob.glob(os.path.join(glob.escape(folder), f"*{_ASSIGNMENT}"))
    if not files:
        return None
    prefix = max(files, key=os.path.getsize).removesuffix(_ASSIGNMENT)
    paths = [pathlib.Path(f"{prefix}{ending}") for ending in (".txt", _RANGES, _ASSIGNMENT)]
    if not all(path.is_file() for path in paths):
        return None
    program, *texts = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    module = parse.parse(program)
    arguments, values = _read(*texts)
    now = _peak(values)
    instructions = {
        each.name: each for inside in module.computations.values() for each in inside.values()
    }
    places = collections.defaultdict(list)
    for value in values:
        places[value.allocation, value.offset, value.size].append(value)
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    total = 0
    for (allocation, _, size), here in places.items():
        argument = allocation in arguments
        now_here = [value for value in here if value.first <= now <= value.last]
        if not (now_here or argument) or (argument and size < arguments[allocation]):
            continue
        # If a loop carries a buffer from one iteration to the next, the report names the buffer
        # after the instruction that updates it.
        shapes = {value.shape for value in now_here}
        writers = [v for v in here if "dynamic-update-slice" in v.name and v.shape in shapes]
        entry = _entry(module, instructions, writers or now_here or here, argument)
        same = entries.setdefault(_key(entry), entry | {"count": 0})
        same["count"] += 1
        total += size
    ranked = sorted(entries.values(), key=lambda entry: -entry["bytes"] * entry["count"])
    return {"bytes": total, "largest": ranked[:limit]}


def _read(ranges: str, assignment: str) -> tuple[dict[int, int], list[_Value]]:
    """Returns the allocations of arguments and results (number -> size in bytes), and all values.

    The allocations of arguments and results exist for the whole run of the program. Constants,
    thread-local values and other memories are left out. In XLA's text, an allocation in another
    memory of a TPU has a color.

    Args:
      ranges: the text of the live ranges.
      assignment: the text of the buffer assignment.
    """
    live = {found[1]: (int(found[2]), int(found[3]))
            for line in ranges.splitlines() if (found := _RANGE.match(line))}  # fmt: skip
    arguments: dict[int, int] = {}
    values = []
    allocation = -1
    for line in assignment.splitlines():
        if found := _ALLOCATION.match(line):
            kind = found[3]
            other = "color" in kind or "thread-local" in kind or "constant" in kind
            allocation = -1 if other else int(found[1])
            if not other and ("parameter" in kind or "live-out" in kind):
                arguments[allocation] = int(found[2])
        elif allocation >= 0 and (found := _VALUE.match(line)):
            name, index = found[1], found[2] or "{}"
            first, last = live.get(name + index, (1, 0))
            shape = re.sub(r"\{[^}]*\}", "", found[5])
            values.append(
                _Value(name, allocation, int(found[4]), int(found[3]), shape, first, last)
            )
    return arguments, values


def _peak(values: list[_Value]) -> int:
    """Returns the position in the schedule at which live values occupy the most memory.

    Memory that several values share is counted once, and values below 1 KiB are ignored.
    """
    best, most = 0, -1
    starts = sorted({value.first for value in values if value.first <= value.last})
    large = [value for value in values if value.size >= 2**10]
    for now in starts:
        used, taken = 0, (-1, 0)
        for value in sorted(
            (v for v in large if v.first <= now <= v.last), key=lambda v: (v.allocation, v.offset)
        ):
            begin, end = value.offset, value.offset + value.size
            if value.allocation == taken[0]:
                begin = max(begin, taken[1])
            if end > begin:
                used += end - begin
                taken = (value.allocation, end)
        if used > most:
            best, most = now, used
    return best


def _entry(
    module: parse.Module,
    instructions: dict[str, parse.Instruction],
    here: list[_Value],
    argument: bool,
) -> dict[str, Any]:
    known = [v for v in here if v.name in instructions]
    opcodes = {v.name: instructions[v.name].opcode for v in known}
    wanted = {"parameter"} if argument else set(opcodes.values()).difference(_CARRIERS)
    value = ([v for v in known if opcodes[v.name] in wanted] or known or here)[0]
    instruction = instructions.get(value.name, _UNKNOWN)
    return {
        "name": value.name,
        "opcode": instruction.opcode,
        "shape": value.shape,
        "bytes": value.size,
        "argument": argument,
        "op_name": instruction.op_name,
        "source": module.source(instruction),
    }


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    names = () if entry["argument"] else (entry["opcode"], entry["op_name"], entry["source"])
    return (entry["argument"], entry["shape"], entry["bytes"], *names)


def summary(entry: dict[str, Any]) -> str:
    """Returns an entry of `largest` as a line of text."""
    place = f"{entry['op_name']} {entry['source']}".strip()
    return (
        f"{entry['bytes'] * entry['count'] / 2**20:10.1f} MiB  {entry['count']} x {entry['shape']} "
        f"{'argument' if entry['argument'] else entry['opcode']}  {place}"
    )
