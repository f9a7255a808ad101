"""Checks samples in the annotation format, and opens their images and videos.

{"messages": [{"role": "user", "content": [{"type": "video", "video": {"video_file": "a.mp4"}},
                                           {"type": "text", "text": "Describe the video in detail."}]}]}
"""

import dataclasses
import difflib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tarsier_jax.errors import InputError, MediaError
from tarsier_jax.processing.clip import ClipLimits, MediaFile
from tarsier_jax.processing.formats import is_conversation, normalize_sample
from tarsier_jax.processing.frame_sampling import SamplingRules, allocate_frames, select_frames
from tarsier_jax.processing.perturb import PERTURBATIONS, perturb
from tarsier_jax.processing.video import Clip, open_clip

ROLES = ("system", "user", "assistant")
SOURCES = ("video_file", "image_file", "frames")
_NUMBERS = ("start_frame", "end_frame", "start_time", "end_time", "fps", "min_n_frames")
_LISTS = ("frame_indices", "time_indices")
_KEYS = {
    "video": (*SOURCES, *_NUMBERS, *_LISTS, "mask_boxes", "disturb"),
    "image": (*SOURCES, "frame_indices"),
}
MEDIA_KEYS = _KEYS["video"]
_COUNT = "Set the number of frames for all samples with the option n_frames, or list frames in frame_indices"
_SIZE = "Use max_pixels, the limit of each frame"
# Keys of Qwen's items that the annotation format cannot express, and the nearest alternative.
_REMEDIES = {
    **dict.fromkeys(("nframes", "num_frames", "n_frames", "min_frames", "max_frames", "max_n_frames"), _COUNT),
    **dict.fromkeys(("total_pixels", "resized_height", "resized_width"), _SIZE),
    "start": "Use start_time, in seconds, or start_frame",
    "end": "Use end_time, in seconds, or end_frame",
    "bytes": "Write the picture to a file, and use its path",
}
_NUMBER_TYPES = (int, float, np.integer, np.floating)
_LARGEST = 2**53  # largest number in an annotation; times and indices are far below
_MOST_FRAMES = 100_000  # largest min_n_frames
_MASK_MARGIN = 30  # rows below the lowest mask box that remain


@dataclasses.dataclass(frozen=True)
class Visual:
    """An image or video of a sample, opened but not yet decoded.

    Attributes:
        kind: "image" or "video".
        clip: The opened file.
        indices: Frame indices.
        mask_boxes: Boxes for `mask_frames`.
        blanks: Number of black frames to append.
        open_seconds: Seconds to open the file.
    """

    kind: str
    clip: Clip
    indices: list[int]
    mask_boxes: Sequence[Any] | None = None
    blanks: int = 0
    open_seconds: float = 0.0

    @property
    def count(self) -> int:
        return len(self.indices) + self.blanks

    @property
    def times(self) -> tuple[float, ...] | None:
        """Times of the frames in seconds, or None for frames without times."""
        return None if self.clip.times is None else tuple(self.clip.times[self.indices].tolist())

    def frames(self) -> Iterator[Image.Image]:
        """Decodes the frames one by one.

        Raises:
            InputError: a frame cannot be decoded.
        """
        frames = self.clip.read(self.indices)
        if self.mask_boxes is not None:
            frames = mask_frames(frames, self.mask_boxes)
        frame = None
        for frame in frames:
            yield frame
        if frame is not None:
            yield from itertools.repeat(Image.new("RGB", frame.size), self.blanks)


