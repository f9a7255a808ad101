"""`Clip`, the result of every reader of videos, animations and images, and the checks and errors that they share."""

import codecs
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from tarsier_jax.errors import InputError, MediaError
from tarsier_jax.files import check_local, check_source, is_remote
from tarsier_jax.processing.archives import Content, content_of, kind_of_place, open_content, split_archive
from tarsier_jax.processing.media_types import ACCEPTED, HEAD, kind_of_content, kind_of_suffix
from tarsier_jax.storage import fetch

_NAME = 1000  # maximum characters of a name in an error

Frame = Image.Image
FrameDecoder = Callable[[Sequence[int]], Iterator[Frame]]  # takes strictly increasing indices


@dataclasses.dataclass(frozen=True)
class ClipLimits:
    """Limits of a clip, which are checked before a frame is decoded.

    Attributes:
        max_bytes: Largest size of a file.
        max_pixels: Largest number of pixels of a frame.
        max_frames: Largest number of frames of a video.
        max_animation_frames: Largest number of frames of an animation, which are all decoded when it is opened.
        max_selected_frames: Largest number of frames that an item selects.
        max_seconds: Largest duration in seconds.
    """

    max_bytes: int = 256 << 20
    max_pixels: int = 50_000_000
    max_frames: int = 250_000
    max_animation_frames: int = 2_000
    max_selected_frames: int = 512
    max_seconds: float = 3_600.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise InputError(f"{name} must be above 0, not {value}.")


@dataclasses.dataclass(frozen=True)
class MediaFile:
    """A file to decode.

    Attributes:
        path: Where its content is.
        name: Its name in errors.
        kind: "video", "gif" or "image".
        limits: Limits of the clip; None for a trusted file.
        content: Its content, if it is a part of an archive; None for the content of `path`.
    """

    path: Path
    name: str
    kind: str
    limits: ClipLimits | None = None
    content: Content | None = None

    def open(self) -> BinaryIO:
        """Opens the content to read. Raises OSError."""
        return self.path.open("rb") if self.content is None else open_content(self.content)

    def check_frame_size(self, width: int, height: int) -> None:
        """Raises MediaError if frames of that size exceed the limits."""
        if self.limits is not None and width * height > self.limits.max_pixels:
            raise MediaError(
                f"{self.name} has frames of {width} x {height} pixels, but {self.limits.max_pixels} pixels are "
                "allowed. Scale it down.",
                "too_many_pixels",
            )

    def check_length(self, count: int, limit: int, seconds: float = 0.0) -> None:
        """Raises MediaError if `count` frames exceed `limit`, or if the duration exceeds the limits."""
        if self.limits is None:
            return
        if count > limit:
            raise MediaError(
                f"{self.name} has more than {limit} frames, the limit. Cut it into parts.", "too_many_frames"
            )
        if seconds > self.limits.max_seconds:
            raise MediaError(
                f"{self.name} lasts {seconds:.0f} seconds, but {self.limits.max_seconds:.0f} are allowed. Cut it into "
                "parts.",
                "too_long",
            )


def media_file(source: str | Path | MediaFile, limits: ClipLimits | None = None) -> MediaFile:
    """Returns a path, also one in an archive, or a URL as a file to decode; a MediaFile stays as it is.

    The content of a URL of an object store is fetched into a file without a name, which exists as long as the result.

    Raises:
        InputError: the URL cannot be read.
        MediaError: the file is missing, empty, too large, or of an unknown type.
    """
    if isinstance(source, MediaFile):
        return source
    if is_remote(source) or split_archive(source):
        content, kind, size = _fetched(str(source)) if is_remote(source) else content_of(source)
        if limits is not None:
            check_size(str(source), size, limits.max_bytes)
        return MediaFile(Path(source), str(source), kind, limits, content)
    check_file(source)
    path = Path(source)
    if limits is not None:
        check_size(str(source), path.stat().st_size, limits.max_bytes)
    return MediaFile(path, str(source), kind_of(source), limits)


def _fetched(url: str) -> tuple[Content, str, int]:
    """Returns the content of a URL, its kind and its size in bytes. Raises InputError."""
    content = fetch(url)
    if not content.size:
        raise MediaError(f"{url} is empty. Check the URL, or copy the file again.", "undecodable")
    kind = kind_of_suffix(url)
    if kind is None:
        with content.open() as file:
            kind = kind_of_content(file.read(HEAD), url)
    return content, kind, content.size


