"""The bytes that a compiled program reads from and writes to a chip's memory, and cycles, read from its text.

The compiler's own "bytes accessed" counts a stack of layers as a whole wherever a program reads one layer of it. Here
an instruction counts its operands and its result, except:

- slices: of an array that an instruction reads only in slices, or updates in place, the slices count;
- arrays that the compiler places in on-chip memory, such as a TPU's VMEM, count only when they are copied from or to
  the chip's memory.

The body of a loop counts once per iteration, and once if the number of iterations is not constant. Of a conditional,
the branch with the fewest bytes counts: for decoding, greedy sampling.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from train.transfers import array_bytes, loop_count, read_computations

_INSTRUCTION = re.compile(r" *(?P<root>ROOT )?(?P<name>%[\w.-]+) = (?P<rest>.*)")
_NAME = re.compile(r"%[\w.-]+")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.-]+))")
_ARRAY = re.compile(r"\w+\[[\d,]*\](?:\{[^}]*\})?")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply)=(%[\w.-]+)")
# These move no data.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"}
_VIEWS = {"bitcast", "copy", "convert"}  # within a fusion, whose values are computed where they are used
_SLICES = {"slice", "dynamic-slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that is written


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a program.

    Attributes:
        name: Its name, with "%".
        shape: Types, sizes and layouts of its result.
        opcode: The operation.
        operands: Names of its operands.
        line: The text.
        is_root: Whether its result is that of its computation.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    line: str
    is_root: bool


def _parse(line: str) -> Instruction | None:
    if not (match := _INSTRUCTION.match(line)):
        return None
    shape, rest = _split(match["rest"])
    opcode, parenthesis, rest = rest.strip().partition("(")
    operands, _ = _split(parenthesis + rest)
    return Instruction(match["name"], shape, opcode, tuple(_NAME.findall(operands)), line, bool(match["root"]))


def _split(text: str) -> tuple[str, str]:
    """Splits a text after its first element: the parentheses with which it starts, or the characters before a space."""
    if not text.startswith("("):
        head, _, tail = text.partition(" ")
        return head, tail
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    return text, ""


def _index(parameter: Instruction) -> int:
    return int(parameter.line.partition("parameter(")[2].partition(")")[0])


def _size(shape: str) -> int:
    """Returns the number of elements of an array."""
    return math.prod(int(n) for n in shape.partition("[")[2].partition("]")[0].split(",") if n)


def _read_bytes(shape: str, elements: float) -> int:
    """Returns the bytes of the chip's memory that reading some elements of an array moves."""
    size = hbm_bytes(shape)
    return size if elements >= _size(shape) else round(size * elements / _size(shape))


def hbm_bytes(shape: str) -> int:
    """Returns the bytes of those arrays of a shape that the compiler places in the chip's memory."""
    return sum(array_bytes(array) for array in _ARRAY.findall(shape) if "S(" not in array)


