"""What a run captions: media files, or lines of JSON or Parquet, each known by an index."""

import dataclasses
import glob
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tarsier_jax.errors import InputError
from tarsier_jax.processing.processor import media_sample
from tarsier_jax.processing.video import find_inputs

_LISTS = (".jsonl", ".parquet")
_NESTED = ("messages", "extra_info", "image_processing_config")  # columns that may hold JSON


@dataclasses.dataclass(frozen=True)
class Item:
    """One clip to caption.

    number: its place in the list.  idx: of the line itself, else the number.  input: the file's name, or where the
    line stands.  line: what the list says about it; empty for a file.
    """

    number: int
    idx: Any
    input: str
    line: Mapping[str, Any]

    @property
    def is_annotation(self) -> bool:
        return "messages" in self.line

    def sample(self, prompt: str) -> dict[str, Any]:
        """The question, without the answer that an annotation may hold.

        Raises:
            InputError: the line is no use, or the file's name has no accepted ending.
        """
        if "error" in self.line:
            raise InputError(self.line["error"])
        if self.is_annotation:
            return open_answer(self.line)
        return media_sample(self.input, self.line.get("prompt") or prompt)


def open_answer(line: Mapping[str, Any]) -> dict[str, Any]:
    """An annotation whose answer is still to be given.

    What the last turn says, if it is the assistant's, is kept as its reference, as the benchmarks have it. A turn with
    a reference keeps its text: the answer begins with that.
    """
    messages = line.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], Mapping):
        return dict(line)
    last = messages[-1]
    content = last.get("content")
    if last.get("role") != "assistant":
        return dict(line)
    items = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
    if items and "reference" not in items[-1]:
        items[-1] = {**items[-1], "text": "", "reference": items[-1].get("text", "")}
    return {**line, "messages": [*messages[:-1], {**last, "content": items}]}


def with_prediction(line: Mapping[str, Any], caption: str) -> dict[str, Any]:
    """The annotation with the prediction as the text of its last turn, beside the reference."""
    opened = open_answer(line)
    messages = list(opened["messages"])
    if messages[-1].get("role") != "assistant":
        messages.append({"role": "assistant", "content": [{"type": "text", "text": ""}]})
    content = list(messages[-1]["content"]) or [{"type": "text"}]
    messages[-1] = {**messages[-1], "content": [*content[:-1], {**content[-1], "text": caption}]}
    return {**opened, "messages": messages}


def find_items(source: str) -> list[Item]:
    """The clips that --input stands for: a file, a directory, a glob, or a list (.jsonl, .parquet).

    A line of a list is an annotation, an object with "input" (and "prompt", "idx"), or just a path.

    Raises:
        InputError: there is nothing there, or a list cannot be read.
    """
    path = Path(source)
    if is_list(source):
        return list(_read_list(path))
    paths = find_inputs(source) if path.exists() or not glob.has_magic(source) else _globbed(source)
    return [Item(i, i, str(file), {}) for i, file in enumerate(paths)]


def is_list(source: str) -> bool:
    return Path(source).suffix.lower() in _LISTS and not Path(source).is_dir()


def _globbed(pattern: str) -> list[Path]:
    found = [file for match in sorted(glob.glob(pattern, recursive=True)) for file in find_inputs(match)]
    if not found:
        raise InputError(f"Nothing matches {pattern}. Check the pattern, and put it in quotes.")
    return found


def _read_list(path: Path) -> Iterator[Item]:
    try:
        lines = _parquet_rows(path) if path.suffix.lower() == ".parquet" else _lines(path)
        number = -1
        for number, line in enumerate(lines):
            yield _item(path, number, line)
    except OSError as e:
        raise InputError(f"The list {path} cannot be read ({e.strerror}). Check --input.") from None
    if number < 0:
        raise InputError(f"The list {path} holds no lines. Check --input.")


def _lines(path: Path) -> Iterator[str]:
    with path.open(errors="replace") as file:
        yield from (line for line in file if line.strip())


def _item(path: Path, number: int, line: Any) -> Item:
    place = f"{path} line {number + 1}"
    if isinstance(line, str):
        try:
            line = json.loads(line)
        except ValueError:
            line = {"error": f"{place} is no JSON. Each line is an object or a path in quotes."}
            return Item(number, number, place, line)
    if isinstance(line, str):
        return Item(number, number, line, {"input": line})
    if not isinstance(line, Mapping) or not ("messages" in line or isinstance(line.get("input"), str)):
        line = {"error": f'{place} has neither "messages" nor "input". Give one of them.'}
        return Item(number, number, place, line)
    return Item(number, line.get("idx", number), line.get("input") or place, line)


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(f"Reading {path} needs pyarrow: pip install pyarrow.") from None
    for batch in parquet.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            # Columns of other lines are empty in this one.
            yield {k: _unpacked(k, v) for k, v in row.items() if v is not None}


def _unpacked(name: str, value: Any) -> Any:
    return json.loads(value) if name in _NESTED and isinstance(value, str) else value
