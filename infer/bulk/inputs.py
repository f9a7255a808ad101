"""The items of a captioning run: media files, samples of archives, or lines of JSON or Parquet."""

import collections
import dataclasses
import glob
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tarsier_jax.errors import InputError
from tarsier_jax.files import is_remote
from tarsier_jax.processing.archives import find_archives, is_archive, open_archive
from tarsier_jax.processing.formats import is_conversation, normalize_sample
from tarsier_jax.processing.jsonl import parse_json, read_lines, to_json
from tarsier_jax.processing.media_types import ACCEPTED, kind_of_suffix
from tarsier_jax.processing.processor import media_sample
from tarsier_jax.processing.prompt_rows import is_prompt_row, with_prompt_answer
from tarsier_jax.processing.sample import MEDIA_KEYS
from tarsier_jax.processing.video import find_inputs, natural_key
from tarsier_jax.storage import list_files, local_copy, local_source

_LISTS = (".jsonl", ".json", ".parquet")
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
        start: Start of its window of the video in seconds; None for the whole clip.
        end: End of the window, which is not in it.
        last_frame: Time of the last frame in the window.
    """

    number: int
    idx: Any
    input: str
    line: Mapping[str, Any]
    problem: str = ""
    start: float | None = None
    end: float | None = None
    last_frame: float | None = None

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
        sample = media_sample(self.input, self.line.get("prompt") or prompt)
        if self.start is not None:
            sample["messages"][0]["content"][0]["video"] |= {"start_time": self.start, "end_time": self.last_frame}
        return sample


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


@dataclasses.dataclass(frozen=True)
class Items:
    """The items of a run, which are read again at each iteration and are not in memory at once.

    Attributes:
        read: Returns an iterator over them.
        total: Their number; None if it is unknown.
    """

    read: Callable[[], Iterator[Item]]
    total: int | None = None

    def __iter__(self) -> Iterator[Item]:
        return self.read()

    def part(self, limit: int | None, first: int, step: int) -> "Items":
        """Returns every `step`th of the first `limit` items, from number `first` on."""
        total = None if self.total is None else len(range(self.total)[:limit][first::step])
        return Items(lambda: itertools.islice(itertools.islice(self, limit), first, None, step), total)


def find_items(source: str) -> Items:
    """Returns the clips of --input: a file, a directory, a glob, an archive, or a list (.jsonl, .json, .parquet).

    A line of a list is an annotation, an object with "input" (and "prompt", "idx"), or a path.

    Raises:
        InputError: nothing matches, or a list or an archive cannot be read.
    """
    if is_remote(source):
        return _remote_items(source)
    path = Path(source)
    if is_list(source):
        return _list_items(path)
    matches = (
        [source] if os.path.exists(path) or not glob.has_magic(source) else sorted(glob.glob(source, recursive=True))
    )
    if not matches:
        raise InputError(f"Nothing matches {source}. Check the pattern, and put it in quotes.")
    archives = {match: _archives(match) for match in matches}
    media = [match for match in matches if not archives[match]]
    files = [*itertools.chain.from_iterable(archives.values()), *(find_media(media) if media else ())]
    if not any(map(is_archive, files)):
        return Items(lambda: _file_items(files), len(files))
    if len(files) == 1:
        open_archive(files[0])  # raises InputError, which is a line of the output where there are several archives
    items = Items(lambda: _file_items(files))
    if next(iter(items), None) is None:
        raise InputError(f"{source} contains no samples. Check --input.")
    return items


def _remote_items(url: str) -> Items:
    """Returns the clips of a URL of an object store. Lists and archives are copied to this machine, clips are not.

    Of several archives, each is copied when its samples are read.
    """
    if is_list(url) and not url.lower().endswith(".parquet"):
        return _list_items(local_copy(url), url)
    if is_archive(url) and not glob.has_magic(url):
        return find_items(str(local_copy(url)))
    files = list_files(url)
    urls = sorted(filter(kind_of_suffix, files), key=natural_key)
    if not urls and (archives := sorted(filter(is_archive, files))):
        return Items(lambda: _file_items(archives))
    if not urls:
        raise InputError(f"{url} matches no video, animation or image. {ACCEPTED}")
    return Items(lambda: (Item(i, i, name, {}) for i, name in enumerate(urls)), len(urls))


def _archives(source: str) -> list[Path]:
    """Returns the archives of a file, or of a directory without media files."""
    if os.path.isdir(source) and any(kind_of_suffix(p) for p in Path(source).rglob("*") if not p.name.startswith(".")):
        return []
    return find_archives(source)


def _file_items(files: Iterable[str | Path]) -> Iterator[Item]:
    numbers = itertools.count()
    for file in files:
        if is_archive(file):
            yield from _archive_items(str(file), numbers)
        else:
            number = next(numbers)
            yield Item(number, number, str(file), {})


def _archive_items(source: str, numbers: Iterator[int]) -> Iterator[Item]:
    try:
        path = local_source(source)
        for place, sample in open_archive(path).samples(path):
            yield _item(next(numbers), place, sample)
    except InputError as error:
        number = next(numbers)
        yield Item(number, number, source, {}, str(error))


def find_media(sources: Iterable[str]) -> list[str | Path]:
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


def _list_items(path: Path, name: str = "") -> Items:
    """Returns the lines of a list, after all of them have been read once. `name` replaces its path in their names.

    Raises:
        InputError: the list is empty or cannot be read.
    """
    if path.suffix.lower() == ".parquet":
        items = Items(lambda: _archive_items(str(path), itertools.count()), len(open_archive(path)))
    else:
        try:
            items = Items(lambda: _json_items(path, name or str(path)), sum(1 for _ in read_lines(path)))
        except OSError as e:
            raise InputError(f"The list {path} cannot be read ({e.strerror or e}). Check --input.") from None
    if not items.total:
        raise InputError(f"The list {path} is empty. Check --input.")
    return items


def _json_items(path: Path, name: str) -> Iterator[Item]:
    for number, line in enumerate(read_lines(path)):
        place = f"{name} line {number + 1}"
        try:
            yield _item(number, place, parse_json(line, place))
        except InputError as e:
            yield Item(number, number, place, {}, f"{e} Each line is an object or a path in quotes.")


def _item(number: int, place: str, line: Any) -> Item:
    if isinstance(line, InputError):
        return Item(number, number, place, {}, str(line))
    if isinstance(line, str):
        return Item(number, number, line, {"input": line})
    source = line.get("input") if isinstance(line, Mapping) else None
    if not isinstance(line, Mapping) or not (is_conversation(line) or is_prompt_row(line) or isinstance(source, str)):
        return Item(number, number, place, {}, f'{place} has neither "messages" nor "input". Add one of them.')
    idx = json.loads(to_json(line.get("idx")))  # as in the output
    return Item(number, number if idx is None else idx, source if isinstance(source, str) and source else place, line)
