"""Reading videos, GIFs, images and sequences of frames: exactly the frames asked for, as PIL images.

Every reader gives frames one by one, so that a clip of many large frames is never in memory as a whole.
"""

import collections
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tarsier_jax.errors import InputError
from tarsier_jax.processing.clip import (
    ACCEPTED,
    IMAGE_SUFFIXES,
    MEDIA_SUFFIXES,
    Clip,
    check_file,
    kind_of,
)
from tarsier_jax.processing.image_files import load_image, open_picture
from tarsier_jax.processing.video_files import open_video

__all__ = ["Clip", "find_inputs", "kind_of", "load_image", "natural_key", "open_clip"]


def find_inputs(path: str | Path, skipped: collections.Counter[str] | None = None) -> list[Path]:
    """The media files that a path stands for: the file itself, or all in a directory and below, in natural order.

    Args:
        skipped: gets the number of the directory's other files by their ending, except hidden ones.

    Raises:
        InputError: there is no such path, no media file in the directory, or the file's ending is not accepted.
    """
    path = Path(path)
    if os.path.isdir(path):
        entries = [p for p in path.rglob("*") if not p.name.startswith(".")]
        files = [p for p in entries if p.suffix.lower() in MEDIA_SUFFIXES]
        for other in entries:
            hidden = any(part.startswith(".") for part in other.relative_to(path).parts)
            if skipped is not None and other.suffix.lower() not in MEDIA_SUFFIXES and not hidden and other.is_file():
                skipped[other.suffix.lower() or "no ending"] += 1
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
    if os.path.isdir(path):
        return _open_frames(_frame_files(path), str(path))
    check_file(source)
    return open_video(path) if kind_of(path) == "video" else open_picture(path)


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
