"""Converts samples in the formats of other projects into the annotation format.

ms-swift, LLaMA-Factory and TRL have placeholders in texts and lists of files beside the messages. ShareGPT and LLaVA
have `conversations`. Qwen and transformers have a path where the annotation format has an object.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tarsier_jax.errors import InputError

_ROLES = {"human": "user", "gpt": "assistant"}
_MEDIA = ("video", "image")
_LISTS = ("video", "videos", "image", "images")
_SOURCES = ("video_file", "image_file", "frames")
_SOUNDS = ("audio", "audios")
# Keys that name a medium in other places; beside messages they are an error.
_LOOSE = (
    *("video_file", "image_file", "video_path", "image_path", "video_url", "image_url", "frames", "media"),
    *("video_paths", "image_paths", "video_list", "image_list"),
)
# Keys of an item that choose frames or sizes; beside a list of files they are an error.
_CHOICES = (
    *("video_start", "video_end", "start_time", "end_time", "start_frame", "end_frame", "fps", "nframes"),
    *("frame_indices", "time_indices", "max_pixels", "min_pixels", "total_pixels"),
)
_ALIASES = {"video_start": "start_time", "video_end": "end_time"}
_PIXELS = ("max_pixels", "min_pixels")
_URLS = {"video_url": "video", "image_url": "image"}
_REMEDY = (
    'Videos and images beside the messages are "videos" and "images", each a path or an object with the keys of an '
    "item; sounds are not supported."
)
# Keys of an item of the annotation format that do not describe its image or video.
_ITEM_KEYS = ("type", "text", "reference", "chosen", "rejected", "num_vision_tokens")
# A line break around a placeholder separates it from the text; the prompts that the models were trained on have none.
_PLACEHOLDER = re.compile(r"\n?<(video|image)>\n?")


def is_conversation(sample: Any) -> bool:
    """Returns whether a sample has messages, in any of the formats."""
    if not isinstance(sample, Mapping):
        return False
    preference = isinstance(sample.get("prompt"), list) and sample.get("input") is None
    return preference or any(sample.get(key) is not None for key in ("messages", "conversations"))


def normalize_sample(sample: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the sample in the annotation format, which `read_messages` checks, or the sample itself without messages.

    Images and videos in lists such as `videos` replace `<video>` and `<image>` in the user's texts, and items without
    a file. Without such places, they are inserted before the text of the user's first message. Without such lists,
    placeholders in a message that has items with files are plain text; with `"placeholders": false`, all of them are.

    Raises:
        InputError: a medium lacks a place, a place lacks a medium, or a key is in a place where it is not read.
    """
    if not is_conversation(sample):
        return sample
    sample = _with_messages(sample)
    if not isinstance(sample["messages"], list | tuple) or not sample["messages"]:
        return sample
    sample = _with_preference(sample)
    turns = [_read_turn(message, f"messages[{i}]") for i, message in enumerate(sample["messages"])]
    if sample.get("placeholders") is not False:
        turns = _with_all_places(turns, is_listed=any(_has(sample, key) for key in _LISTS))
    messages = _fill(turns, {kind: _listed(sample, kind) for kind in _MEDIA}, _name(sample))
    visuals = list(_visuals(messages))
    listed = any(_has(sample, key) for key in _LISTS)
    unread = (*_SOUNDS, *(() if visuals else _LOOSE), *(_CHOICES if listed else ()))
    unread = [key for key in unread if _has(sample, key)]
    if unread:
        raise InputError(f'{_name(sample)} has "{unread[0]}" beside its messages, which is not read. {_REMEDY}')
    others = {key: value for key, value in sample.items() if key not in _LISTS}
    config = _pixel_limits(visuals, sample.get("image_processing_config"))
    return {**others, "messages": messages, **({"image_processing_config": config} if config else {})}


def _has(value: Mapping[str, Any], key: str) -> bool:
    v = value.get(key)
    return v is not None and not (isinstance(v, str | list | tuple | Mapping) and not v)


def _name(sample: Mapping[str, Any]) -> str:
    identifier = _first(sample, "id", "idx")
    return "The sample" if identifier is None else f"The sample {identifier!r:.100}"


