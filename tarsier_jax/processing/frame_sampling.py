"""Selects the frames of a clip: samplers, the number of frames per clip of a sample, and indices from an annotation.

The results equal those of the original processor. The arithmetic is plain Python, so rounding is the same.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tarsier_jax.errors import InputError

SAMPLERS = ("v1", "v2")
_BOUNDS = ("start_time", "start_frame", "end_time", "end_frame")
_TICK = 1e-6  # seconds of tolerance for rounded timestamps


@dataclasses.dataclass(frozen=True)
class SamplingRules:
    """The rules of the videos that a model was trained on. The defaults are Tarsier2's.

    Attributes:
        repeat_frames: Whether sampler v1 repeats frames of a video file that has fewer frames than n. Otherwise, and
            for animations and lists of frames, it returns each frame once.
        floor_times: Whether a time selects the frame that is displayed then. Otherwise, at a constant frame rate, it
            selects the nearest frame.
    """

    repeat_frames: bool = False
    floor_times: bool = False


@dataclasses.dataclass(frozen=True)
class FrameSelection:
    """The frames of an image or video in an example. Two selections of the same frames are equal.

    Attributes:
        indices: Indices of the frames in the clip.
        times: Times of the frames in seconds from the first frame of the clip; None for frames without times.
        frame_size: Height and width in pixels of the frames that the model receives.
        fetch_seconds: Seconds to fetch the content from a URL.
        decode_seconds: Seconds to open, decode, resize and patchify it.
    """

    indices: tuple[int, ...]
    times: tuple[float, ...] | None
    frame_size: tuple[int, int]
    fetch_seconds: float = dataclasses.field(default=0.0, compare=False)
    decode_seconds: float = dataclasses.field(default=0.0, compare=False)


def sample_uniform(length: int, n: int, repeat: bool = False) -> list[int]:
    """Sampler v1: n of `length` frames, evenly spaced, including the first and the last.

    If there are fewer frames than n, it returns each one once or, with `repeat`, n indices with repetitions.
    """
    if n == 1:
        return [0]
    if length <= n and not repeat:
        return list(range(length))
    return [round(i * (length - 1) / (n - 1)) for i in range(n)]


def sample_segments(length: int, n: int, rng: np.random.Generator | None = None) -> list[int]:
    """Sampler v2: one frame per segment of n equal segments, the middle one, or a random one with `rng`."""
    if length <= n:
        return list(range(length))
    size, longer = divmod(length, n)  # the first `longer` segments have one frame more
    starts = [i * size + min(i, longer) for i in range(n + 1)]
    segments = list(itertools.pairwise(starts))
    if rng is None:
        return [start + (end - start + 1) // 2 - 1 for start, end in segments]
    return [int(rng.integers(start, end)) for start, end in segments]


def allocate_frames(
    videos: Sequence[Mapping[str, Any]], n_images: int, n_frames: int, max_n_frames: int, divisor: int = 1
) -> list[int]:
    """Returns the maximum number of frames of each video item of one sample.

    Videos with `frame_indices` or `time_indices` use the listed frames, images use one each. The other videos start
    from `min_n_frames` (with `fps`: from max_n_frames). They grow in turn until the sample has n_frames, then shrink
    in turn while it has more than max_n_frames. Finally they are rounded up to a multiple of `divisor`.

    Raises:
        InputError: a video has fewer than one frame.
    """
    counts = [_initial_count(video, max_n_frames) for video in videos]
    flexible = [i for i, video in enumerate(videos) if not _listed(video)]
    total = sum(counts) + n_images
    # A round is completed even after the goal is reached, as in the original. The results depend on it.
    while flexible and total < n_frames:
        for i in flexible:
            counts[i] += total < n_frames
            total += 1
    while flexible and total > max_n_frames:
        for i in flexible:
            counts[i] -= total > max_n_frames
            total -= 1
    for i in flexible:
        counts[i] += -counts[i] % divisor
    if any(count < 1 for count in counts):
        raise InputError(
            f"{len(videos)} videos and {n_images} images share {n_frames} frames (at most {max_n_frames}), so one "
            "video has none. Raise n_frames and max_n_frames, or put fewer visuals into one sample."
        )
    return counts


def select_frames(
    item: Mapping[str, Any],
    length: int,
    rate: float | None,
    n: int,
    sampler: str = "v1",
    rng: np.random.Generator | None = None,
    name: str = "the clip",
    times: np.ndarray | None = None,
    rules: SamplingRules = SamplingRules(),
) -> list[int]:
    """Returns the frame indices that a video item of an annotation selects.

    `frame_indices`, `time_indices` (in seconds) and `fps` exclude each other. `fps` selects that many frames per
    second, or n evenly spaced frames if that is fewer. `start_frame`/`end_frame`, or `start_time`/`end_time` in
    seconds, are the inclusive bounds of the sampled range. An end past the last frame means the last frame.

    Seconds count from the first frame. At a constant rate they select the nearest frame, as in the original of
    Tarsier2; otherwise, or with `floor_times`, the frame that is displayed at that time.

    Args:
        item: The video object of the annotation.
        length: Number of frames in the clip.
        rate: Frames per second of the clip, or None if its frames do not have times.
        n: Number of frames to sample.
        sampler: One of SAMPLERS.
        rng: Random generator of sampler v2; None takes the middle of each segment.
        name: Name of the clip in errors.
        times: Time of each frame in seconds, (length,), increasing; None for a constant rate.
        rules: Rules of the model.

    Raises:
        InputError: seconds are used for a clip without a frame rate, or selected frames are not in the clip.
    """
    selections = [key for key in ("frame_indices", "time_indices", "fps") if item.get(key) is not None]
    if len(selections) > 1:
        raise InputError(f"{name} has both {' and '.join(selections)}. Keep one of them.")
    _check_bounds(item, name)
    if rate is None and any(item.get(key) is not None for key in ("time_indices", "fps", "start_time", "end_time")):
        raise InputError(
            f"{name} does not have a frame rate, which times and fps need. Use frame_indices, start_frame, end_frame."
        )
    if times is not None and _is_constant(times, rate or 0):
        times = None
    if _listed(item):
        listed = item.get("frame_indices")
        if listed is None:
            listed = [_frame_at(s, rate, times, rules.floor_times) for s in item["time_indices"]]
        return _check_listed(list(listed), length, f"{name} ({selections[0]} {str(item[selections[0]])[:60]})")
    start, end = _bounds(item, length, rate, times, rules.floor_times)
    span = end - start + 1
    if not 0 <= start < length or span < 1:
        raise InputError(
            f"{name} has frames 0 to {length - 1}, but {start} to {end} are selected ({_window(item)}). "
            "Correct the start and end."
        )
    if item.get("fps") is not None:
        every = _every(start, end, item["fps"], rate or 0, times)
        if len(every) <= n:
            return every
    sampled = sample_uniform(span, n, rules.repeat_frames) if sampler == "v1" else sample_segments(span, n, rng)
    return [start + i for i in sampled]


def _check_bounds(item: Mapping[str, Any], name: str) -> None:
    """Raises InputError for bounds that would be ignored."""
    bounds = [key for key in _BOUNDS if item.get(key) is not None]
    for side in ("start", "end"):
        if {f"{side}_time", f"{side}_frame"} <= set(bounds):
            raise InputError(f"{name} has both {side}_time and {side}_frame. Keep one of them.")
    if bounds and _listed(item):
        raise InputError(f"{name}: {bounds[0]} cannot be combined with a list of frames. Remove it.")


def _window(item: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {item[key]}" for key in _BOUNDS if item.get(key) is not None)


def _listed(video: Mapping[str, Any]) -> bool:
    return video.get("frame_indices") is not None or video.get("time_indices") is not None


def _initial_count(video: Mapping[str, Any], max_n_frames: int) -> int:
    for key in ("frame_indices", "time_indices"):
        if video.get(key) is not None:
            return len(video[key])
    if video.get("min_n_frames") is not None:
        return int(video["min_n_frames"])
    return max_n_frames if video.get("fps") is not None else 0


def _is_constant(times: np.ndarray, rate: float) -> bool:
    """Returns whether the nearest frame to every time follows from the rate alone."""
    return bool(np.all(np.abs(times * rate - np.arange(len(times))) < 0.5))


def _frame_at(seconds: float, rate: float | None, times: np.ndarray | None, floor: bool) -> int:
    """Returns the index of the frame at a time. Past the last frame, the index continues at the clip's rate."""
    if times is None or seconds < 0:
        return (math.floor if floor else round)(float(seconds) * (rate or 0))
    if seconds > times[-1]:
        return len(times) - 1 + round((float(seconds) - float(times[-1])) * (rate or 0))
    return int(np.searchsorted(times, seconds + _TICK, side="right")) - 1


