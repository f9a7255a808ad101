"""Tasks of Tarsier2's pre-training: several pictures, order of frames, object tracking.

Prompts and answers are those of the original data parsers, on which the released models were trained.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from tarsier_jax.errors import InputError
from tarsier_jax.processing.sample import is_number, open_visuals, read_messages

_MAX_OBJECTS = 4
_ORDER_FRAMES = (8, 24)
_MIN_ORDER_FRAMES = 3  # with fewer, the prompt would contain no position
_HOW = {"coco": " in short", "sharegpt4v_cap100k": " in detail", "webvid": "", "movie": ""}  # captions, by dataset

Sample = Mapping[str, Any]
_Frame = Image.Image


def multi_images(sample: Sample, rng: np.random.Generator, n_frames: int) -> dict[str, Any]:
    """Returns a chat about several pictures: a question for each, or descriptions from a random picture on."""
    texts = _field(sample, "text", list)
    pictures = [picture for item in _field(sample, "image", list) for picture in _pictures(item, rng)]
    if len(texts) != len(pictures):
        raise InputError(
            f"A multi_images line has {len(texts)} texts for {len(pictures)} pictures. Write one text per picture."
        )
    order = rng.permutation(len(texts))[: int(rng.integers(1, n_frames + 1))]
    pairs = [_question_and_answer(texts[i], rng) for i in order]
    how = _HOW.get(str(sample.get("dataset")))
    prompt, response = _ask_each(pairs) if how is None else _describe_from(int(rng.integers(len(pairs))), pairs, how)
    return _as_chat(sample, [{"type": "image", "image": pictures[i]} for i in order], prompt, response)


def _pictures(item: Any, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Returns the image items of a file, of a list of files, or of frames of a video, which is decoded once."""
    if not isinstance(item, Mapping):
        raise InputError(f"The pictures of a multi_images line are objects with a file, not {item!r}.")
    if item.get("image_file") is not None:
        files = item["image_file"]
        return [{"image_file": file} for file in (files if isinstance(files, list) else [files])]
    indices = item.get("frame_indices")
    if indices is None:
        raise InputError(f"Pictures from the video {item.get('video_file')} need frame_indices, the numbers of frames.")
    video = {**item, "frame_indices": indices if isinstance(indices, list) else [indices]}
    return [{"frames": frame} for frame in _decode(video, 1, rng)]


def _question_and_answer(text: Any, rng: np.random.Generator) -> tuple[str, str]:
    """Returns prompt and response of a picture; a random pair if there are alternatives."""
    if isinstance(text, list) and text:
        text = text[rng.integers(len(text))]
    prompt, response = (text.get("prompt"), text.get("response")) if isinstance(text, Mapping) else (None, None)
    if not isinstance(prompt, str) or not isinstance(response, str) or not response.strip():
        raise InputError(f'A picture\'s text needs a "prompt" and a "response", but is {text!r}.')
    return prompt, response


def _ask_each(pairs: Sequence[tuple[str, str]]) -> tuple[str, str]:
    if len(pairs) == 1:
        return f"{pairs[0][0]}\n", f"{pairs[0][1]}\n"
    prompts = (f"Question for frame {i}:\n{prompt}\n" for i, (prompt, _) in enumerate(pairs, 1))
    responses = (f"Answer to question of frame {i}:\n{response}\n" for i, (_, response) in enumerate(pairs, 1))
    return "".join(prompts), "".join(responses)


def _describe_from(first: int, pairs: Sequence[tuple[str, str]], how: str) -> tuple[str, str]:
    several = f"Describe the images starting from frame {first + 1}{how} in order."
    prompt = several if len(pairs) > 1 else f"Describe the image{how}."
    return prompt, "".join(f"{response}\n" for _, response in pairs[first:])


def frame_order(sample: Sample, rng: np.random.Generator, n_frames: int) -> dict[str, Any]:
    """Returns a chat about scrambled frames. The prompt has the order of the first 3/8, the answer that of the rest."""
    low, high = _ORDER_FRAMES
    frames = _decode(_field(sample, "video", list)[0], int(rng.integers(low, high + 1)), rng)
    if len(frames) < _MIN_ORDER_FRAMES:
        raise InputError(f"A video of {len(frames)} frames is too short to put in order. Leave the line out.")
    shuffled = rng.permutation(len(frames))
    places = [str(i + 1) for i in shuffled]
    num_in_prompt = 3 * len(places) // 8
    prompt = (
        "Output the correct chronological order of scrambled video frames. "
        f"The order of the first {num_in_prompt} ones are:\n"
        + "\n".join(places[:num_in_prompt])
        + "\nOutput the order of the following frames:"
    )
    return _as_chat(sample, [_in_memory([frames[i] for i in shuffled])], prompt, "\n".join(places[num_in_prompt:]))


