"""What a compiled program does, read from its text: collectives, and bytes between memory and cores, loops multiplied.

The compiler's own account (``cost_analysis``) counts the body of a loop once.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_ITEM_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64} | {
    f"{sign}{bits}": bits for sign in "su" for bits in (2, 4, 8, 16, 32, 64)
}
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"(ENTRY )?(%[\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?(%[\w.\-]+) = (.*)")
_CALLED = re.compile(
    r"(?:calls|body|condition|branch_computations|true_computation|false_computation)=\{?((?:%[\w.\-]+(?:, )?)+)"
)
_SLICES = ("dynamic-slice", "slice", "gather")
_OVERLAPPED = "async_collective_fusion_config"
"""Stands by a collective that goes on while fusions compute something else: one fusion starts it, others carry it on in
steps, one waits for its end, and each has it in its text."""
_STARTS, _ENDS = '"AsyncCollectiveStart"', '"AsyncCollectiveDone"'
_NO_TRAFFIC = (
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "iota"),
    *("after-all", "partition-id", "replica-id", "optimization-barrier"),
)


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    shape: str
    """With its layout; of several arrays, all of them."""
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    """What stands behind the operands; of a parameter its number, of a constant its value."""


class Collective(NamedTuple):
    """Of one kind, all that a device runs: how often, and the bytes of its results."""

    count: int
    bytes: float


class Program:
    """The computations of a compiled program (``compiled.as_text()``), by name."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        body: list[Instruction] = []
        for line in text.splitlines():
            if header := _HEADER.match(line):
                body = self.computations[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
            elif found := _LINE.match(line):
                body.append(_parse(found[1], found[2]))
        self._shape_of = {line.name: line.shape for body in self.computations.values() for line in body}
        self._carried_on = {
            line.name
            for body in self.computations.values()
            if not any(_STARTS in line.attributes for line in body)
            for line in body
            if _OVERLAPPED in line.attributes
        }
        """Collectives that were started before, which neither communicate nor move their arrays once more."""

    def collectives(self) -> dict[str, Collective]:
        """Kind to what a device runs of it, in a program that runs once."""
        counts, sizes = defaultdict(int), defaultdict(float)
        for times, instruction in self._runs(into_fusions=True):
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES and instruction.name not in self._carried_on:
                counts[kind] += times
                # What starts one gives its operands and then its results.
                sizes[kind] += times * max(map(_array_bytes, _ARRAY.finditer(instruction.shape)), default=0.0)
        return {kind: Collective(counts[kind], sizes[kind]) for kind in COLLECTIVES if counts[kind]}

    def memory_bytes(self) -> float:
        """Bytes that a device reads from and writes to its main memory: the operands and results of all that is not
        fused into something else. What the compiler keeps in other memories does not count, and of an array that is
        sliced or updated in place only that part."""
        return self._branch_bytes(self.entry)

    def _branch_bytes(self, name: str) -> float:
        return sum(times * self._traffic(instruction) for times, instruction in self._runs(False, name))

    def _runs(self, into_fusions: bool, start: str = "") -> Iterator[tuple[int, Instruction]]:
        """Every instruction, with how often it runs. Of a conditional the branch that moves least is taken to run: that
        of the sampler which filters nothing, as rollouts do."""
        waiting = [(1, start or self.entry)]
        while waiting:
            times, name = waiting.pop()
            for instruction in self.computations.get(name, ()):
                yield times, instruction
                if instruction.opcode == "fusion" and not into_fusions:
                    continue
                trips = self._trips(instruction) if instruction.opcode == "while" else 1
                called = list(_called(instruction))
                if instruction.opcode == "conditional":
                    called = [min(called, key=self._branch_bytes)]
                waiting += [(times * trips, name) for name in called]

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: what its condition compares its counter with, which begins at 0. A loop that data may
        end sooner is taken to run on to there."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        (condition,) = re.findall(r"condition=(%[\w.\-]+)", loop.attributes)
        lines = self.computations.get(condition, [])
        constants = {line.name: int(line.attributes) for line in lines if line.attributes.isdecimal()}
        bounds = [
            constants[operand]
            for line in lines
            if line.opcode == "compare" and "direction=LT" in line.attributes
            for operand in line.operands
            if operand in constants
        ]
        return min(bounds, default=1)

    def _traffic(self, instruction: Instruction) -> float:
        opcode = instruction.opcode
        if opcode in _NO_TRAFFIC or opcode.endswith("-done"):
            return 0.0
        if opcode == "fusion":
            return self._fusion_traffic(instruction)
        if opcode.endswith("-start"):
            return _memory_bytes(instruction.shape)
        if opcode in _SLICES:
            return 2 * _memory_bytes(instruction.shape)
        shapes = self._shapes(instruction)
        if opcode == "dynamic-update-slice":
            return 2 * _memory_bytes(shapes[1]) if len(shapes) > 1 else 0.0
        return _memory_bytes(instruction.shape) + sum(map(_memory_bytes, shapes))

    def _shapes(self, instruction: Instruction) -> list[str]:
        """Of the operands."""
        return [self._shape_of[operand] for operand in instruction.operands if operand in self._shape_of]

    def _fusion_traffic(self, fusion: Instruction) -> float:
        (name,) = _called(fusion)
        read = sum(
            min(self._read(name, place), _memory_bytes(shape)) for place, shape in enumerate(self._shapes(fusion))
        )
        return read + min(self._written(name), _memory_bytes(fusion.shape))

    def _read(self, name: str, place: int) -> float:
        """Bytes of a parameter that a fused computation reads: of an array that it slices, the slices."""
        body = self.computations.get(name, [])
        waiting = [line.name for line in body if line.opcode == "parameter" and line.attributes == str(place)]
        total = 0.0
        while waiting:
            array = waiting.pop()
            for line in (line for line in body if array in line.operands):
                first = line.operands[0] == array
                if line.opcode == "tuple" or line.name in self._carried_on or _ENDS in line.attributes:
                    continue  # handed on
                if line.opcode == "bitcast":
                    waiting.append(line.name)
                elif line.opcode in _SLICES and first:
                    total += _all_bytes(line.shape)
                elif line.opcode == "fusion":
                    (inner,) = _called(line)
                    total += sum(self._read(inner, at) for at, operand in enumerate(line.operands) if operand == array)
                elif not (line.opcode == "dynamic-update-slice" and first):
                    total += _all_bytes(self._shape_of[array])
        return total

    def _written(self, name: str) -> float:
        """Bytes that a fused computation writes: of an array that it updates in place, the update, and of what it does
        for a collective beside its own work, the result of one that it starts."""
        body = self.computations.get(name, [])
        if updates := [line.operands[1] for line in body if line.opcode == "dynamic-update-slice"]:
            return sum(_all_bytes(self._shape_of[update]) for update in updates)
        if not any(_OVERLAPPED in line.attributes for line in body):
            return math.inf
        handed_on = {line.name for line in body if line.opcode == "parameter"} | self._carried_on
        root = body[-1]
        if root.opcode == "tuple":
            return sum(_memory_bytes(self._shape_of[part]) for part in root.operands if part not in handed_on)
        started = [line for line in body if _OVERLAPPED in line.attributes and line.name not in self._carried_on]
        return sum(_memory_bytes(line.shape) for line in started)


def _parse(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, after = rest.partition("(")
    end = _closing(f"({after}", 0) - 1
    inside, attributes = after[:end], after[end + 1 :]
    operands = tuple(re.findall(r"%[\w.\-]+", inside))
    return Instruction(name, shape, opcode, operands, attributes if operands or not inside else inside)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at ``start`` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _called(instruction: Instruction) -> Iterator[str]:
    for names in _CALLED.findall(instruction.attributes):
        yield from re.findall(r"%[\w.\-]+", names)


def _all_bytes(shape: str) -> float:
    return sum(map(_array_bytes, _ARRAY.finditer(shape)))


def _memory_bytes(shape: str) -> float:
    """Of the arrays that lie in main memory; a layout with S(1) or higher is another one."""
    return sum(_array_bytes(array) for array in _ARRAY.finditer(shape) if "S(" not in (array[3] or ""))


def _array_bytes(array: re.Match) -> float:
    items = math.prod(int(size) for size in array[2].split(",") if size)
    return items * _ITEM_BITS.get(array[1], 8) / 8
