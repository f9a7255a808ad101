"""Reading videos, GIFs, images and sequences of frames: exactly the frames asked for, as PIL images.

Every reader gives frames one by one, so that a clip of many large frames is never in memory as a whole.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tarsier_jax.errors import InputError
from tarsier_jax.processing.clip import (
    ACCEPTED,
    GIF_SUFFIXES,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Clip,
    Frame,
    check_file,
    kind_of,
    undecodable,
)
from tarsier_jax.processing.image_files import load_image, open_gif

__all__ = ["Clip", "find_inputs", "kind_of", "load_image", "natural_key", "open_clip"]

# decord's seeking misses by some frames, or by whole groups of pictures, where the order of packets differs from that
# of frames (AVI and MPEG-4 with B frames, HEVC with open groups, WMV). Decoding from the start never does, and costs
# about the same up to this many frames. Frames of longer clips are sought.
_SCAN_FRAMES = 3000
_SEEK_BATCH = 16  # frames decoded together when seeking: bounds the memory of a clip of hundreds of large frames


def find_inputs(path: str | Path) -> list[Path]:
    """The media files that a path stands for: the file itself, or all in a directory and below, in natural order.

    Raises:
        InputError: there is no such path, no media file in the directory, or the file's ending is not accepted.
    """
    path = Path(path)
    if path.is_dir():
        accepted = VIDEO_SUFFIXES + GIF_SUFFIXES + IMAGE_SUFFIXES
        files = [p for p in path.rglob("*") if p.suffix.lower() in accepted and not p.name.startswith(".")]
        if not files:
            raise InputError(f"{path} holds no video, animation or image. {ACCEPTED}")
        return sorted(files, key=natural_key)
    check_file(path)
    kind_of(path)
    return [path]


def open_clip(source: str | Path | Sequence[Any] | np.ndarray) -> Clip:
    """Opens a video, a GIF, an image, a directory of frames, or a list of frames (files, PIL images, uint8 arrays).

    Raises:
        InputError: missing, empty, undecodable or unknown files; a directory or a list without frames.
    """
    if isinstance(source, list | tuple | np.ndarray):
        return _open_frames(list(source), f"a list of {len(source)} frames")
    if not isinstance(source, str | Path):
        raise InputError(f"{source!r} is no clip. Give a path, or a list of frames.")
    path = Path(source)
    if path.is_dir():
        return _open_frames(_frame_files(path), str(path))
    check_file(path)
    openers = {"video": _open_video, "gif": open_gif, "image": lambda p: _open_frames([p], str(p))}
    return openers[kind_of(path)](path)


def natural_key(path: Path) -> list[Any]:
    """Sorts frame2 before frame10."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", path.as_posix())]


def _frame_files(directory: Path) -> list[Path]:
    files = [p for p in directory.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    if not files:
        raise InputError(f"{directory} holds no images, so it is no clip of frames. {ACCEPTED}")
    return sorted(files, key=natural_key)


def _open_frames(sources: list[Any], name: str) -> Clip:
    if not sources:
        raise InputError("A list of frames is empty. Give at least one image.")
    return Clip(name, len(sources), None, lambda indices: (load_image(sources[i]) for i in indices))


def _open_video(path: Path) -> Clip:
    from decord import VideoReader, cpu, logging

    logging.set_level(logging.QUIET)  # what is wrong with a file is said by us
    try:
        reader = VideoReader(str(path), ctx=cpu(0), num_threads=1, fault_tol=1)
        length, rate = len(reader), float(reader.get_avg_fps())
    except Exception as e:  # decord raises DECORDError, RuntimeError and AssertionError for broken files
        raise undecodable(str(path), e) from None
    return Clip(str(path), length, rate if rate > 0 else None, lambda indices: _decode_video(reader, path, indices))


def _decode_video(reader: Any, path: Path, indices: Sequence[int]) -> Iterator[Frame]:
    frames = _scan(reader, indices) if indices and indices[-1] < _SCAN_FRAMES else _seek(reader, indices)
    while True:
        try:
            frame = next(frames, None)
        except Exception as e:  # as above; a decoder that ends early makes the generator raise RuntimeError
            raise undecodable(str(path), e) from None
        if frame is None:
            return
        yield Image.fromarray(frame)


def _scan(reader: Any, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Decodes from the first frame on, exactly. `skip_frames` would spare little, and loses frames at key frames."""
    position = 0
    reader.seek(0)
    for index in indices:
        for _ in range(index - position):
            reader.next()
        yield reader.next().asnumpy()
        position = index + 1


def _seek(reader: Any, indices: Sequence[int]) -> Iterator[np.ndarray]:
    for start in range(0, len(indices), _SEEK_BATCH):
        yield from reader.get_batch(list(indices[start : start + _SEEK_BATCH])).asnumpy()