def check_size(name: str, size: int, limit: int) -> None:
    """Raises MediaError if a file of `size` bytes exceeds `limit`."""
    if size > limit:
        raise MediaError(
            f"{name} is larger than {limit} bytes, the limit. Encode it in a smaller size, or cut it into parts.",
            "too_large",
        )


@dataclasses.dataclass(frozen=True)
class Clip:
    """An opened clip.

    Attributes:
        name: The file, or a description of the source, for messages.
        length: The number of frames.
        rate: The mean number of frames per second, or None for frames without times.
        decode: Decodes the frames at strictly increasing indices.
        times: The time of each frame in seconds from the first frame, (length,), or None for frames without times.
        is_video: Whether the clip is a video file: not an animation, an image or a list of frames.
    """

    name: str
    length: int
    rate: float | None
    decode: FrameDecoder
    times: np.ndarray | None = None
    is_video: bool = False

    def read(self, indices: Sequence[int]) -> Iterator[Frame]:
        """Decodes the RGB frames at `indices`, in that order, with repetitions.

        Raises:
            InputError: a frame cannot be decoded, or an index is not in the clip.
        """
        outside = [i for i in indices if not 0 <= i < self.length]
        if outside:
            raise InputError(f"{self.name} has frames 0 to {self.length - 1}; frame {outside} does not exist.")
        if all(a < b for a, b in itertools.pairwise(indices)):
            return self.decode(indices)
        order = sorted(set(indices))
        frames = dict(zip(order, self.decode(order), strict=True))
        return (frames[i] for i in indices)


def kind_of(path: str | Path) -> str:
    """Returns "video", "gif" or "image" according to the ending of a name.

    A directory is a video with one image per frame. In a table, the column's name decides for values without a name.

    Raises:
        InputError: the ending is not accepted.
    """
    check_source("The file", str(path))
    if os.path.isdir(path):
        return "video"
    if kind := kind_of_suffix(path) or kind_of_place(path):
        return kind
    suffix = Path(path).suffix.lower()
    message = f"{path}: files ending in {suffix or 'nothing'} are not read. {ACCEPTED} Convert or rename it."
    raise MediaError(message, "unsupported")


def check_file(path: str | Path) -> None:
    """Raises InputError for a file that is missing or empty."""
    check_local("The file", str(path))
    path = Path(path)
    try:
        if path.is_file() and path.stat().st_size > 0:
            return
        problem = "is empty" if path.is_file() else "does not exist" if not path.exists() else "is not a file"
    except (OSError, ValueError) as e:
        problem = f"cannot be looked up ({getattr(e, 'strerror', None) or e})"
    reason = "undecodable" if problem == "is empty" else "forbidden" if problem == "is not a file" else "not_found"
    raise MediaError(f"{str(path)[:_NAME]} {problem}. Check the path, or copy the file again.", reason)


def name_content(file: str | Path | MediaFile) -> str | None:
    """Returns the type of a file that is not a supported picture, with its remedy, or None for an unknown type.

    A failed download often stores a web page or an error message under the name of the video or picture.
    """
    try:
        with file.open() if isinstance(file, MediaFile) else Path(file).open("rb") as stream:
            head = stream.read(512)
    except (OSError, ValueError):
        return None
    if head[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1"):
        return "a HEIC picture: convert it to JPEG"
    if head.startswith(b"%PDF-"):
        return "a PDF document: convert its page to PNG"
    head = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a git-lfs pointer: run `git lfs pull`"
    if b"<svg" in head:
        return "an SVG drawing: convert it to PNG"
    if head.startswith(b"<"):
        kind = "a web page" if b"<html" in head or b"<!doctype html" in head else "an XML document"
        return f"{kind}, so the download failed: download it again"
    if _is_text(head):
        kind = "a JSON document" if head.startswith((b"{", b"[")) else "text"
        return f"{kind}, perhaps the error message of a failed download: download it again"
    return None


def undecodable(
    name: str,
    file: str | Path | MediaFile,
    error: Exception,
    remedy: str = "repair a video with `ffmpeg -i broken.mp4 repaired.mp4`",
) -> MediaError:
    """Returns the error for a file, whose name in errors is `name` and whose decoding failed with `error`."""
    if content := name_content(file):
        return MediaError(f"{name} cannot be decoded: it is {content}.", "undecodable")
    detail = f" ({' '.join(str(error).split())[:200] or type(error).__name__})"
    return MediaError(
        f"{name} cannot be decoded: it is cut off, damaged, or without pictures{detail}. Copy it again, or {remedy}.",
        "undecodable",
        detail,
    )


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return bool(text) and all(character.isprintable() or character.isspace() for character in text)
