"""Reads picture files and animations as an image viewer shows them.

Pictures are turned upright, transparency is flattened over white, and values of any bit depth are scaled to 8 bits.
"""

import contextlib
import io
import math
import struct
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, TiffImagePlugin

from tarsier_jax.errors import InputError, MediaError
from tarsier_jax.files import warn
from tarsier_jax.processing.clip import Clip, ClipLimits, Frame, MediaFile, media_file, undecodable

MAX_PIXELS = 500_000_000  # a picture of this size takes 2 GB of memory
_FULL_PIXELS = 100_000_000  # JPEGs with more pixels are decoded at a reduced size

# Pillow warns above its limit and raises an error above twice its limit, which a panorama exceeds.
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS // 2)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "Corrupt EXIF data")  # broken Exif data is ignored

# The errors that Pillow raises for broken files.
_IMAGE_ERRORS = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, struct.error)
# The formats of files that are not trusted. Pillow knows many more, and starts Ghostscript for one of them.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
_ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF")  # Pillow's names of the formats whose frames have times
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # modes of more than 8 bits, which Pillow clips
_ALPHA_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: str | Path | MediaFile | Image.Image | np.ndarray, limits: ClipLimits | None = None) -> Frame:
    """Returns one image as RGB, as an image viewer shows it.

    Args:
        source: A file, a PIL image, or a uint8 array (H, W, 3). A PIL image is treated like a file of its mode and
            metadata: it is turned if its Exif data says so. Of a file with several frames or pages the first one is
            used, with a warning.
        limits: Limits of a path; None for a trusted file.

    Raises:
        InputError: The source is missing, undecodable, too large, a video, or an array of another type or shape.
    """
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "A PIL image in memory")
        with _input_errors(name, name):
            return as_shown(source)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[-1] != 3 or source.size == 0:
            raise InputError(
                f"A frame in memory is an array {source.dtype} {source.shape}. Pass uint8 arrays of shape (H, W, 3)."
            )
        return Image.fromarray(source)
    if not isinstance(source, str | Path | MediaFile):
        raise InputError(
            f"{source!r:.200} is not an image. Pass a path, a PIL image, or a uint8 array of shape (H, W, 3)."
        )
    file = media_file(source, limits)
    if file.kind == "video":
        raise MediaError(
            f"{file.name} is a video instead of an image. Use a video item, or video_file with frame_indices.",
            "unsupported",
        )
    with _opened(file) as (image, _):
        if _is_animated(image):
            warn(f"{file.name} is an animation; only its first frame is used. Use a video item for all frames.")
        elif image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
            warn(f"{file.name} has several pages; only the first one is used. Save the others as files.")
        return as_shown(image)


def open_picture(file: MediaFile) -> Clip:
    """Opens a picture file: a GIF, an animated PNG or an animated WebP with all its frames, others as one frame.

    Raises:
        InputError: The file cannot be decoded, its end is missing, or it exceeds its limits.
    """
    with _opened(file) as (image, stream):
        if image.format != "GIF" and not _is_animated(image):
            return Clip(file.name, 1, None, lambda indices: (load_image(file) for _ in indices))
        first = int(getattr(image, "default_image", False))  # a PNG for programs that do not know animations
        durations = _durations(image, stream, file)[first:]
    # Browsers show frames of up to 10 ms, and frames without a duration, for 100 ms.
    ends = np.cumsum([ms if ms > 10 else 100 for ms in durations])
    times = np.concatenate([[0.0], ends[:-1]]) / 1000
    rate = float(1000 * len(ends) / ends[-1])
    file.check_length(len(ends), len(ends), float(ends[-1]) / 1000)
    return Clip(file.name, len(ends), rate, lambda indices: _decode_animation(file, indices, first), times)


def is_animation(path: str | Path) -> bool:
    """Whether a picture file has several frames with times. False for a file that cannot be read."""
    try:
        with _opened(media_file(path)) as (image, _):
            return _is_animated(image)
    except InputError:
        return False


def as_shown(image: Image.Image) -> Frame:
    """Returns a picture as RGB, as an image viewer shows it. Metadata is dropped; `image` does not change."""
    image.load()
    frame = _to_srgb(image, _flattened(image))
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises errors of many kinds for broken Exif data, but the pixels are sound
        turn = None
    frame = frame if turn is None else frame.transpose(turn)
    frame.info.clear()  # otherwise a second reading of the frame would rotate it again
    return frame


def _flattened(image: Image.Image) -> Frame:
    """Returns RGB, 8 bits, over white. An opaque picture of 8 bits equals the result of `convert("RGB")`."""
    if image.mode in _DEEP_MODES:
        image = _scaled(image)
    elif image.mode == "La":
        image = image.convert("LA")
    if image.mode not in _ALPHA_MODES or not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return rgba.convert("RGB")
    ground = Image.new("RGB", rgba.size, "white")
    ground.paste(rgba, mask=alpha)
    return ground