def object_tracking(sample: Sample, rng: np.random.Generator, n_frames: int) -> dict[str, Any]:
    """Returns a chat about boxes of objects: those in the first frame are in the prompt, the others in the answer."""
    config = dict(sample.get("image_processing_config") or {})
    pad = bool(config.pop("do_padding", False))
    indices = _field(sample, "frame_indices", list)
    tracks = [_track(o, len(indices)) for o in _field(sample, "objects", dict).values() if o is not None][:_MAX_OBJECTS]
    n = min(n_frames, len(indices))
    if n < 2 or not tracks:
        raise InputError(f"Tracking needs two frames and an object, not {n} frames and {len(tracks)} objects.")
    positions = sorted(rng.choice(len(indices), n, replace=False))
    video = {"video_file": sample.get("video_file"), "frame_indices": [indices[i] for i in positions]}
    crop = _CROPS.get(str(sample.get("dataset")), lambda frame: frame)
    frames = [crop(frame) for frame in _decode(video, n, rng)]
    scaled = [[_scale(track[i], frame, pad) for i, frame in zip(positions, frames, strict=True)] for track in tracks]
    prompt = (
        "Given the bounding box coordinates of these objects in the first frame, "
        "output the bounding box coordinates in the following frames.\n"
    ) + "".join(f"object {i}: {boxes[0]}\n" for i, boxes in enumerate(scaled, 1))
    response = "\n".join(f"object {i}: {boxes[1:]}" for i, boxes in enumerate(scaled, 1))
    padded_video = _in_memory([_pad_square(frame) for frame in frames] if pad else frames)
    return _as_chat({**sample, "image_processing_config": config}, [padded_video], prompt, response)


def _track(tracked: Any, n: int) -> list[Any]:
    """Returns an object's boxes [left, top, right, bottom] in pixels, one per entry of frame_indices."""
    boxes = tracked.get("all_frame_bounding_boxes") if isinstance(tracked, Mapping) else None
    if not isinstance(boxes, list) or len(boxes) != n:
        raise InputError(f"An object to track needs all_frame_bounding_boxes, one for each of the {n} frame_indices.")
    for box in boxes:
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
            raise InputError(f"{box!r} in all_frame_bounding_boxes is not a box [left, top, right, bottom].")
    return boxes


def _scale(box: Sequence[float], frame: _Frame, pad: bool) -> list[float]:
    """Returns a box in fractions of the frame, or of the square that it is padded to, with two decimals."""
    width, height = frame.size
    dx, dy = _margins(frame) if pad else (0, 0)
    if pad:
        width = height = max(width, height)
    x0, y0, x1, y1 = box
    return [round(v, 2) for v in ((x0 + dx) / width, (y0 + dy) / height, (x1 + dx) / width, (y1 + dy) / height)]


def _margins(frame: _Frame) -> tuple[int, int]:
    """Returns the columns on the left and the rows on top that center a frame in a square."""
    side = max(frame.size)
    return (side - frame.width) // 2, (side - frame.height) // 2


def _pad_square(frame: _Frame) -> _Frame:
    side = max(frame.size)
    square = Image.new("RGB", (side, side))
    square.paste(frame, _margins(frame))
    return square


# Two tracking datasets have boxes in pixels of crops; these are the crops of the original.
def _middle_square(frame: _Frame, side: int = 256) -> _Frame:
    """Returns the center square of a frame whose shorter side is resized to `side` pixels."""
    short = min(frame.size)
    frame = frame.resize((side * frame.width // short, side * frame.height // short), Image.Resampling.BILINEAR)
    x, y = round((frame.width - side) / 2), round((frame.height - side) / 2)
    return frame.crop((x, y, x + side, y + side))


def _inner_square(frame: _Frame, side: int = 256) -> _Frame:
    """Returns the center square of 3/4 of a frame's height, resized to `side` pixels."""
    width, height = frame.size
    half, margin = 0.375 * height, 0.125 * height
    square = (int(width / 2 - half), int(margin), int(width / 2 + half), int(height - margin))
    return frame.crop(square).resize((side, side), Image.Resampling.BICUBIC)


def _decode(video: Any, n: int, rng: np.random.Generator) -> list[_Frame]:
    """Returns the frames of a video item; n frames if it has no frame_indices."""
    messages = read_messages({"messages": [{"role": "user", "content": [{"type": "video", "video": video}]}]})
    (visual,) = open_visuals(messages, n, n, "v1", 1, rng)
    return list(visual.frames())


def _in_memory(frames: list[_Frame]) -> dict[str, Any]:
    """Returns a video item whose frame_indices select every frame, independently of n_frames."""
    return {"type": "video", "video": {"frames": frames, "frame_indices": list(range(len(frames)))}}


def _as_chat(sample: Sample, visuals: list[dict[str, Any]], prompt: str, response: str) -> dict[str, Any]:
    metadata = {key: sample[key] for key in ("dataset", "task", "idx", "image_processing_config") if key in sample}
    question = [*visuals, {"type": "text", "text": prompt}]
    answer = [{"type": "text", "text": response}]
    return {**metadata, "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _field(sample: Sample, key: str, kind: type) -> Any:
    value = sample.get(key)
    if not isinstance(value, kind) or not value:
        name = sample.get("task") or sample.get("dataset")
        raise InputError(f'A line of {name} needs "{key}", a {kind.__name__} that is not empty, not {value!r:.200}.')
    return value


_CROPS = {"hdvila": _middle_square, "hdvila_in_and_out_boxes": _inner_square}
PRETRAINING_TASKS = {
    "multi_images": multi_images,
    "object_tracking": object_tracking,
    "video/object_tracking": object_tracking,
    "video_permutation": frame_order,
}
