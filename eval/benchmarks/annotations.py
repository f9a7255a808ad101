"""Annotations of the original in its two row formats, and the messages that a model receives for a row.

A row with `messages` is in the annotation format, with the expected answer as the `reference` of the last text. A row
with `text` has a prompt such as "USER: <video> Why? ASSISTANT: Answer: (": a user's turn and the beginning of the
answer.
"""

import collections
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eval.benchmarks.benchmark import Benchmark
from eval.predictions import AnnotatedSample, Prediction, RowFormat, prediction_at, read_rows
from tarsier_jax.errors import InputError
from tarsier_jax.files import warn
from tarsier_jax.processing.prompt_rows import messages_of_prompt
from tarsier_jax.storage import local_source


def load_annotations(
    benchmark: Benchmark, directory: str | Path | None, limit: int | None = None
) -> list[AnnotatedSample]:
    """Returns the samples of a benchmark, which have references and no answers.

    Args:
        benchmark: The benchmark.
        directory: Directory with the annotation file, or its URL. A benchmark that generates its samples ignores it.
        limit: Only samples of the first `limit` videos.

    Raises:
        InputError: there is no such file, or a row is damaged, repeated, or of another benchmark.
    """
    if callable(benchmark.annotations):
        rows = benchmark.annotations()
    elif directory is None:
        raise InputError(f"{benchmark.name} needs {benchmark.annotations}. Pass its directory as --annotations.")
    else:
        rows = _read_file(benchmark, Path(local_source(os.path.join(directory, benchmark.annotations))))
    return first_videos(rows, limit)


def first_videos(rows: Iterable[AnnotatedSample], limit: int | None) -> list[AnnotatedSample]:
    """Returns the rows of the first `limit` videos; all rows if `limit` is None."""
    rows = list(rows)
    videos = [Prediction.of(row).vid for row in rows]
    selection = set(list(dict.fromkeys(videos))[:limit])
    return [row for row, video in zip(rows, videos, strict=True) if video in selection]


def messages_of(benchmark: Benchmark, row: AnnotatedSample, keep_prompt: bool = False) -> list[dict[str, Any]]:
    """Returns the messages of a row in the annotation format, without its answer.

    The last message is the assistant's; its text is the prefill. A row without a prompt or a prefill receives that of
    the benchmark. With `keep_prompt`, the prompt of a row with `text` is the only message (see `messages_of_prompt`).
    """
    if "text" in row:
        messages = messages_of_prompt(row, keep_prompt)
        if keep_prompt:
            return messages
    else:
        messages = [_open_turn(message) for message in row["messages"]]
    if messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": [_text("")]})
    *_, user = (message for message in messages if message["role"] == "user")
    for message, default in ((user, benchmark.prompt), (messages[-1], benchmark.prefill)):
        if default and not any(item.get("text") for item in message["content"]):
            message["content"].append(_text(default))
    return messages


def videos_of(messages: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the objects of the video items of messages, such as {"video_file": "a.mp4"}."""
    return [item["video"] for message in messages for item in message["content"] if item["type"] == "video"]


def with_videos(
    messages: Iterable[Mapping[str, Any]], videos: Iterable[Mapping[str, Any] | None]
) -> list[dict[str, Any]]:
    """Returns the messages with other objects in their video items. None removes an item."""
    objects = iter(videos)

    def replace(item: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if item["type"] != "video":
            return item
        video = next(objects)
        return None if video is None else {**item, "video": video}

    def replace_all(items: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [item for item in map(replace, items) if item is not None]

    return [{**message, "content": replace_all(message["content"])} for message in messages]


def video_files_of(row: AnnotatedSample) -> list[Any]:
    """Returns the path of each video of a row, or the list of its frames' paths; None or PLACEHOLDER without one."""
    if "text" in row:
        return [row.get("video_file")]
    return [video.get("video_file") for video in videos_of(row["messages"])]


def with_video_files(row: AnnotatedSample, files: Iterable[str | list[str]]) -> dict[str, Any]:
    """Returns a row with other paths of its videos."""
    if "text" in row:
        (file,) = files
        return {**row, "video_file": file}
    videos = zip(videos_of(row["messages"]), files, strict=True)
    return {**row, "messages": with_videos(row["messages"], ({**video, "video_file": file} for video, file in videos))}


def _open_turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message without expected answers, and without the keys that a row leaves empty."""
    content = []
    for item in message["content"]:
        fields = {key: value for key, value in item.items() if value is not None and key != "reference"}
        content.append(_text("") if item.get("reference") else fields)
    return {**message, "content": content}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _read_file(benchmark: Benchmark, path: Path) -> list[AnnotatedSample]:
    try:
        rows = list(read_rows(path))
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist. Pass the directory with the annotation files as --annotations; "
            "docs/evaluation.md says where to find them."
        ) from None
    places: dict[str, str] = {}
    formats: dict[RowFormat, str] = {}
    for place, row in rows:
        prediction = prediction_at(place, row)
        if (name := str(prediction.dataset).split("/")[0]) != benchmark.dataset:
            raise InputError(
                f"{place} is a row of {name}, not of {benchmark.dataset}. Use the file of {benchmark.name}."
            )
        if (other := places.setdefault(prediction.key, place)) != place:
            raise InputError(f"{place} repeats idx {row['idx']} of {row['dataset']}, which {other} has. Remove one.")
        formats.setdefault(prediction.row_format, place)
    if not rows:
        raise InputError(f"{path} is empty. Copy the file again.")
    if len(formats) > 1:
        raise InputError(f"{' and '.join(formats.values())} have different formats. Use rows of one format.")
    _check_counts(benchmark, path, collections.Counter(row["dataset"] for _, row in rows))
    return [row for _, row in rows]


def _check_counts(benchmark: Benchmark, path: Path, counts: Mapping[str, int]) -> None:
    """Warns of subsets that have fewer rows than in the benchmark."""
    expected = benchmark.expected_counts(counts.keys())
    few = [
        f"{counts.get(name, 0)} of {total} in {name}" for name, total in expected.items() if counts.get(name, 0) < total
    ]
    if few:
        warn(f"{path} lacks samples of the benchmark, so the scores differ. It has {', '.join(few)}.")
