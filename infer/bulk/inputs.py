"""The items of a captioning run: media files, or lines of JSON or Parquet."""

import collections
import dataclasses
import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tarsier_jax.errors import InputError
from tarsier_jax.processing.formats import is_conversation, normalize_sample
from tarsier_jax.processing.jsonl import parse_json, read_lines, to_json
from tarsier_jax.processing.processor import media_sample
from tarsier_jax.processing.prompt_rows import is_prompt_row, with_prompt_answer
from tarsier_jax.processing.sample import MEDIA_KEYS
from tarsier_jax.processing.video import ACCEPTED, find_inputs

_LISTS = (".jsonl", ".json", ".parquet")
_NESTED = ("messages", "conversations", "extra_info", "image_processing_config")  # columns that may contain JSON
# Keys that name further media, or say how to show one, which only an annotation can.
_MEDIA = ("videos", "images", "video", "image", "audio", "audios")
_ANNOTATION_KEYS = (*_MEDIA, *MEDIA_KEYS, "video_start", "video_end", "nframes", "max_pixels", "min_pixels")


@dataclasses.dataclass(frozen=True)
class Item:
    """One clip to caption.

    Attributes:
        number: Position in the list.
        idx: "idx" of the line; the number if the line has none.
        input: Name of the file, or file and number of the line.
        line: Content of the line; empty for a file.
        problem: Reason why the line cannot be used; empty for a usable line.
    """

    number: int
    idx: Any
    input: str
    line: Mapping[str, Any]
    problem: str = ""

    @property
    def is_annotation(self) -> bool:
        return is_conversation(self.line) or is_prompt_row(self.line)

    def sample(self, prompt: str) -> dict[str, Any]:
        """Returns the sample without the answer of an annotation.

        Raises:
            InputError: the line cannot be used, or the suffix of the file is not accepted.
        """
        if self.problem:
            raise InputError(self.problem)
        if is_prompt_row(self.line):
            return dict(self.line)
        if self.is_annotation:
            return open_answer(self.line)
        for key in _ANNOTATION_KEYS:
            if self.line.get(key) is not None:
                raise InputError(f'"{key}" beside "input" is not read. Write the line as an annotation, with messages.')
        return media_sample(self.input, self.line.get("prompt") or prompt)


def open_answer(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an annotation, in the annotation format, with an empty last answer.

    If the last turn is the assistant's, its text becomes its reference, as in the benchmarks. A turn that already has
    a reference keeps its text: it is the prefill of the answer.

    Raises:
        InputError: see `normalize_sample`.
    """
    line = dict(normalize_sample(line))
    messages = line["messages"]
    if not isinstance(messages, list | tuple) or not messages or not isinstance(messages[-1], Mapping):
        return line
    last = messages[-1]
    content = last.get("content")
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if last.get("role") != "assistant" or not isinstance(items, list) or not all(isinstance(x, Mapping) for x in items):
        return line
    if items and not any("reference" in item for item in items):
        texts = [item.get("text") or "" for item in items]
        items = [{**items[-1], "type": "text", "text": "", "reference": "".join(map(str, texts))}]
    return {**line, "messages": [*messages[:-1], {**last, "content": items}]}


def with_prediction(line: Mapping[str, Any], caption: str) -> dict[str, Any]:
    """Returns the annotation with the caption as the text of its last turn, beside the reference.

    In a row with `text`, the caption is the `prediction` beside the response.
    """
    return with_answer(line if is_prompt_row(line) else open_answer(line), caption)


def with_answer(row: Mapping[str, Any], answer: str) -> dict[str, Any]:
    """Returns a row of the original, in one of its two formats, with an answer as in the original's predictions."""
    if is_prompt_row(row):
        return with_prompt_answer(row, answer)
    messages = list(row["messages"])
    if messages[-1].get("role") != "assistant":
        messages.append({"role": "assistant", "content": [{"type": "text", "text": ""}]})
    content = list(messages[-1]["content"]) or [{"type": "text"}]
    messages[-1] = {**messages[-1], "content": [*content[:-1], {**content[-1], "text": answer}]}
    return {**row, "messages": messages}


def find_items(source: str) -> list[Item]:
    """Returns the clips of --input: a file, a directory, a glob, or a list (.jsonl, .json, .parquet).

    A line of a list is an annotation, an object with "input" (and "prompt", "idx"), or a path.

    Raises:
        InputError: nothing matches, or a list cannot be read.
    """
    path = Path(source)
    if is_list(source):
        return list(_read_list(path))
    matches = (
        [source] if os.path.exists(path) or not glob.has_magic(source) else sorted(glob.glob(source, recursive=True))
    )
    paths = find_media(matches)
    if not paths:
        raise InputError(f"Nothing matches {source}. Check the pattern, and put it in quotes.")
    return [Item(i, i, str(file), {}) for i, file in enumerate(paths)]


def find_media(sources: Iterable[str]) -> list[Path]:
    """Returns the media files of paths and directories. Prints the number of skipped files by suffix to stderr.

    Raises:
        InputError: see `find_inputs`.
    """
    num_skipped = collections.Counter[str]()
    try:
        return [file for source in sources for file in find_inputs(source, num_skipped)]
    finally:
        if num_skipped:
            endings = ", ".join(f"{ending} {count}" for ending, count in num_skipped.most_common())
            message = f"skipped {num_skipped.total()} files whose endings are not read: {endings}. {ACCEPTED}"
            print(message, file=sys.stderr, flush=True)


def is_list(source: str) -> bool:
    return Path(source).suffix.lower() in _LISTS and not os.path.isdir(source)


def _read_list(path: Path) -> Iterator[Item]:
    try:
        lines = _parquet_rows(path) if path.suffix.lower() == ".parquet" else read_lines(path)
        number = -1
        for number, line in enumerate(lines):
            yield _item(path, number, line)
    except OSError as e:
        raise InputError(f"The list {path} cannot be read ({e.strerror or e}). Check --input.") from None
    if number < 0:
        raise InputError(f"The list {path} is empty. Check --input.")


def _item(path: Path, number: int, line: Any) -> Item:
    place = f"{path} line {number + 1}"
    try:
        line = _unpacked(line, place) if isinstance(line, Mapping) else parse_json(line, place)
    except InputError as e:
        return Item(number, number, place, {}, f"{e} Each line is an object or a path in quotes.")
    if isinstance(line, str):
        return Item(number, number, line, {"input": line})
    source = line.get("input") if isinstance(line, Mapping) else None
    if not isinstance(line, Mapping) or not (is_conversation(line) or is_prompt_row(line) or isinstance(source, str)):
        return Item(number, number, place, {}, f'{place} has neither "messages" nor "input". Add one of them.')
    idx = json.loads(to_json(line.get("idx")))  # as in the output
    return Item(number, number if idx is None else idx, source if isinstance(source, str) and source else place, line)


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow as pa  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(f"Reading {path} needs pyarrow: pip install pyarrow.") from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                # Columns of other lines are empty in this one.
                yield {k: v for k, v in row.items() if v is not None}
    except (pa.ArrowException, UnicodeDecodeError) as e:
        raise InputError(f"The list {path} is not a readable Parquet file ({e}). Check --input.") from None


def _unpacked(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Returns a row of a Parquet file with JSON columns parsed."""
    return {k: parse_json(v, f"{place}, {k},") if k in _NESTED and isinstance(v, str) else v for k, v in row.items()}
