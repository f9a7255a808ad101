"""The output of a captioning run: lines that are written one by one and read on resume, and Parquet files."""

import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from tarsier_jax.errors import InputError, reason_of
from tarsier_jax.files import atomic_write, is_special
from tarsier_jax.processing.jsonl import to_json

_RESULTS = {"caption", "messages", "text", "error"}  # every line has one of them
_ROWS = 10_000  # of a Parquet file, in memory at once


def finished_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the complete lines of an earlier run, and truncates an incomplete last line of a killed run.

    Raises:
        InputError: the file is not the output of a run. It is not changed.
    """
    for _, content in _whole_lines(path):
        yield content


def remove_errors(path: Path) -> int:
    """Removes the error lines of an earlier run, atomically, and returns their number. Raises as `finished_lines`."""
    count = sum("error" in content for content in finished_lines(path))
    if count:
        with atomic_write(path) as partial, partial.open("wb") as file:
            file.writelines(line for line, content in _whole_lines(path) if "error" not in content)
    return count


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    if not path.exists() or is_special(path):
        return
    with path.open("r+b") as file:
        whole = 0
        for number, line in enumerate(file, 1):
            content = _parse(line)
            is_whole = line.endswith(b"\n")
            if not is_whole and (whole or (content is None and line.startswith(b'{"'))):
                break
            if not is_whole or not isinstance(content, dict) or not _is_ours(content):
                raise InputError(
                    f"{path} line {number} was not written by a captioning run, which cannot resume from it. Choose "
                    "another --output, or start again with --overwrite."
                )
            whole += len(line)
            yield line, content
        file.truncate(whole)


def _parse(line: bytes) -> Any:
    """Returns the value of a line; None for an incomplete line."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_ours(content: Mapping[str, Any]) -> bool:
    return "input" in content and not _RESULTS.isdisjoint(content)


class LineWriter:
    """Appends lines, each with one write. Raises OSError when the disk is full; earlier lines stay."""

    def __init__(self, path: Path, overwrite: bool = False):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("wb" if overwrite or is_special(path) else "ab", buffering=0)

    def write(self, line: Mapping[str, Any]) -> None:
        data = _encode(line) + b"\n"
        while data:  # a write may be partial when the disk is nearly full
            data = data[os.write(self._file.fileno(), data) :]

    def close(self) -> None:
        self._file.close()


def _encode(line: Mapping[str, Any]) -> bytes:
    try:
        return to_json(line).encode()
    except RecursionError as e:
        return to_json({**{key: line.get(key) for key in ("idx", "input")}, "error": reason_of(e)}).encode()


@dataclasses.dataclass
class Tally:
    """Counts of a run.

    Attributes:
        captions: Number of captions written.
        errors: Number of error lines written.
        tokens: Number of generated tokens.
        start: Start of the run, of `time.perf_counter`.
    """

    captions: int = 0
    errors: int = 0
    tokens: int = 0
    start: float = dataclasses.field(default_factory=time.perf_counter)

    def add(self, line: Mapping[str, Any]) -> None:
        self.errors += "error" in line
        self.captions += "error" not in line
        self.tokens += line.get("new_tokens", 0)

    def counted(self, lines: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yields the lines, and counts them."""
        for line in lines:
            self.add(line)
            yield line

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.start
        return (
            f"{self.captions} captions and {self.errors} errors in {seconds:.1f} s: "
            f"{self.captions / seconds:.2f} clips/s, {self.tokens / seconds:.0f} tokens/s"
        )


def write_lines(lines: Iterable[Mapping[str, Any]], total: int | None, path: Path, overwrite: bool = False) -> Tally:
    """Writes each line when it arrives, with a progress bar of `total` lines; None is an unknown number."""
    writer, tally = LineWriter(path, overwrite), Tally()
    with contextlib.closing(writer), tqdm(total=total, unit="clip", smoothing=0.1) as bar:
        for line in lines:
            writer.write(line)
            tally.add(line)
            rate = tally.tokens / (time.perf_counter() - tally.start)
            bar.set_postfix_str(f"{rate:.0f} tokens/s, {tally.errors} errors", refresh=False)
            bar.update()
    return tally


def lines_of(output: Path) -> Path:
    """Returns the file that receives the lines of an output: the output itself, or OUT.parquet.jsonl for OUT.parquet.

    Raises:
        InputError: a Parquet file without pyarrow.
    """
    if output.suffix.lower() != ".parquet":
        return output
    try:
        import pyarrow  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(f"Writing {output} needs pyarrow: pip install pyarrow.") from None
    return output.with_name(output.name + ".jsonl")


def write_parquet(lines: Path, output: Path) -> None:
    """Converts all lines to a Parquet file, atomically.

    Columns whose values are all numbers are int64 or float64, others strings; nested values are JSON. Lone surrogates,
    which Parquet cannot store, are written as escapes.
    """
    import pyarrow as pa  # pyright: ignore[reportMissingImports]
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]

    kinds: dict[str, set[type]] = {}
    for line in finished_lines(lines):
        for name, value in line.items():
            kinds.setdefault(name, set()).add(str if _is_large(value) else type(value))
    types = {(int,): pa.int64(), (float,): pa.float64(), (float, int): pa.float64()}
    schema = pa.schema(
        (name, types.get(tuple(sorted(seen_types - {type(None)}, key=str)), pa.string()))
        for name, seen_types in kinds.items()
    )
    with atomic_write(output) as partial, pq.ParquetWriter(partial, schema) as writer:
        for rows in _batches(finished_lines(lines)):
            columns = [pa.array([_cell(row.get(f.name), f.type) for row in rows], f.type) for f in schema]
            writer.write_table(pa.table(columns, schema))


def _batches(lines: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while batch := list(itertools.islice(lines, _ROWS)):
        yield batch


def _cell(value: Any, kind: Any) -> Any:
    if value is None or str(kind) != "string":
        return value
    text = value if isinstance(value, str) else to_json(value)
    return text.encode(errors="backslashreplace").decode()


def _is_large(value: Any) -> bool:
    """Whether a value is an integer that int64 cannot represent."""
    return isinstance(value, int) and not -(2**63) <= value < 2**63