def read_messages(sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Checks and copies the messages of a sample. Each content becomes a list of items.

    The sample may have any format that `normalize_sample` converts. A message keeps its `loss`.

    Raises:
        InputError: a message or item is malformed.
    """
    messages = normalize_sample(sample).get("messages") if is_conversation(sample) else None
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError('A sample is a dict {"messages": [...]} with at least one message; this one has none.')
    return [_read_message(message, i) for i, message in enumerate(messages)]


def open_visuals(
    messages: Sequence[Mapping[str, Any]],
    n_frames: int,
    max_n_frames: int,
    sampler: str,
    divisor: int,
    rng: np.random.Generator | None,
    rules: SamplingRules = SamplingRules(),
    limits: ClipLimits | None = None,
) -> list[Visual]:
    """Opens every image and video of checked messages, in order, and selects the frames.

    For a video with "disturb": {"kind": "reverse", "seed": 3}, `perturb` changes the selected frames. Its random
    numbers, and the kind if that is omitted, depend on the seed (default 0) and not on `rng`.

    Raises:
        InputError: a file cannot be opened, exceeds `limits`, or lacks selected frames.
    """
    items = [item for m in messages for item in m["content"] if item["type"] != "text"]
    videos = [item["video"] for item in items if item["type"] == "video"]
    counts = iter(allocate_frames(videos, len(items) - len(videos), n_frames, max_n_frames, divisor))
    visuals = []
    for item in items:
        start = time.perf_counter()
        if item["type"] == "image":
            visual = _open_image(item["image"], limits)
        else:
            visual = _open_video(item["video"], next(counts), sampler, divisor, rng, rules, limits)
        visuals.append(dataclasses.replace(visual, open_seconds=time.perf_counter() - start))
    return visuals


def mask_frames(frames: Iterator[Image.Image], mask_boxes: Sequence[Any]) -> Iterator[Image.Image]:
    """Blacks out boxes, and crops each frame some rows below the box with the highest lower edge.

    Args:
        frames: Frames of one size.
        mask_boxes: A list of boxes per frame. A box is its corners (x, y) as fractions of width and height, clockwise
            from the top left.

    Raises:
        InputError: there are fewer lists of boxes than frames, or a box is malformed.
    """
    size = None
    for i, frame in enumerate(frames):
        width, height = size = size or frame.size  # boxes are fractions of the first frame
        if i >= len(mask_boxes):
            raise InputError(f"mask_boxes has {len(mask_boxes)} lists of boxes, too few for the frames. Add the rest.")
        pixels, bottom = np.array(frame), height
        if not isinstance(mask_boxes[i], list | tuple | np.ndarray):
            raise InputError(f"mask_boxes needs a list of boxes for each frame, not {mask_boxes[i]!r:.100}.")
        for box in mask_boxes[i]:
            try:
                corners = [(round(x * width), round(y * height)) for x, y in box]
                (x0, top), (x1, _), (_, low) = corners[:3]
            except (TypeError, ValueError, OverflowError):
                raise InputError(f"{box!r:.100} in mask_boxes is not a box: use four corners [x, y].") from None
            pixels[top:low, x0:x1] = 0
            bottom = min(bottom, max(y for _, y in corners) + _MASK_MARGIN)
        yield Image.fromarray(pixels[:bottom])


def _read_message(message: Any, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise InputError(f"{where} needs a role, one of {', '.join(ROLES)}, but is {_short(message)}.")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list | tuple):
        raise InputError(f"{where} needs a content: a text, an item, or a list of items, not {_short(content)}.")
    items = [_read_item(x, f"{where}.content[{i}]") for i, x in enumerate(content)]
    loss = message.get("loss")
    if loss is None:
        return {"role": message["role"], "content": items}
    if not isinstance(loss, bool):
        raise InputError(f"{where}: loss must be true or false, not {_short(loss)}.")
    return {"role": message["role"], "content": items, "loss": loss}


def _read_item(item: Any, where: str) -> dict[str, Any]:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind not in ("text", "image", "video"):
        raise InputError(f'{where} needs "type": "text", "image" or "video", but is {_short(item)}.')
    value = item.get(kind)
    if kind == "text":
        if not isinstance(value, str):
            raise InputError(f'{where} is a text without its "text": {_short(item)}.')
        _check_text(value, where)
        return {"type": kind, "text": value}
    if not isinstance(value, Mapping):
        raise InputError(f'{where} needs "{kind}": {{"{kind}_file": ...}}, but is {_short(item)}.')
    if sum(value.get(key) is not None for key in SOURCES) != 1:
        keys = ", ".join(str(key) for key in value if value[key] is not None) or "none"
        raise InputError(f"{where} needs exactly one of {', '.join(SOURCES)}, but has {keys}.")
    if any(value.get(key) == "" for key in ("video_file", "image_file")):
        raise InputError(f"{where} has an empty name in place of a file. Fill it in.")
    _check_keys(value, kind, where)
    if kind == "video":
        _check_choice(value, where)
    return {"type": kind, kind: {key: v for key, v in value.items() if v is not None}}


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        half = ascii(text[e.start])
        raise InputError(f"{where} has {half}, half of a character, at {e.start}. Replace it.") from None


def _check_keys(value: Mapping[str, Any], kind: str, where: str) -> None:
    """Raises InputError for keys that are not read."""
    for key in value:
        if value[key] is None or key in _KEYS[kind]:
            continue
        close = difflib.get_close_matches(str(key), _KEYS[kind], 1)
        remedy = _REMEDIES.get(key) or (f"Use {close[0]} if you mean that" if close else "Remove it")
        raise InputError(
            f"{where}: the {kind} has the key {_short(key)}, which is not supported. {remedy}. Supported are "
            f"{', '.join(_KEYS[kind])}."
        )


def _check_choice(video: Mapping[str, Any], where: str) -> None:
    """Checks the types of the keys that select the frames of a video item."""
    for key in _NUMBERS:
        if video.get(key) is not None and not is_number(video[key]):
            raise InputError(f"{where}: {key} must be a number, not {_short(video[key])}.")
    for key in _LISTS:
        value = video.get(key)
        if value is None:
            continue
        if not isinstance(value, list | tuple | np.ndarray) or not len(value) or not all(map(is_number, value)):
            raise InputError(f"{where}: {key} must be a list of at least one number, not {_short(value)}.")
    if video.get("fps") is not None and video["fps"] <= 0:
        raise InputError(f"{where}: fps must be above 0, not {video['fps']}.")
    if not 0 <= (video.get("min_n_frames") or 0) <= _MOST_FRAMES:
        raise InputError(f"{where}: min_n_frames must be from 0 to {_MOST_FRAMES}, not {video['min_n_frames']}.")
    if video.get("mask_boxes") is not None and not isinstance(video["mask_boxes"], list | tuple | np.ndarray):
        raise InputError(f"{where}: mask_boxes must be a list of boxes per frame, not {_short(video['mask_boxes'])}.")
    if video.get("disturb") is not None:
        _check_disturb(video, where)


def _check_disturb(video: Mapping[str, Any], where: str) -> None:
    value = video["disturb"]
    if not isinstance(value, Mapping) or value.keys() - {"kind", "seed"}:
        raise InputError(f'{where}: disturb must be like {{"kind": "reverse", "seed": 3}}, not {_short(value)}.')
    kind, seed = value.get("kind"), value.get("seed")
    if kind is not None and kind not in PERTURBATIONS:
        raise InputError(f"{where}: the kind of disturb must be one of {', '.join(PERTURBATIONS)}, not {_short(kind)}.")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise InputError(f"{where}: the seed of disturb must be a whole number of at least 0, not {_short(seed)}.")
    if video.get("mask_boxes") is not None:
        raise InputError(f"{where}: disturb would separate frames and their mask_boxes. Remove one of the two.")


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number and not a bool."""
    return isinstance(value, _NUMBER_TYPES) and not isinstance(value, bool) and bool(-_LARGEST <= value <= _LARGEST)


def _source(item: Mapping[str, Any]) -> Any:
    return next(item[key] for key in SOURCES if item.get(key) is not None)


def _open_video(
    video: Mapping[str, Any],
    n: int,
    sampler: str,
    divisor: int,
    rng: np.random.Generator | None,
    rules: SamplingRules,
    limits: ClipLimits | None,
) -> Visual:
    clip = open_clip(_source(video), limits)
    own = dataclasses.replace(rules, repeat_frames=rules.repeat_frames and clip.is_video)
    indices = select_frames(video, clip.length, clip.rate, n, sampler, rng, clip.name, clip.times, own)
    if (perturbation := video.get("disturb")) is not None:
        seed = perturbation.get("seed") or 0
        indices = perturb(indices, perturbation.get("kind"), np.random.default_rng(seed), clip.name)
    if limits is not None and len(indices) > limits.max_selected_frames:
        raise MediaError(
            f"{clip.name}: {len(indices)} frames are selected, but {limits.max_selected_frames} are allowed. Select "
            "fewer.",
            "too_many_frames",
        )
    return Visual("video", clip, indices, video.get("mask_boxes"), -len(indices) % divisor)


def _open_image(item: Mapping[str, Any], limits: ClipLimits | None) -> Visual:
    source, index = _source(item), item.get("frame_indices", 0)
    if isinstance(index, bool) or not isinstance(index, int):
        raise InputError(f"An image has one frame: frame_indices must be one number, not {_short(index)}.")
    if item.get("video_file") is not None:
        if "frame_indices" not in item:
            raise InputError(f"An image from {source} needs frame_indices, the number of its frame.")
        clip = open_clip(source, limits)
        return Visual("image", clip, [min(index, clip.length - 1) if index == clip.length else index])
    sources = source if isinstance(source, list | tuple) else [source]
    if len(sources) != 1:
        raise InputError(f"An image is one file or frame, not {len(sources)}. Use a video item for a sequence.")
    if isinstance(sources[0], MediaFile):
        name = sources[0].name
    else:
        name = str(sources[0]) if isinstance(sources[0], str | Path) else "an image in memory"
    return Visual("image", dataclasses.replace(open_clip(sources, limits), name=name), [0])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
