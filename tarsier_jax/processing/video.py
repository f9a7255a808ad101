"""Reads selected frames of videos, GIFs, images and sequences of frames as PIL images.

Every reader yields frames one by one. A clip of many large frames is never in memory as a whole.
"""

import collections
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tarsier_jax.errors import InputError
from tarsier_jax.files import is_remote
from tarsier_jax.processing.archives import split_archive
from tarsier_jax.processing.clip import (
    Clip,
    ClipLimits,
    MediaFile,
    check_file,
    kind_of,
    media_file,
)
from tarsier_jax.processing.image_files import load_image, open_picture
from tarsier_jax.processing.media_types import ACCEPTED, IMAGE_SUFFIXES, MEDIA_SUFFIXES
from tarsier_jax.processing.video_files import open_video

__all__ = ["Clip", "find_inputs", "kind_of", "load_image", "natural_key", "open_clip"]


def find_inputs(path: str | Path, other_endings: collections.Counter[str] | None = None) -> list[str | Path]:
    """Returns a media file or its URL itself, or all media files in a directory and below, in natural order.

    Args:
        path: A file or directory.
        other_endings: Counter to which the endings of other files in the directory are added, except hidden files.

    Raises:
        InputError: the path does not exist, the directory is without media files, or the ending is not accepted.
    """
    if is_remote(path):
        kind_of(path)
        return [path]
    path = Path(path)
    if os.path.isdir(path):
        entries = [p for p in path.rglob("*") if not p.name.startswith(".")]
        files = [p for p in entries if p.suffix.lower() in MEDIA_SUFFIXES]
        for other in entries:
            suffix, is_hidden = other.suffix.lower(), any(p.startswith(".") for p in other.relative_to(path).parts)
            if other_endings is not None and suffix not in MEDIA_SUFFIXES and not is_hidden and other.is_file():
                other_endings[suffix or "no ending"] += 1
        if not files:
            raise InputError(f"{path} contains no video, animation or image. {ACCEPTED}")
        return sorted(files, key=natural_key)
    if split_archive(path) is None:
        check_file(path)
    kind_of(path)
    return [path]


def open_clip(source: str | Path | MediaFile | Sequence[Any] | np.ndarray, limits: ClipLimits | None = None) -> Clip:
    """Opens a video, a GIF, an image, a directory of frames, or a list of frames (files, PIL images, uint8 arrays).

    Args:
        source: The source. A MediaFile has its own limits.
        limits: Limits of each file; None for trusted files.

    Raises:
        InputError: a file is missing, empty, undecodable, of an unknown type, or exceeds its limits; a directory or a
            list is empty.
    """
    if isinstance(source, list | tuple | np.ndarray):
        return _open_frames(list(source), f"a list of {len(source)} frames", limits)
    if not isinstance(source, str | Path | MediaFile):
        raise InputError(f"{source!r:.200} is not a clip. Pass a path, or a list of frames.")
    if not isinstance(source, MediaFile) and os.path.isdir(source):
        return _open_frames(_frame_files(Path(source)), str(Path(source)), limits)
    file = media_file(source, limits)
    return open_video(file) if file.kind == "video" else open_picture(file)


def natural_key(path: str | Path) -> list[Any]:
    """Returns a sort key that orders frame2 before frame10."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", str(path))]


def _frame_files(directory: Path) -> list[Path]:
    files = [p for p in directory.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    if not files:
        raise InputError(f"{directory} contains no images, so it is not a clip of frames. {ACCEPTED}")
    return sorted(files, key=natural_key)


def _open_frames(sources: list[Any], name: str, limits: ClipLimits | None) -> Clip:
    if not sources:
        raise InputError("A list of frames is empty. Pass at least one image.")
    return Clip(name, len(sources), None, lambda indices: (load_image(sources[i], limits) for i in indices))
