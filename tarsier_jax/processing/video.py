"""Reading videos, GIFs, images and sequences of frames: exactly the frames asked for, as PIL images.

Every reader gives frames one by one, so that a clip of many large frames is never in memory as a whole.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tarsier_jax.errors import InputError

VIDEO_SUFFIXES = (".mp4", ".avi", ".webm", ".mov", ".mkv", ".wmv")
GIF_SUFFIXES = (".gif",)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
ACCEPTED = (
    f"Videos end in {' '.join(VIDEO_SUFFIXES)}, animations in {' '.join(GIF_SUFFIXES)}, "
    f"images in {' '.join(IMAGE_SUFFIXES)}; upper case will do."
)

# decord's seeking misses by some frames, or by whole groups of pictures, where the order of packets differs from that
# of frames (AVI and MPEG-4 with B frames, HEVC with open groups, WMV). Decoding from the start never does, and costs
# about the same up to this many frames. Frames of longer clips are sought.
_SCAN_FRAMES = 3000
_SEEK_BATCH = 16  # frames decoded together when seeking: bounds the memory of a clip of hundreds of large frames
_IMAGE_ERRORS = (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises

Frame = Image.Image
Decoder = Callable[[Sequence[int]], Iterator[Frame]]  # takes strictly increasing indices


@dataclasses.dataclass(frozen=True)
class Clip:
    """An opened clip. `name` is for messages, `length` counts frames, `rate` is frames a second, if it has one."""

    name: str
    length: int
    rate: float | None
    decode: Decoder

    def read(self, indices: Sequence[int]) -> Iterator[Frame]:
        """RGB frames at the given indices, in the order given, repeated where an index is.

        Raises:
            InputError: a frame cannot be decoded, or an index is not in the clip.
        """
        outside = [i for i in indices if not 0 <= i < self.length]
        if outside:
            raise InputError(f"{self.name} has frames 0 to {self.length - 1}; there is no frame {outside}.")
        if all(a < b for a, b in itertools.pairwise(indices)):
            return self.decode(indices)
        order = sorted(set(indices))
        frames = dict(zip(order, self.decode(order), strict=True))
        return (frames[i] for i in indices)


def kind_of(path: str | Path) -> str:
    """Says "video", "gif" or "image" by the ending of a name; a directory is a video, one image a frame.

    Raises:
        InputError: the ending is none of the accepted ones.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir() or suffix in VIDEO_SUFFIXES:
        return "video"
    if suffix in GIF_SUFFIXES:
        return "gif"
    if suffix in IMAGE_SUFFIXES:
        return "image"
    raise InputError(f"{path}: files ending in {suffix or 'nothing'} are not read. {ACCEPTED} Convert or rename it.")


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
    openers = {"video": _open_video, "gif": _open_gif, "image": lambda p: _open_frames([p], str(p))}
    return openers[kind_of(path)](path)


def load_image(source: str | Path | Image.Image | np.ndarray) -> Frame:
    """One image as RGB: a file, a PIL image, or an array uint8 (H, W, 3). Of a GIF, the first frame."""
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[-1] != 3 or source.size == 0:
            raise InputError(
                f"A frame in memory is an array {source.dtype} {source.shape}. Give uint8 arrays of shape (H, W, 3)."
            )
        return Image.fromarray(source)
    if not isinstance(source, str | Path):
        raise InputError(f"{source!r} is no image. Give a path, a PIL image, or a uint8 array of shape (H, W, 3).")
    check_file(Path(source))
    if kind_of(source) == "video":
        raise InputError(
            f"{source} is a video where an image belongs. Use a video item, or video_file with frame_indices."
        )
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except _IMAGE_ERRORS as e:
        raise _undecodable(str(source), e) from None


def natural_key(path: Path) -> list[Any]:
    """Sorts frame2 before frame10."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", path.as_posix())]


def check_file(path: Path) -> None:
    """Raises InputError for a file that is missing or empty."""
    try:
        if path.is_file() and path.stat().st_size > 0:
            return
        problem = "is empty" if path.is_file() else "does not exist" if not path.exists() else "is no file"
    except (OSError, ValueError) as e:
        problem = f"cannot be looked up ({e})"
    raise InputError(f"{path} {problem}. Check the path, or copy the file again.")


def _frame_files(directory: Path) -> list[Path]:
    files = [p for p in directory.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    if not files:
        raise InputError(f"{directory} holds no images, so it is no clip of frames. {ACCEPTED}")
    return sorted(files, key=natural_key)


def _open_frames(sources: list[Any], name: str) -> Clip:
    if not sources:
        raise InputError("A list of frames is empty. Give at least one image.")
    return Clip(name, len(sources), None, lambda indices: (load_image(sources[i]) for i in indices))


def _open_gif(path: Path) -> Clip:
    try:
        with Image.open(path) as gif:
            length = getattr(gif, "n_frames", 1)
            seconds = gif.info.get("duration", 0) / 1000  # of the first frame
    except _IMAGE_ERRORS as e:
        raise _undecodable(str(path), e) from None
    return Clip(str(path), length, 1 / seconds if seconds > 0 else None, lambda indices: _decode_gif(path, indices))


def _decode_gif(path: Path, indices: Iterable[int]) -> Iterator[Frame]:
    try:
        with Image.open(path) as gif:
            for i in indices:
                gif.seek(i)
                yield gif.convert("RGB")
    except _IMAGE_ERRORS as e:
        raise _undecodable(str(path), e) from None


def _open_video(path: Path) -> Clip:
    from decord import VideoReader, cpu, logging

    logging.set_level(logging.QUIET)  # what is wrong with a file is said by us
    try:
        reader = VideoReader(str(path), ctx=cpu(0), num_threads=1, fault_tol=1)
        length, rate = len(reader), float(reader.get_avg_fps())
    except Exception as e:  # decord raises DECORDError, RuntimeError and AssertionError for broken files
        raise _undecodable(str(path), e) from None
    return Clip(str(path), length, rate if rate > 0 else None, lambda indices: _decode_video(reader, path, indices))


def _decode_video(reader: Any, path: Path, indices: Sequence[int]) -> Iterator[Frame]:
    frames = _scan(reader, indices) if indices and indices[-1] < _SCAN_FRAMES else _seek(reader, indices)
    while True:
        try:
            frame = next(frames, None)
        except Exception as e:  # as above; a decoder that ends early makes the generator raise RuntimeError
            raise _undecodable(str(path), e) from None
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


def _undecodable(name: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(
        f"{name} cannot be decoded: it is cut off, damaged, or holds no pictures ({reason}). Copy it again, or mend a "
        "video with `ffmpeg -i broken.mp4 mended.mp4`."
    )