class Program:
    """The text of a compiled program."""

    def __init__(self, hlo: str):
        self._lines = read_computations(hlo)
        self._computations = {
            name: {i.name: i for line in lines if (i := _parse(line))} for name, lines in self._lines.items()
        }
        self.entry = list(self._computations)[-1]

    def traffic(self, computation: str) -> int:
        """Returns the bytes that a computation moves, once."""
        instructions = self._computations[computation]
        return sum(self._moved(i, instructions) for i in instructions.values())

    def loops(self) -> Iterator[str]:
        """Yields the bodies of the loops of the entry."""
        for i in self._computations[self.entry].values():
            if i.opcode == "while":
                yield loop_count(i.line, self._lines)[0]

    def cycles(self, computation: str) -> int:
        """Returns the cycles of a computation, once, as the compiler for TPUs estimates them.

        Collectives and Pallas kernels have no estimate.
        """
        total = 0
        for i in self._computations[computation].values():
            if i.opcode == "while":
                body, times = loop_count(i.line, self._lines)
                total += times * self.cycles(body)
            elif match := _CYCLES.search(i.line):
                total += int(match[1])
        return total

    def _moved(self, i: Instruction, others: dict[str, Instruction]) -> int:
        if i.opcode in _FREE or i.opcode.endswith("-done"):
            return 0
        if i.opcode == "while":
            body, times = loop_count(i.line, self._lines)
            return times * self.traffic(body)
        if i.opcode == "conditional":
            names = [name for group in _BRANCHES.findall(i.line) for text in group for name in _NAME.findall(text)]
            return min(self.traffic(name) for name in names)
        called = _CALLED.search(i.line)
        if i.opcode == "call" and called:
            return self.traffic(called[1])
        operands = [hbm_bytes(others[name].shape) if name in others else 0 for name in i.operands]
        if i.opcode in ("fusion", "async-start") and called:
            shapes = [others[name].shape for name in i.operands]
            read = sum(map(_read_bytes, shapes, self._reads(called[1])))
            return read + self._written(i, called[1])
        if i.opcode in ("copy-start", "slice-start"):
            # (result, operand, context), or ((operand), result, context)
            result = _ARRAY.findall(i.shape)[i.opcode == "slice-start"]
            return min(operands[0], array_bytes(result)) + hbm_bytes(result)
        if i.opcode in _SLICES:
            return min(operands[0], array_bytes(i.shape)) + hbm_bytes(i.shape)
        if i.opcode in _UPDATES:
            return 2 * operands[_UPDATES[i.opcode]]
        return sum(operands) + hbm_bytes(i.shape)

    def _reads(self, computation: str) -> list[float]:
        """Returns the number of elements that a fused computation reads of each parameter; infinity for all."""
        instructions = self._computations[computation].values()
        parameters = sorted((i for i in instructions if i.opcode == "parameter"), key=_index)
        return [self._read_of(i.name, computation) for i in parameters]

    def _read_of(self, name: str, computation: str) -> float:
        if self._root(computation).name == name:
            return math.inf
        total = 0.0
        for user in self._computations[computation].values():
            for at, operand in enumerate(user.operands):
                if operand == name:
                    total += self._read_by(user, at, computation)
        return total

    def _read_by(self, user: Instruction, at: int, computation: str) -> float:
        if user.opcode in _VIEWS:
            return self._read_of(user.name, computation)
        if user.opcode in _SLICES:
            return _size(user.shape) if at == 0 else math.inf
        if user.opcode in _UPDATES and at == 0:
            return 0
        if user.opcode == "fusion" and (called := _CALLED.search(user.line)):
            if self._viewed(called[1]) == at:
                return self._read_of(user.name, computation)
            return self._reads(called[1])[at]
        return math.inf

    def _viewed(self, computation: str) -> int | None:
        """Returns the index of the parameter that a fused computation returns as it is, or None."""
        i, instructions = self._root(computation), self._computations[computation]
        while i.opcode in _VIEWS:
            i = instructions[i.operands[0]]
        return _index(i) if i.opcode == "parameter" else None

    def _written(self, i: Instruction, computation: str) -> int:
        """Returns the bytes that a fusion writes: those of its result that are in the chip's memory."""
        if i.opcode == "async-start":
            return hbm_bytes(self._root(computation).shape)
        if not (size := hbm_bytes(i.shape)):
            return 0
        return min(size, sum(self._updated(x, computation) for x in self._results(computation)))

    def _root(self, computation: str) -> Instruction:
        return next(i for i in self._computations[computation].values() if i.is_root)

    def _results(self, computation: str) -> list[Instruction]:
        root, instructions = self._root(computation), self._computations[computation]
        return [instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]

    def _updated(self, i: Instruction, computation: str) -> int:
        """Returns the bytes of a result of a fused computation that are written; those of the update, if in place."""
        instructions = self._computations[computation]
        if i.opcode == "bitcast":
            return self._updated(instructions[i.operands[0]], computation)
        if i.opcode in _UPDATES:
            return array_bytes(instructions[i.operands[_UPDATES[i.opcode]]].shape)
        if i.opcode == "fusion" and (called := _CALLED.search(i.line)):
            return sum(self._updated(x, called[1]) for x in self._results(called[1]))
        return hbm_bytes(i.shape)
