"""The transfers between chips in a compiled TPU program, read from its text."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_COLLECTIVE = re.compile(
    r"= (?P<shape>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\("
)
# {{0,1},{2,3}}, or [2,2]<=[4] for two groups of two, or mesh['a'=2,'b'=2] {'b'} for the devices along b.
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] ?\{([^}]*)\})")
# Between slices, the compiler replaces a collective with pairs of send and receive.
_BETWEEN_SLICES = re.compile(r'= \((?P<shape>\S+), .* recv\(.*_xla_megascale_transfer_type="(?P<kind>\w+)"')
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<sizes>[\d,]*)\]")
_CALL = re.compile(r"(?:calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%[\w.-]+)")
_LOOP = re.compile(r" while\(.*condition=(%[\w.-]+), body=(%[\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One place of a program that exchanges data.

    Attributes:
        kind: The collective operation.
        bytes: Bytes that a chip sends per run of the program, in all iterations of the loops around the place.
        between_slices: Whether the network of the data center carries it instead of the network of a slice.
    """

    kind: str
    bytes: int
    between_slices: bool = False


def read_transfers(hlo: str) -> list[Transfer]:
    """Returns the transfers of a program. A loop without a constant number of iterations counts once."""
    computations = read_computations(hlo)
    runs = _runs(computations)
    return [
        dataclasses.replace(transfer, bytes=transfer.bytes * runs[name])
        for name, lines in computations.items()
        for line in lines
        for transfer in _transfer(line, name)
    ]


def read_computations(hlo: str) -> dict[str, list[str]]:
    """Returns the lines of each computation. The last one is the entry."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?(%[\w.-]+) \(", line):
            lines = computations[header[1]] = []
        elif line.startswith("  "):
            lines.append(line)
    return computations


def _runs(computations: dict[str, list[str]]) -> dict[str, int]:
    """Returns how often each computation runs. A computation precedes those that call it."""
    runs = collections.Counter([list(computations)[-1]])
    for name in reversed(computations):
        for line in computations[name]:
            for called, times in _calls(line, computations):
                runs[called] += times * runs[name]
    return runs


def _calls(line: str, computations: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """Yields the computations that an instruction calls, and how often."""
    # An asynchronous collective is written in the fusion that starts it, in those that it runs beside, and in the last.
    if re.match(r" *%async-collective-done", line):
        return
    if _LOOP.search(line):
        yield loop_count(line, computations)
    for called in _CALL.findall(line):
        yield from ((name, 1) for name in re.findall(r"%[\w.-]+", called))


def loop_count(line: str, computations: dict[str, list[str]]) -> tuple[str, int]:
    """Returns the body of a loop and its number of iterations; 1 if that is not constant."""
    loop = _LOOP.search(line)
    assert loop is not None
    condition, body = loop.groups()
    bounds = re.findall(r" s32\[\].* constant\((\d+)\)", "\n".join(computations[condition]))
    return body, int(bounds[0]) if len(bounds) == 1 else 1


def _transfer(line: str, computation: str) -> Iterator[Transfer]:
    """Yields the transfer of an instruction, if it is one. Collectives within a slice send their data in a ring."""
    if "async_collective_fusion" in computation:
        return
    if match := _BETWEEN_SLICES.search(line):
        yield Transfer(match["kind"].lower().replace("_", "-"), array_bytes(match["shape"]), between_slices=True)
    if match := _COLLECTIVE.search(line):
        kind, shape, n = match["kind"], match["shape"], _group_size(line)
        if match["start"] and kind in ("all-gather", "collective-permute"):  # (operands, results, contexts)
            arrays = [array[0] for array in _ARRAY.finditer(shape) if array["sizes"]]
            shape = ", ".join(arrays[len(arrays) // 2 :])
        size = array_bytes(shape)
        if "all-reduce-scatter" in computation:  # a fusion that keeps one part of the sum
            kind, size = "reduce-scatter", size // n
        factors = {"all-gather": 1 / n, "all-reduce": 2 / n, "reduce-scatter": 1.0, "all-to-all": 1 / n}
        yield Transfer(kind, round(size * (n - 1) * factors[kind]) if kind in factors else size)


def _group_size(line: str) -> int:
    """Returns the number of chips that a collective connects; 2 if the line does not contain it."""
    if not (groups := _GROUPS.search(line)):
        return 2
    first, size, mesh, axes = groups.groups()
    if axes:
        sizes = dict(axis.split("=") for axis in mesh.split(","))
        return math.prod(int(sizes[axis]) for axis in axes.split(","))
    return int(size or first.count(",") + 1)


def array_bytes(shape: str) -> int:
    """Returns the bytes of the arrays of a shape such as "(bf16[2,128]{1,0}, f32[])"."""
    return sum(
        int(bits or 8) * math.prod(int(size) for size in sizes.split(",") if size) // 8
        for bits, sizes in _ARRAY.findall(shape)
    )