def _every(start: int, end: int, fps: float, rate: float, times: np.ndarray | None) -> list[int]:
    """Returns the frames from `start` to `end`, subsampled to `fps` frames per second."""
    if times is None:
        return list(range(start, end + 1, max(1, round(rate / fps))))
    # A frame is selected if it is displayed at a multiple of 1 / fps.
    edges = np.append(times[start : end + 1], times[end] + 1 / rate) - times[start]
    ticks = np.ceil((edges - _TICK) * fps)
    return (start + np.flatnonzero(ticks[:-1] < ticks[1:])).tolist()


def _bounds(
    item: Mapping[str, Any], length: int, rate: float | None, times: np.ndarray | None, floor: bool
) -> tuple[int, int]:
    def bound(side: str, default: int) -> int:
        if item.get(f"{side}_time") is not None:
            return _frame_at(item[f"{side}_time"], rate, times, floor)
        return round(item[f"{side}_frame"]) if item.get(f"{side}_frame") is not None else default

    return bound("start", 0), min(bound("end", length - 1), length - 1)


def _check_listed(listed: list[Any], length: int, name: str) -> list[int]:
    if any(i != int(i) for i in listed):
        raise InputError(f"{name}: frame_indices must be whole numbers. Round them, or use time_indices for seconds.")
    indices = [length - 1 if i == length else int(i) for i in listed]  # the duration means the last frame
    outside = [i for i in indices if not 0 <= i < length]
    if outside or not indices:
        raise InputError(
            f"{name} has frames 0 to {length - 1}, but {outside or 'none'} are selected. "
            "Correct the frame_indices or time_indices."
        )
    return indices
