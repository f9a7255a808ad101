"""Lines that are written as they come, and read again when a run goes on; and Parquet files made of them."""

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

_RESULTS = {"caption", "messages", "error"}  # one of which a line has
_ROWS = 10_000  # of a Parquet file, that are held at once


def finished_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a former run; what a killed one left unfinished at the end is cut off.

    Raises:
        InputError: the file is something else. It stays as it is.
    """
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
                    f"{path} line {number} is no line of a former run, so that the run cannot go on there. Choose "
                    "another --output, or begin anew with --overwrite."
                )
            whole += len(line)
            yield content
        file.truncate(whole)


def _parse(line: bytes) -> Any:
    """The value of a line; None for one that is cut short."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_ours(content: Mapping[str, Any]) -> bool:
    return "input" in content and not _RESULTS.isdisjoint(content)


class LineWriter:
    """Appends lines, each with one write. Raises OSError when the disk is full; what is written by then stays."""

    def __init__(self, path: Path, overwrite: bool = False):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("wb" if overwrite or is_special(path) else "ab", buffering=0)

    def write(self, line: Mapping[str, Any]) -> None:
        data = _encode(line) + b"\n"
        while data:  # a write may take a part only, when the disk is nearly full
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
    """What a run has written since it began: captions, errors, and the captions' tokens."""

    captions: int = 0
    errors: int = 0
    tokens: int = 0
    began: float = dataclasses.field(default_factory=time.perf_counter)

    def add(self, line: Mapping[str, Any]) -> None:
        self.errors += "error" in line
        self.captions += "error" not in line
        self.tokens += line.get("tokens", 0)

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.began
        return (
            f"{self.captions} captions and {self.errors} errors in {seconds:.1f} s: "
            f"{self.captions / seconds:.2f} clips/s, {self.tokens / seconds:.0f} tokens/s"
        )


def write_lines(lines: Iterable[Mapping[str, Any]], total: int, path: Path, overwrite: bool = False) -> Tally:
    """Writes each as it comes, and shows how far it is on the way to `total`."""
    writer, tally = LineWriter(path, overwrite), Tally()
    with contextlib.closing(writer), tqdm(total=total, unit="clip", smoothing=0.1) as bar:
        for line in lines:
            writer.write(line)
            tally.add(line)
            rate = tally.tokens / (time.perf_counter() - tally.began)
            bar.set_postfix_str(f"{rate:.0f} tokens/s, {tally.errors} errors", refresh=False)
            bar.update()
    return tally


def lines_of(output: Path) -> Path:
    """The file of lines behind an output: itself, or for OUT.parquet OUT.parquet.jsonl.

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
    """Makes a Parquet file of all lines; whole or not at all.

    Columns are int64 or float64 where all values are such numbers, else strings; what is nested is JSON. Half
    surrogates in names, which Parquet does not have, are written as escapes.
    """
    import pyarrow as pa  # pyright: ignore[reportMissingImports]
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]

    kinds: dict[str, set[type]] = {}
    for line in finished_lines(lines):
        for name, value in line.items():
            kinds.setdefault(name, set()).add(str if _is_large(value) else type(value))
    types = {(int,): pa.int64(), (float,): pa.float64(), (float, int): pa.float64()}
    schema = pa.schema(
        (name, types.get(tuple(sorted(found - {type(None)}, key=str)), pa.string())) for name, found in kinds.items()
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
