"""Lines that are written as they come, and read again when a run goes on."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tarsier_jax.errors import InputError


def finished_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a former run; what a killed one left unfinished at the end is cut off.

    Raises:
        InputError: the file holds something else.
    """
    if not path.exists():
        return
    with path.open("r+b") as file:
        whole = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                content = json.loads(line)
            except ValueError:
                raise InputError(
                    f"{path} line {number} is no JSON, so that the run cannot go on there. Choose another --output, or "
                    "begin anew with --overwrite."
                ) from None
            whole += len(line)
            yield content
        file.truncate(whole)


class LineWriter:
    """Appends lines, each with one write. Raises OSError when the disk is full; what is written by then stays."""

    def __init__(self, path: Path, overwrite: bool = False):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("wb" if overwrite else "ab", buffering=0)

    def write(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        while data:  # a write may take a part only, when the disk is nearly full
            data = data[os.write(self._file.fileno(), data) :]

    def close(self) -> None:
        self._file.close()