def _scaled(image: Image.Image) -> Image.Image:
    """Scales grey levels of more than 8 bits to 8 bits: mode "L", or "LA" if one level is transparent."""
    values = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {})  # of a TIFF file
    if image.mode == "I" and tags.get(TiffImagePlugin.SAMPLEFORMAT, (1 if tags else 2,))[0] == 1:
        values = values.view(np.uint32)  # Pillow reads unsigned integers as signed ones
    levels = _levels(values, tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0])
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        levels = 255 - levels  # zero is white
    grey = Image.fromarray(levels)
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))))


def _levels(values: np.ndarray, bits: int) -> np.ndarray:
    """Scales values (H, W) to uint8.

    Integers of up to 16 bits are scaled by their bit depth, which keeps the high byte, as Pillow does for colors. Files
    do not state the range of wider integers and of floats. Integers from 0 to 255 are levels, integers from 0 to 65535
    are of 16 bits, and floats from 0 to 1 are fractions of white. Other values are scaled from their minimum (black) to
    their maximum (white). Values that are not finite are black.
    """
    if values.dtype.itemsize == 2:
        return (values >> (bits - 8)).astype(np.uint8)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(values.shape, np.uint8)
    low, high = float(values[finite].min()), float(values[finite].max())
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        return (values >> (0 if high <= 255 else 8)).astype(np.uint8)
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    fractions = (np.where(finite, values, low).astype(np.float64) - low) / ((high - low) or 1.0)
    return (fractions * 255).round().astype(np.uint8)


def _to_srgb(image: Image.Image, frame: Frame) -> Frame:
    """Applies the color profile of `image` to its frame. Without a usable profile, the frame is returned unchanged."""
    profile = image.info.get("icc_profile")
    if not profile:
        return frame
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return frame
        colors = image if image.mode == "CMYK" else frame
        target = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(colors, source, target, outputMode="RGB") or frame
    except (ImageCms.PyCMSError, ImportError, *_IMAGE_ERRORS):  # damaged, or for other colors, such as grey
        return frame


@contextlib.contextmanager
def _opened(file: MediaFile) -> Iterator[tuple[ImageFile.ImageFile, BinaryIO]]:
    """Opens a picture file and yields it with its file object. Errors in the block are raised as InputError."""
    formats = None if file.limits is None else _FORMATS
    # Pillow maps some files that it opens by name into memory, and then rotates a TIFF with alpha wrongly.
    with (
        _input_errors(file.name, file),
        file.open() as stream,
        Image.open(stream, formats=formats) as image,
    ):
        file.check_frame_size(image.width, image.height)
        scale = math.ceil(math.sqrt(image.width * image.height / _FULL_PIXELS))
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))  # only JPEG can
        _scale_transparency(image)
        yield image, stream


@contextlib.contextmanager
def _input_errors(name: str, file: str | MediaFile) -> Iterator[None]:
    try:
        yield
    except Image.DecompressionBombError as e:
        raise MediaError(
            f"{name} is too large: pictures of up to {MAX_PIXELS // 10**6} megapixels are read ({e}). Scale it down, "
            "for example with `magick large.png -resize 25% small.png`.",
            "too_many_pixels",
        ) from None
    except _IMAGE_ERRORS as e:
        raise undecodable(name, file, e, "convert it to PNG or JPEG if a viewer shows it") from None


def _scale_transparency(image: ImageFile.ImageFile) -> None:
    """Scales the transparent color of a PNG to 8 bits, as Pillow scales the pixels."""
    color: Any = image.info.get("transparency")
    if color is None or not image.tile:
        return
    raw_mode = image.tile[0][3]
    if raw_mode in ("L;2", "L;4"):
        image.info["transparency"] = color * (85 if raw_mode == "L;2" else 17)
    elif raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in color)


def _is_animated(image: Image.Image) -> bool:
    return image.format in _ANIMATIONS and getattr(image, "is_animated", False)


def _durations(image: Image.Image, stream: BinaryIO, file: MediaFile) -> list[float]:
    """Returns the duration of each frame in ms, 0 for none. Decodes every frame to find broken ones."""
    if file.limits is not None:
        # Pillow finds the frames of a GIF without decoding them. Other formats state their number.
        file.check_length(getattr(image, "n_frames", 1), file.limits.max_animation_frames)
    durations = []
    with contextlib.suppress(EOFError):
        while True:
            image.seek(len(durations))
            image.load()
            durations.append(image.info.get("duration", 0))
    if image.format == "GIF":
        stream.seek(-1, io.SEEK_CUR)
        complete = stream.read(1) == b";"  # the end mark; without it frames may be missing
    else:
        complete = len(durations) == getattr(image, "n_frames", 1)
    if not complete:
        raise EOFError(f"the file ends after {len(durations)} frames")
    return durations


def _decode_animation(file: MediaFile, indices: Sequence[int], first: int) -> Iterator[Frame]:
    with _opened(file) as (image, _):
        for i in indices:
            image.seek(first + i)
            yield as_shown(image)
