"""Reads the text of a compiled XLA program (HLO) into computations and instructions.

A computation is a named list of instructions, such as the body of a loop or a fusion.

The module also finds how often a step executes each instruction. XLA's own cost analysis counts the
body of a loop only once (`HloCostAnalysis::HandleWhile`), and a scan over layers is a loop. All
sizes are for one device, because each device executes the same program on its part of the data.
"""

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping

# The folder of the source files of gptjax.
_PACKAGE = str(pathlib.Path(__file__).parents[2]) + os.sep
_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16,
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
    "f8e4m3fn": 8, "f8e5m2": 8,
}  # fmt: skip
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%?([\w.\-]+)$")
# Patterns of lines in the tables before a program, for example
# 3 "model.py"
# 7 {file_name_id=3 ... line=90 ...}
_FILE_NAME = re.compile(r'^(\d+) "(.*)"$', re.MULTILINE)
_LOCATION = re.compile(r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", re.MULTILINE)
_FRAME = re.compile(r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)", re.MULTILINE)
# Opcode -> the attributes that name the computations that such an instruction executes. All
# branches of a conditional are counted, so the numbers of executions are upper bounds.
_INNER = {
    "while": ("body",),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    **dict.fromkeys(("fusion", "call", "async-start"), ("calls", "to_apply")),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The element type, dimensions and memory space of an array.

    Memory space 0 is the main memory (HBM on a TPU).
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Size in bytes without the padding of the layout; 0 for types that are not arrays."""
        return math.ceil(self.elements * _BITS.get(self.dtype, 0) / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction, which is one line of a computation."""

    name: str
    shapes: tuple[Shape, ...]
    """The shape of the result. If the result is a tuple, the shape of each leaf."""
    opcode: str
    operands: tuple[str, ...]
    """Names of the operands. A constant has its value here, and a parameter its number."""
    attributes: str
    """The text of the line after the operands."""
    root: bool
    """Whether the instruction is the result of its computation."""

    @property
    def bytes(self) -> int:
        """Size of the result in bytes."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def main_memory_bytes(self) -> int:
        """Size in bytes of the part of the result that is in main memory."""
        return sum(shape.bytes for shape in self.shapes if shape.space == 0)

    def find(self, pattern: str) -> str:
        """Returns the first group of a regular expression in the attributes; "" if none matches."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    def called(self, *names: str) -> list[str]:
        """Returns the names of the computations in attributes such as calls, to_apply and body.

        Args:
          *names: names of the attributes.
        """
        pattern = rf"\b(?:{'|'.join(names)})=(?:%?([\w.\-]+)|\{{([^}}]*)\}})"
        found = []
        for one, many in re.findall(pattern, self.attributes):
            found += [part.strip().lstrip("%") for part in many.split(",")] if many else [one]
        return found

    @property
    def op_name(self) -> str:
        """JAX's name of the operation, such as jit(step)/jvp(GPT.hidden)/.../dot_general."""
        return self.find(r'op_name="([^"]*)"').replace("\\'", "'")

    def numbers(self, name: str) -> tuple[int, ...]:
        """Returns the numbers of an attribute, for example (1, 2) for `name={1,2}`."""
        found = self.find(rf"\b{name}=\{{([\d,]*)\}}")
        return tuple(int(part) for part in found.split(",") if part)


Computation = dict[str, Instruction]
"""Name of an instruction -> the instruction, in the order of the text."""


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction of a computation, and the number of times that a step executes it."""

    instruction: Instruction
    computation: Computation
    times: int
    fused: bool
    """Whether the instruction is inside a fusion. Its result is then not written to memory."""

    def operand_shapes(self) -> list[Shape]:
        """Returns the shapes of the operands. For a tuple, these are the shapes of its leaves."""
        found = (self.computation.get(name) for name in self.instruction.operands)
        return [shape for each in found if each is not None for shape in each.shapes]


def _closing(text: str, start: int) -> int:
    """Returns the index of the ")" that closes the "(" at index `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"no closing parenthesis in {text[start : start + 80]!r}")


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size) for size in dims.split(",") if size)
        found.append(Shape(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def _split(text: str) -> list[str]:
    """Splits a text at the commas that are outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    name, rest = found.groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    # In some texts the shape of an operand stands before its name.
    names = (_NAME.search(part) for part in _split(rest[opening + 1 : closing]))
    return Instruction(
        name, _shapes(rest[:end]), rest[end:opening].strip(),
        tuple(match[1] for match in names if match), rest[closing + 1 :],
        line.lstrip().startswith("ROOT "),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: Mapping[str, Computation]
    """Name of a computation -> the computation."""
    entry: str
    """Name of the computation with which the program starts."""
    frames: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """Number of a stack frame -> its source line, such as "model.py:90"."""

    def trip_count(self, loop: Instruction, computation: Computation) -> int | None:
        """Returns the number of iterations of a loop; None if it is unknown.

        In programs for CPUs and GPUs, XLA writes the number as `known_trip_count`. For TPUs, the
        number is computed from the condition of the loop, counter < limit, because a loop of JAX's
        scan increases its counter by one.

        Args:
          loop: a `while` instruction.
          computation: the computation that holds the loop.
        """
        if known := loop.find(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition = self.computations[loop.called("condition")[0]]
        root = next(each for each in condition.values() if each.root)
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        counter, limit = (condition[name] for name in root.operands)
        place = counter.find(r"\bindex=(\d+)")
        if limit.opcode != "constant" or not place:
            return None
        start = computation[computation[loop.operands[0]].operands[int(place)]]
        while start.opcode in ("copy", "bitcast") and start.operands[0] in computation:
            start = computation[start.operands[0]]
        if start.opcode != "constant":
            return None
        return int(limit.operands[0]) - int(start.operands[0])

    def source(self, instruction: Instruction) -> str:
        """Returns the source line of an instruction, such as "model.py:90"; "" if unknown.

        If the program has a table of stack frames, this is the innermost frame whose file belongs
        to gptjax. If no frame does, it is the innermost frame.
        """
        if frame := instruction.find(r"stack_frame_id=(\d+)"):
            return self.frames.get(int(frame), "")
        file = re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.attributes)
        return f"{os.path.basename(file[1])}:{file[2]}" if file else ""

    def inner(self, each: Instruction, computation: Computation) -> list[tuple[str, int]]:
        """Returns (name, number of executions) of each computation that an instruction executes.

        Args:
          each: the instruction.
          computation: the computation that holds the instruction.
        """
        if each.opcode not in _INNER:
            return []
        times = (self.trip_count(each, computation) or 1) if each.opcode == "while" else 1
        return [(name, times) for name in each.called(*_INNER[each.opcode])]

    def executions(self) -> Iterator[Execution]:
        """Yields all instructions that a step executes, with their numbers of executions.

        An instruction is yielded once for each instruction that calls its computation.
        """
        yield from self._executions(self.entry, 1, False)

    def _executions(self, name: str, times: int, fused: bool) -> Iterator[Execution]:
        computation = self.computations[name]
        for each in computation.values():
            yield from self.executions_of(each, computation, times, fused)

    def executions_of(
        self, each: Instruction, computation: Computation, times: int = 1, fused: bool = False
    ) -> Iterator[Execution]:
        """Yields an instruction and all instructions of the computations that it executes.

        Args:
          each: the instruction.
          computation: the computation that holds the instruction.
          times: the number of times that a step executes the instruction.
          fused: whether the instruction is inside a fusion.
        """
        yield Execution(each, computation, times, fused)
        for name, count in self.inner(each, computation):
            yield from self._executions(name, times * count, fused or each.opcode == "fusion")

    def unknown_loops(self) -> list[str]:
        """Returns the names of loops with unknown trip count, whose bodies are counted once."""
        return [
            each.instruction.name
            for each in self.executions()
            if each.instruction.opcode == "while"
            and self.trip_count(each.instruction, each.computation) is None
        ]


def _frames(text: str) -> dict[int, str]:
    """Returns a mapping of stack frame numbers to source lines, such as "model.py:90".

    Args:
      text: the text of a program. XLA writes tables of files, lines and frames before the program.
    """
    # Only the table of file names is searched, because the next table, which has the names of
    # functions, has lines of the same form.
    files = dict(_FILE_NAME.findall(text.partition("\nFileNames\n")[2].partition("\n\n")[0]))
    places = {number: (files[file], line) for number, file, line in _LOCATION.findall(text)}
    frames = {int(number): (place, int(up)) for number, place, up in _FRAME.findall(text)}
    # In some versions of XLA, parent_frame_id is the number of the parent plus 1. In these versions
    # frame 1 seems to be its own parent, because its parent_frame_id of 1 means "no parent".
    shift = 1 if any(number == parent for number, (_, parent) in frames.items()) else 0

    def place(number: int) -> str:
        innermost = ""
        while number in frames:
            location, parent = frames[number]
            path, line = places.get(location, ("", ""))
            shown = f"{os.path.basename(path)}:{line}"
            if path.startswith(_PACKAGE):
                return shown
            innermost, number = innermost or shown, min(parent - shift, number - 1)
        return innermost

    return {number: place(number) for number in frames}


def parse(text: str) -> Module:
    """Returns the program that is written in a text of `jax.stages.Compiled.as_text`."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif instruction := _instruction(re.sub(r"/\*.*?\*/", "", line)):
            current[instruction.name] = instruction
    return Module(computations, entry, _frames(text))
