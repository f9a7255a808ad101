"""Reading picture files and animations, as an image viewer shows them."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tarsier_jax.errors import InputError
from tarsier_jax.processing.clip import Clip, Frame, check_file, kind_of, undecodable

_IMAGE_ERRORS = (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises


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
    check_file(source)
    if kind_of(source) == "video":
        raise InputError(
            f"{source} is a video where an image belongs. Use a video item, or video_file with frame_indices."
        )
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except _IMAGE_ERRORS as e:
        raise undecodable(str(source), e) from None


def open_gif(path: Path) -> Clip:
    try:
        with Image.open(path) as gif:
            length = getattr(gif, "n_frames", 1)
            seconds = gif.info.get("duration", 0) / 1000  # of the first frame
    except _IMAGE_ERRORS as e:
        raise undecodable(str(path), e) from None
    return Clip(str(path), length, 1 / seconds if seconds > 0 else None, lambda indices: _decode_gif(path, indices))


def _decode_gif(path: Path, indices: Iterable[int]) -> Iterator[Frame]:
    try:
        with Image.open(path) as gif:
            for i in indices:
                gif.seek(i)
                yield gif.convert("RGB")
    except _IMAGE_ERRORS as e:
        raise undecodable(str(path), e) from None
