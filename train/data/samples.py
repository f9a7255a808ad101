"""Chat samples of annotation lines (`prepare`), and the two samples of a DPO line (`split_preference`)."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tarsier_jax.errors import InputError
from tarsier_jax.processing.formats import is_conversation, normalize_sample
from tarsier_jax.processing.frame_sampling import allocate_frames
from tarsier_jax.processing.sample import read_messages
from train.data.pretraining_tasks import PRETRAINING_TASKS, Sample

Prepare = Callable[[Sample, np.random.Generator, int], dict[str, Any]]
_MAX_FRAMES = 256  # per sample, where its `fps` requires more
_PAIR = ("chosen", "rejected")
_TAG = re.compile(r"<frame:[^<>\n]*>?")
_RANGE = re.compile(r"<frame: ([0-9]+)(?:-([0-9]+))?>")


def prepare(sample: Sample, rng: np.random.Generator, n_frames: int = 16) -> dict[str, Any]:
    """Returns the chat sample of a line of annotations, which is not changed.

    A line with `messages`, or in another format that `normalize_sample` reads, is a chat already: its answers are
    checked, and an empty `text` is replaced by its `reference`. Other lines are converted by their task:
    object_tracking, multi_images or video_permutation (order of frames).

    Args:
        sample: The line.
        rng: Source of all random choices.
        n_frames: Frames per sample, as in the processor's options.

    Raises:
        InputError: the line is malformed or lacks an answer, its frame tags do not match the frames, or a file cannot
            be read.
    """
    if is_conversation(sample):
        return _chat(normalize_sample(sample), n_frames)
    task = "video_permutation" if sample.get("dataset") == "video_permutation" else str(sample.get("task"))
    if task not in PRETRAINING_TASKS:
        raise InputError(f"A line needs messages, or a task that is one of {', '.join(PRETRAINING_TASKS)}, not {task}.")
    return PRETRAINING_TASKS[task](sample, rng, n_frames)


def check_grounding(text: str, n: int) -> None:
    """Checks the tags `<frame: i>` and `<frame: i-j>` of an answer against its n frames.

    Frames count from 1. Tags must be in order and must not overlap.

    Raises:
        InputError: names the tag that is malformed, not among the frames, or not after the one before.
    """
    last = 0
    for tag in _TAG.findall(text):
        match = _RANGE.fullmatch(tag)
        if not match:
            raise InputError(f"{tag!r} is not a frame tag. Write <frame: 3> or <frame: 3-5>.")
        first, end = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= end <= n:
            raise InputError(f"{tag} does not match the {n} frames of the sample, which count from 1. Correct the tag.")
        if first <= last:
            raise InputError(
                f"{tag} does not come after frame {last} of the tag before (of {n} frames). Correct the tags."
            )
        last = end


def split_preference(sample: Sample) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the two samples of a DPO line: one with `chosen`, one with `rejected` as its last answer.

    Earlier answers may also have both texts; otherwise they are equal in the two samples.

    Raises:
        InputError: one of the texts is missing or empty, or the two do not differ.
    """
    sample = normalize_sample(sample)
    answers = _answers(sample)
    if not answers or all(answers[-1].get(key) is None for key in _PAIR):
        raise InputError('The last answer of a DPO line needs the texts "chosen" and "rejected", but has neither.')
    preferred, other = (_map_answers(sample, functools.partial(_take, key=key)) for key in _PAIR)
    if _trained(preferred) == _trained(other):
        raise InputError(
            '"chosen" and "rejected" are equal, or of a turn with "loss": false, so there is nothing to prefer. Leave '
            "the line out."
        )
    return preferred, other


def prepare_pair(sample: Sample, rng: np.random.Generator, n_frames: int = 16) -> list[dict[str, Any]]:
    """Returns the chosen and the rejected chat of a DPO line. Raises as `split_preference` and `prepare`."""
    return [prepare(half, rng, n_frames) for half in split_preference(sample)]


def _take(item: Sample, key: str) -> dict[str, Any]:
    if all(item.get(k) is None for k in _PAIR):
        return dict(item)
    text = item.get(key)
    if not isinstance(text, str) or not text.strip():
        raise InputError(
            f'The answer of a DPO line needs a text "{key}", not {text!r}. Correct it, or leave the line out.'
        )
    return {**{k: v for k, v in item.items() if k not in _PAIR}, "text": text}


def _trained(sample: Sample) -> list[Any]:
    return [m for m in sample["messages"] if not isinstance(m, Mapping) or m.get("loss") is not False]


def _answers(sample: Sample) -> list[Sample]:
    """Returns the text items of the assistant's turns."""
    items: list[Sample] = []

    def note(item: Sample) -> dict[str, Any]:
        items.append(item)
        return dict(item)

    _map_answers(sample, note)
    return items


def _map_answers(sample: Sample, change: Callable[[Sample], dict[str, Any]]) -> dict[str, Any]:
    """Returns the sample with `change` applied to the assistant's text items. Malformed parts stay as they are."""

    def changed(message: Any) -> Any:
        if not isinstance(message, Mapping) or message.get("role") != "assistant":
            return message
        content: Any = message.get("content")
        if isinstance(content, str):
            content = {"type": "text", "text": content}
        if _is_text(content):
            content = [content]
        if not isinstance(content, list | tuple):
            return message
        return {**message, "content": [change(item) if _is_text(item) else item for item in content]}

    messages = sample.get("messages")
    return {**sample, "messages": [changed(m) for m in messages] if isinstance(messages, list | tuple) else messages}


def _is_text(item: Any) -> bool:
    return isinstance(item, Mapping) and item.get("type") == "text"


def _chat(sample: Sample, n_frames: int) -> dict[str, Any]:
    messages = read_messages(_map_answers(sample, _fill_in))
    _check_loss(messages)
    answers = [
        "".join(item["text"] for item in message["content"] if item["type"] == "text")
        for message in messages
        if message["role"] == "assistant"
    ]
    if not any(answer.strip() for answer in answers):
        raise InputError('No turn of the assistant has a text, so there is nothing to train on. Fill in its "text".')
    for answer in answers:
        if _TAG.search(answer):
            check_grounding(answer, _frames_shown(messages, n_frames))
    return {**sample, "messages": messages}


def _check_loss(messages: Sequence[Sample]) -> None:
    for i, message in enumerate(messages):
        if message.get("loss") and message["role"] != "assistant":
            raise InputError(
                f'messages[{i}] is of the {message["role"]} and has "loss": true, but only turns of the assistant are '
                "trained on. Leave the loss out."
            )


def _fill_in(item: Sample) -> dict[str, Any]:
    text = item.get("text") or item.get("reference") or ""
    if not text and any(item.get(key) is not None for key in _PAIR):
        raise InputError('An answer has "chosen" and "rejected", but no "text". Train on it with DPO, or fill it in.')
    return {**item, "text": text}


def _frames_shown(messages: Sequence[Sample], n_frames: int) -> int:
    """Returns the number of frames of the sample's video, unless the clip has fewer."""
    items = [item for message in messages for item in message["content"] if item["type"] != "text"]
    videos = [item["video"] for item in items if item["type"] == "video"]
    if len(videos) != 1:
        raise InputError(f"An answer has frame tags, but the sample has {len(videos)} videos. Tags speak of one video.")
    return allocate_frames(videos, len(items) - 1, n_frames, max(n_frames, _MAX_FRAMES))[0]