def _with_messages(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sample with its conversation as `messages`, including a system prompt beside it."""
    keys = [key for key in ("messages", "conversations") if sample.get(key) is not None] or ["prompt"]
    if len(keys) > 1:
        raise InputError(f"{_name(sample)} has both messages and conversations. Keep one of them.")
    messages, system = sample[keys[0]], sample.get("system")
    others = {key: value for key, value in sample.items() if key not in ("messages", "conversations", keys[0])}
    if isinstance(system, str) and system and isinstance(messages, list | tuple):
        messages = [{"role": "system", "content": system}, *messages]
        del others["system"]
    return {**others, "messages": messages}


def _with_preference(sample: dict[str, Any]) -> dict[str, Any]:
    """Moves two answers, in `rejected_response` or in `chosen` and `rejected`, into the last message of the sample."""
    for key in ("rejected_messages", "rejected_images", "rejected_videos"):
        if _has(sample, key):
            raise InputError(f'{_name(sample)} has "{key}". Pass only the rejected answer, as "rejected_response".')
    messages, text, origin = list(sample["messages"]), "", sample.get("chosen")
    if sample.get("rejected_response") is not None:
        origin = last = messages.pop()
        text = _answer_text(last) if _role(last) == "assistant" else None
        pair = {"chosen": text, "rejected": sample["rejected_response"]}
    elif sample.get("chosen") is not None and sample.get("rejected") is not None:
        pair = {key: _answer_text(sample[key]) for key in ("chosen", "rejected")}
    else:
        return sample
    if not all(isinstance(answer, str) for answer in pair.values()) or not messages or _role(messages[-1]) != "user":
        raise InputError(
            f"{_name(sample)} has preferences that are not two answers to its last question. Pass the messages up to "
            'the question, and "chosen" and "rejected" as one text or one message each; or all messages, and '
            '"rejected_response" as one text.'
        )
    masks = {key: origin[key] for key in ("loss", "train", "weight") if isinstance(origin, Mapping) and key in origin}
    answer = {**masks, "role": "assistant", "content": [{"type": "text", "text": text, **pair}]}
    others = {key: value for key, value in sample.items() if key not in ("chosen", "rejected", "rejected_response")}
    return {**others, "messages": [*messages, answer]}


def _answer_text(answer: Any) -> Any:
    """Returns the text of an answer, which is a text, a message, or a list of one message."""
    if isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, Mapping):
        answer = _first(answer, "text", "content", "value")
        return _answer_text(answer) if isinstance(answer, list | tuple) else answer
    return answer


def _first(value: Mapping[str, Any], *keys: str) -> Any:
    """Returns the first value that is not None. Arrow stores all keys for every message of a file, many with None."""
    return next((value[key] for key in keys if value.get(key) is not None), None)


def _role(message: Any) -> Any:
    role = _first(message, "role", "from") if isinstance(message, Mapping) else None
    return _ROLES.get(role, role) if isinstance(role, str) else role


def _read_turn(message: Any, where: str) -> Any:
    """Returns a message with the keys of the annotation format. `read_messages` rejects values of other types."""
    if not isinstance(message, Mapping):
        return message
    for key in (*_LISTS, *_SOUNDS, *_LOOSE):
        if _has(message, key):
            raise InputError(f'{where} has "{key}" beside its content, which is not read. {_REMEDY}')
    content = _first(message, "content", "value")
    if isinstance(content, Mapping):
        content = [content]
    if isinstance(content, list | tuple):
        content = [_read_item(item, f"{where}.content[{i}]") for i, item in enumerate(content)]
    others = {key: value for key, value in message.items() if key not in ("from", "value", "train", "weight")}
    turn = {**others, "role": _role(message), "content": content}
    loss = _first(message, "train", "weight")
    if loss is not None and turn.get("loss") is None:
        turn["loss"] = bool(loss) if loss in (0, 1) else loss
    return turn


def _read_item(item: Any, where: str) -> Any:
    """Returns an item with its image or video as an object, which is empty if the item does not name a file."""
    if not isinstance(item, Mapping) or not isinstance(item.get("type"), str):
        return item
    kind = _URLS.get(item["type"], item["type"])
    if kind not in _MEDIA:
        media = [key for key in (*_MEDIA, *_LOOSE) if _has(item, key)]
        if kind == "text" and media:
            raise InputError(f'{where} has the type text and also "{media[0]}". Split it into two items.')
        return item
    if _has(item, "text"):
        raise InputError(f"{where} has the type {item['type']} and also a text. Split it into two items.")
    options = {key: value for key, value in item.items() if value is not None and key not in _ITEM_KEYS}
    value = options.pop(item["type"], None)
    if not isinstance(value, Mapping):
        value = {} if value is None else _source(value, kind)
    others = {key: v for key, v in item.items() if key in _ITEM_KEYS}
    return {**others, "type": kind, kind: _rename([*value.items(), *options.items()], kind, where)}


def _source(value: Any, kind: str) -> dict[str, Any]:
    """Returns the object for a bare source: a path or a URL, pictures in memory, or a list of frames."""
    if isinstance(value, str | Path):
        return {f"{kind}_file": value}
    return {"frames": value}


def _rename(pairs: Iterable[tuple[str, Any]], kind: str, where: str) -> dict[str, Any]:
    """Returns the object of an image or video with the keys of the annotation format."""
    keys: dict[str, Any] = {}
    for key, value in pairs:
        name = f"{kind}_file" if key in ("path", "url") else _ALIASES.get(key, key)
        if value is not None and keys.get(name) is not None:
            raise InputError(f'{where} has "{name}" twice, the second time as "{key}". Keep one of them.')
        if value is not None or name not in keys:
            keys[name] = _path(value) if name in _SOURCES else value
    return keys


def _path(source: Any) -> Any:
    """Returns the source with file:// URLs as paths."""
    if isinstance(source, list | tuple):
        return [_path(frame) for frame in source]
    return source.removeprefix("file://") if isinstance(source, str) else source


def _listed(sample: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """Returns the objects of the images or videos that are named beside the messages, in a list or singly."""
    keys = [key for key in (kind, f"{kind}s") if _has(sample, key)]
    if len(keys) > 1:
        raise InputError(f'{_name(sample)} has both "{kind}" and "{kind}s". Keep one of them.')
    values = sample[keys[0]] if keys else []
    values = values if isinstance(values, list | tuple) else [values]
    items = [{**value, "type": kind} if isinstance(value, Mapping) else {"type": kind, kind: value} for value in values]
    return [_read_item(item, f"{keys[0]}[{i}]")[kind] for i, item in enumerate(items)]


def _visuals(messages: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Yields the items with images and videos."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for item in content if isinstance(content, list) else ():
            if isinstance(item, dict) and item.get("type") in _MEDIA:
                yield item


def _fill(messages: list[Any], files: Mapping[str, list[dict[str, Any]]], name: str) -> list[Any]:
    """Returns the messages with the listed images and videos in their places, in order.

    Raises:
        InputError: there are more or fewer places than files.
    """
    visuals = list(_visuals(messages))
    for kind, listed in files.items():
        places = [item for item in visuals if item["type"] == kind and not item[kind]]
        own = [item[kind] for item in visuals if item["type"] == kind and item[kind]]
        if len(places) == len(listed):
            for item, value in zip(places, listed, strict=True):
                item[kind] = value
        elif not places and not own:
            messages = _put_first([{"type": kind, kind: value} for value in listed], messages, name)
        elif places or not _are_same(listed, own, f"{kind}_file"):
            raise InputError(
                f'{name}: the number of files in "{kind}s" is {len(listed)}, but {len(places)} places need one: each '
                f"<{kind}> in a text of the user, and each {kind} item without a file. Correct the texts or the list."
            )
    return messages


def _with_all_places(messages: list[Any], is_listed: bool) -> list[Any]:
    """Returns the messages with items in place of placeholders."""
    return [message if _has_visual(message) and not is_listed else _with_places(message) for message in messages]


def _has_visual(message: Any) -> bool:
    return any(item[item["type"]] for item in _visuals([message]))


def _with_places(message: Any) -> Any:
    """Returns a message of the user with each placeholder in its texts replaced by an item without a file."""
    content = message.get("content") if _role(message) == "user" else None
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(items, list) or not any(_PLACEHOLDER.search(_text(item)) for item in items):
        return message
    return {**message, "content": [part for item in items for part in _split(item)]}


def _split(item: Any) -> list[Any]:
    """Splits a text with placeholders into texts and items without a file."""
    if not _PLACEHOLDER.search(_text(item)):
        return [item]
    parts = enumerate(_PLACEHOLDER.split(item["text"]))  # text, kind, text, ...
    return [{"type": part, part: {}} if i % 2 else {**item, "text": part} for i, part in parts if part]


def _text(item: Any) -> str:
    text = item.get("text") if isinstance(item, Mapping) and item.get("type") == "text" else None
    return text if isinstance(text, str) else ""


def _are_same(listed: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Returns whether a list names the same files as the messages."""
    files = [value.get(key) for value in listed]
    return None not in files and files == [value.get(key) for value in own]


def _put_first(items: list[Any], messages: list[Any], name: str) -> list[Any]:
    """Returns the messages with `items` before the text of the user's first message, as in ms-swift."""
    for i, message in enumerate(messages):
        if _role(message) == "user":
            content = message["content"]
            content = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if isinstance(content, list):
                return [*messages[:i], {**message, "content": [*items, *content]}, *messages[i + 1 :]]
    raise InputError(f"{name} has images or videos, but no message of the user to put them in. Add one.")


def _pixel_limits(visuals: Sequence[dict[str, Any]], config: Any) -> Any:
    """Moves the pixel limits of the items into the image_processing_config and returns it.

    Raises:
        InputError: the limits differ; one pair of limits applies to the whole sample.
    """
    objects = [item[item["type"]] for item in visuals]
    for key in _PIXELS:
        limits = [value.pop(key, None) for value in objects]
        if all(limit is None for limit in limits):
            continue
        config = {} if config is None else config
        if not isinstance(config, Mapping) or any(limit != config.get(key, limits[0]) for limit in limits):
            raise InputError(
                f"{key} differs between the images and videos of the sample, which share one. Set each to the same, "
                f'or set only "image_processing_config": {{"{key}": ...}} beside the messages.'
            )
        config = {**config, key: limits[0]}
    return config
