"""Which frames of a clip the model sees: samplers, the share of each clip of a sample, and indices from an annotation.

The numbers are those of the original processor; they are plain Python so that rounding is the same too.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tarsier_jax.errors import InputError

SAMPLERS = ("v1", "v2")
_BOUNDS = ("start_time", "start_frame", "end_time", "end_frame")
_TICK = 1e-6  # seconds by which timestamps are rounded


def sample_uniform(length: int, n: int) -> list[int]:
    """Sampler v1: n of `length` frames, evenly spaced, the first and the last among them; all if there are fewer."""
    if n == 1:
        return [0]
    if length <= n:
        return list(range(length))
    return [round(i * (length - 1) / (n - 1)) for i in range(n)]


def sample_segments(length: int, n: int, rng: np.random.Generator | None = None) -> list[int]:
    """Sampler v2: one frame of each of n equal segments: the middle one, or with `rng` a random one."""
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
    """How many frames each video item of one sample may show.

    Videos with `frame_indices` or `time_indices` take what they list, images take one each. The others start from
    `min_n_frames` (with `fps`: from max_n_frames) and grow by turns until the sample has n_frames, then shrink by
    turns while it has more than max_n_frames; at last they are rounded up to a multiple of `divisor`.

    Raises:
        InputError: a video is left without a frame.
    """
    counts = [_frames_asked(video, max_n_frames) for video in videos]
    flexible = [i for i, video in enumerate(videos) if not _listed(video)]
    total = sum(counts) + n_images
    # Each turn counts even after the goal is met: so did the original, and its shares depend on it.
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
            f"{len(videos)} videos and {n_images} images share {n_frames} frames (at most {max_n_frames}), which "
            "leaves a video without any. Raise n_frames and max_n_frames, or put fewer visuals into one sample."
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
) -> list[int]:
    """Frame indices that a video item of an annotation asks for.

    `frame_indices`, `time_indices` (seconds) and `fps` (frames a second to take; if that makes more than n, n evenly
    spaced ones) exclude each other. `start_frame`/`end_frame`, or `start_time`/`end_time` in seconds, bound what is
    sampled, both ends included; an end past the last frame means the last frame.

    Seconds count from the first frame. Where frames come at a constant rate, they mean the nearest frame, as in the
    original; elsewhere, the frame that is on the screen.

    Args:
        length: frames in the clip.  rate: its frames a second, None if it has none.  n: frames to take.
        times: the time of each frame in seconds, (length,), increasing; None for a constant rate.

    Raises:
        InputError: seconds are given for a clip without a frame rate, or the frames asked for are not in the clip.
    """
    given = [key for key in ("frame_indices", "time_indices", "fps") if item.get(key) is not None]
    if len(given) > 1:
        raise InputError(f"{name}: {' and '.join(given)} are both given. Keep one of them.")
    _check_bounds(item, name)
    if rate is None and any(item.get(key) is not None for key in ("time_indices", "fps", "start_time", "end_time")):
        raise InputError(
            f"{name} has no frame rate, so that times and fps mean nothing. Use frame_indices, start_frame, end_frame."
        )
    if times is not None and _is_constant(times, rate or 0):
        times = None
    if _listed(item):
        listed = item.get("frame_indices")
        indices = [_frame_at(s, rate, times) for s in item["time_indices"]] if listed is None else listed
        return _check_listed(list(indices), length, f"{name} ({given[0]} {str(item[given[0]])[:60]})")
    start, end = _bounds(item, length, rate, times)
    span = end - start + 1
    if not 0 <= start < length or span < 1:
        raise InputError(
            f"{name} has frames 0 to {length - 1}, but {start} to {end} are asked for ({_window(item)}). "
            "Mend the start and end."
        )
    if item.get("fps") is not None:
        every = _every(start, end, item["fps"], rate or 0, times)
        if len(every) <= n:
            return every
    sampled = sample_uniform(span, n) if sampler == "v1" else sample_segments(span, n, rng)
    return [start + i for i in sampled]


def _check_bounds(item: Mapping[str, Any], name: str) -> None:
    """Raises InputError for bounds that would be ignored."""
    bounds = [key for key in _BOUNDS if item.get(key) is not None]
    for side in ("start", "end"):
        if {f"{side}_time", f"{side}_frame"} <= set(bounds):
            raise InputError(f"{name}: {side}_time and {side}_frame are both given. Keep one of them.")
    if bounds and _listed(item):
        raise InputError(f"{name}: {bounds[0]} has no meaning where single frames are listed. Leave it out.")


def _window(item: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {item[key]}" for key in _BOUNDS if item.get(key) is not None)


def _listed(video: Mapping[str, Any]) -> bool:
    return video.get("frame_indices") is not None or video.get("time_indices") is not None


def _frames_asked(video: Mapping[str, Any], max_n_frames: int) -> int:
    for key in ("frame_indices", "time_indices"):
        if video.get(key) is not None:
            return len(video[key])
    if video.get("min_n_frames") is not None:
        return int(video["min_n_frames"])
    return max_n_frames if video.get("fps") is not None else 0


def _is_constant(times: np.ndarray, rate: float) -> bool:
    """Whether the frame nearest to any time is the one that the rate says."""
    return bool(np.all(np.abs(times * rate - np.arange(len(times))) < 0.5))


def _frame_at(seconds: float, rate: float | None, times: np.ndarray | None) -> int:
    """The index of the frame at a time. Past the last frame, it counts on at the clip's rate."""
    if times is None or seconds < 0:
        return round(float(seconds) * (rate or 0))
    if seconds > times[-1]:
        return len(times) - 1 + round((float(seconds) - float(times[-1])) * (rate or 0))
    return int(np.searchsorted(times, seconds + _TICK, side="right")) - 1


def _every(start: int, end: int, fps: float, rate: float, times: np.ndarray | None) -> list[int]:
    """The frames from `start` to `end`, thinned out to `fps` a second."""
    if times is None:
        return list(range(start, end + 1, max(1, round(rate / fps))))
    # A frame is taken if a multiple of 1 / fps falls into the time for which it is on the screen.
    edges = np.append(times[start : end + 1], times[end] + 1 / rate) - times[start]
    ticks = np.ceil((edges - _TICK) * fps)
    return (start + np.flatnonzero(ticks[:-1] < ticks[1:])).tolist()


def _bounds(item: Mapping[str, Any], length: int, rate: float | None, times: np.ndarray | None) -> tuple[int, int]:
    def bound(side: str, default: int) -> int:
        if item.get(f"{side}_time") is not None:
            return _frame_at(item[f"{side}_time"], rate, times)
        return round(item[f"{side}_frame"]) if item.get(f"{side}_frame") is not None else default

    return bound("start", 0), min(bound("end", length - 1), length - 1)


def _check_listed(listed: list[Any], length: int, name: str) -> list[int]:
    if any(i != int(i) for i in listed):
        raise InputError(f"{name}: frame_indices are whole numbers. Mend them, or give seconds as time_indices.")
    indices = [length - 1 if i == length else int(i) for i in listed]  # the duration means the last frame
    outside = [i for i in indices if not 0 <= i < length]
    if outside or not indices:
        raise InputError(
            f"{name} has frames 0 to {length - 1}, but {outside or 'none'} are asked for. "
            "Mend the frame_indices or time_indices."
        )
    return indices
