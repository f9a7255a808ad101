"""Resizes images and splits them into the patches of Qwen2-VL's vision tower.

The original resizes twice: first to its pixel budget, then Qwen2-VL's image processor resizes to whole patches within
its own limits. Both are bicubic with PIL. Both are needed, because a single resize changes the pixels.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tarsier_jax.config import VisionConfig
from tarsier_jax.errors import CheckpointError, InputError

_MAX_ASPECT = 200
BICUBIC = 3  # PIL's number, used in preprocessor_config.json


@dataclasses.dataclass(frozen=True)
class Qwen2ImageProcessor:
    """Resizes frames to whole tokens within limits of pixels, as HF's Qwen2VLImageProcessor.

    The attributes are the options in a checkpoint's preprocessor_config.json. The defaults are those of the released
    Tarsier2 models.

    Attributes:
        min_pixels: Minimum area of a resized image.
        max_pixels: Maximum area of a resized image.
        patch_size: Height and width of a patch in pixels.
        merge_size: Patches per side that are merged into one token.
        temporal_patch_size: Frames per temporal patch.
        rescale: Factor of pixel values.
        mean: Mean per channel of rescaled values.
        std: Standard deviation per channel of rescaled values.
        double_frames: Whether every frame of a video fills its own temporal patch. False for a checkpoint that was
            trained on temporal patches of consecutive frames. Only this project writes this key.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 12_845_056
    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    rescale: float = 1 / 255
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    double_frames: bool = True

    @property
    def factor(self) -> int:
        """Divisor in pixels of the height and width of a resized image."""
        return self.patch_size * self.merge_size

    @property
    def largest_frame(self) -> int:
        """Number of patches of the largest frame."""
        return self.max_pixels // self.factor**2 * self.merge_size**2

    def patch(
        self, frames: Iterable[Image.Image], count: int, limits: tuple[int, int], double: bool, name: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Resizes the frames of a visual to the limits, minimum and maximum of pixels, and calls `patch_frames`."""
        return patch_frames((fit_budget(frame, *limits, name) for frame in frames), count, self, double, name)


def load_image_processor(directory: str | Path, vision: VisionConfig) -> Qwen2ImageProcessor:
    """Reads preprocessor_config.json, or the `image_processor` of processor_config.json, which transformers 5 writes.

    Raises:
        CheckpointError: the file cannot be read, contradicts config.json, or has other steps than Qwen2-VL's.
    """
    default = Qwen2ImageProcessor(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
    )
    raw, path = read_preprocessor(Path(directory))
    return default if raw is None else _parse_options(raw, default, path)


def read_preprocessor(directory: Path) -> tuple[dict[str, Any] | None, Path]:
    """Returns the options of an image processor and their file, or None if the directory lacks them."""
    path = directory / "preprocessor_config.json"
    raw = read_json(path)
    if raw is None:
        path = directory / "processor_config.json"
        raw = (read_json(path) or {}).get("image_processor")
    return raw, path


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file, or None if the file does not exist.

    Raises:
        CheckpointError: the file cannot be read, or contains another value than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON ({e}). Download the file again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not contain a JSON object. Download the file again.")
    return content


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, name: str = "The image"
) -> tuple[int, int]:
    """Returns the nearest height and width that are multiples of `factor` with an area of min_pixels to max_pixels.

    Source: HF qwen2_vl.image_processing_qwen2_vl.smart_resize of transformers 4.47, which also rejects a side shorter
    than `factor`.

    Args:
        name: Start of the error message.

    Raises:
        InputError: a side is shorter than `factor`, or one is more than 200 times the other.
    """
    if min(height, width) < 1 or max(height, width) > _MAX_ASPECT * min(height, width):
        raise InputError(
            f"{name} is {width} x {height} pixels: one side is more than {_MAX_ASPECT} times the other. Crop it."
        )
    if min(height, width) < factor:
        area = math.ceil(height * width * (factor / min(height, width)) ** 2)
        raise InputError(
            f"{name} is {width} x {height} pixels after fitting the pixel budget; each side needs {factor}. Set "
            f"min_pixels, and max_pixels if it is lower, to {area} or more; use fewer frames if their number lowers "
            "max_pixels; or crop the longer side."
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def fit_budget(image: Image.Image, min_pixels: int, max_pixels: int, name: str = "The image") -> Image.Image:
    """First resize: brings the area of the image within the budget and keeps its aspect ratio."""
    height, width = smart_resize(image.height, image.width, 1, min_pixels, max_pixels, name)
    return resize(image, height, width)


def temporal_patches(frames: int, size: int, double: bool) -> int:
    """Returns the number of temporal patches: one per frame if `double`, else one per `size` frames."""
    return frames if double else -(-frames // size)


def patch_frames(
    frames: Iterable[Image.Image], count: int, options: Qwen2ImageProcessor, double: bool, name: str = "The image"
) -> tuple[np.ndarray, np.ndarray]:
    """Second resize, normalisation and patches of one visual, in the order of HF's Qwen2VLImageProcessor.

    Args:
        frames: `count` RGB images. All are resized to the size of the first one.
        count: Number of frames.
        options: Sizes, limits and normalisation.
        double: Whether every frame fills its own temporal patch. Otherwise consecutive frames share one, and the last
            frame is repeated to complete the last one.
        name: Start of error messages.

    Returns:
        Patches float32 (patches, C), C = channels x frames per temporal patch x 14 x 14, and the grid int32 (3,): time,
        height, width in patches.

    Raises:
        InputError: `frames` is empty, or their size cannot be used (see `smart_resize`).
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise InputError(f"{name} is without frames. Check its indices, and its start and end.")
    limits = options.min_pixels, options.max_pixels
    T, patch, merge, factor = options.temporal_patch_size, options.patch_size, options.merge_size, options.factor
    height, width = smart_resize(first.height, first.width, factor, *limits, name)
    t = temporal_patches(count, T, double)
    out = np.empty((t, height // factor, width // factor, merge, merge, 3, T, patch, patch), np.float32)
    scale, shift = normalisation(options.rescale, options.mean, options.std)
    for i, frame in zip(range(count), itertools.chain([first], frames), strict=True):
        values = normalised_patches(resize(frame, height, width), patch, merge, scale, shift)[..., None, :, :]
        if double:
            out[i] = values
        else:
            end = T if i == count - 1 else i % T + 1  # the last frame completes its temporal patch
            out[i // T, ..., i % T : end, :, :] = values
    grid = np.array([t, height // patch, width // patch], np.int32)
    return out.reshape(int(grid.prod()), -1), grid


def normalisation(rescale: float, mean: Sequence[float], std: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns rescaling and normalisation as one scale and one shift, float32 (channels, 1, 1) each."""
    scale, shift = rescale / np.array(std), -np.array(mean) / np.array(std)
    return scale.astype(np.float32)[:, None, None], shift.astype(np.float32)[:, None, None]


def normalised_patches(image: Image.Image, patch: int, merge: int, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Returns blocks of `merge` x `merge` patches, row by row.

    Their shape is (height/28, width/28, 2, 2, channels, 14, 14) for Qwen2-VL, in float32.
    """
    rows, columns = image.height // (patch * merge), image.width // (patch * merge)
    pixels = np.asarray(image).reshape(rows, merge, patch, columns, merge, patch, 3)
    # Transposing bytes before converting them is several times faster than the opposite order.
    values = np.ascontiguousarray(pixels.transpose(0, 3, 1, 4, 6, 2, 5)).astype(np.float32)
    values *= scale
    values += shift
    return values


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Returns an image of that size, bicubic with PIL; the image itself if it has it."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _parse_options(raw: Mapping[str, Any], default: Qwen2ImageProcessor, path: Path) -> Qwen2ImageProcessor:
    low = _limit(raw, "min_pixels", "shortest_edge")
    high = _limit(raw, "max_pixels", "longest_edge")
    options = dataclasses.replace(
        default,
        min_pixels=default.min_pixels if low is None else int(low),
        max_pixels=default.max_pixels if high is None else int(high),
        rescale=raw.get("rescale_factor") or default.rescale,
        mean=tuple(raw.get("image_mean") or default.mean),
        std=tuple(raw.get("image_std") or default.std),
        double_frames=bool(raw.get("double_frames", default.double_frames)),
    )
    for key in ("patch_size", "merge_size", "temporal_patch_size"):
        expected = getattr(default, key)
        if raw.get(key, expected) != expected:
            raise CheckpointError(
                f"{path} has {key} {raw[key]}, but vision_config in {path.with_name('config.json')} has {expected}. "
                "The two come from different models: copy both from one."
            )
    steps = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
    odd = [key for key in steps if not raw.get(key, True)]
    if raw.get("resample", BICUBIC) != BICUBIC:
        odd.append("resample")
    if odd or options.min_pixels > options.max_pixels or len(options.mean) != 3 or len(options.std) != 3:
        raise CheckpointError(
            f"{path} has other steps than Qwen2-VL's ({', '.join(odd) or 'sizes, mean or std'}), which are not "
            "supported. Copy the file from the released model again."
        )
    return options


def _limit(raw: Mapping[str, Any], name: str, edge: str) -> Any:
    """Returns a limit, which is at the top level, or in `size` under an old or a new name."""
    size = raw.get("size") or {}
    return next((v for v in (raw.get(name), size.get(name), size.get(edge)) if v is not None), None)
