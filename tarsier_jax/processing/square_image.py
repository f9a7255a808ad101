"""Resizes frames to one size, as the first Tarsier, and splits them into the patches of CLIP's vision tower.

The original resizes twice, both times bicubic with PIL: first it stretches a frame to a square of its longer side, then
CLIP's image processor resizes the square. A single resize changes the pixels.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tarsier_jax.config import ClipVisionConfig
from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.processing.image import BICUBIC, normalisation, normalised_patches, read_preprocessor, resize


@dataclasses.dataclass(frozen=True)
class ClipImageProcessor:
    """Resizes frames to squares of one size, as HF's CLIPImageProcessor. Limits of pixels have no effect.

    The defaults are those of CLIP ViT-L/14-336.

    Attributes:
        image_size: Height and width of a resized frame in pixels.
        patch_size: Height and width of a patch in pixels.
        rescale: Factor of pixel values.
        mean: Mean per channel of rescaled values.
        std: Standard deviation per channel of rescaled values.
        pad: Whether a frame is centered on a square of the mean color. Otherwise it is stretched to the square, as in
            all programs of the original.
    """

    image_size: int = 336
    patch_size: int = 14
    rescale: float = 1 / 255
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    pad: bool = False

    @property
    def double_frames(self) -> bool:
        """Whether every frame fills its own temporal patch: a patch of CLIP has one frame."""
        return True

    @property
    def largest_frame(self) -> int:
        """Number of patches of a frame."""
        return (self.image_size // self.patch_size) ** 2

    def patch(
        self, frames: Iterable[Image.Image], count: int, limits: tuple[int, int], double: bool, name: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Resizes, normalises and splits the frames of a visual.

        Args:
            frames: `count` RGB images.
            count: Number of frames.
            limits: Minimum and maximum of pixels per frame, without effect.
            double: Whether every frame fills its own temporal patch, as it always does.
            name: Start of error messages.

        Returns:
            Patches float32 (patches, C), row by row, with C = channels x 14 x 14 as in the weight of CLIP's
            convolution, and the grid int32 (3,): time, height, width in patches.

        Raises:
            InputError: `frames` is empty.
        """
        side = self.image_size // self.patch_size
        out = np.empty((count, side**2, 3 * self.patch_size**2), np.float32)
        scale, shift = normalisation(self.rescale, self.mean, self.std)
        if not count:
            raise InputError(f"{name} is without frames. Check its indices, and its start and end.")
        for i, frame in zip(range(count), frames, strict=True):
            square = resize(self._to_square(frame), self.image_size, self.image_size)
            out[i] = normalised_patches(square, self.patch_size, 1, scale, shift).reshape(side**2, -1)
        return out.reshape(count * side**2, -1), np.array([count, side, side], np.int32)

    def _to_square(self, frame: Image.Image) -> Image.Image:
        size = max(frame.size)
        if not self.pad or frame.width == frame.height:
            return resize(frame, size, size)
        color = tuple(int(255 * mean) for mean in self.mean)
        ground = Image.new("RGB", (size, size), color)
        ground.paste(frame, ((size - frame.width) // 2, (size - frame.height) // 2))
        return ground


def load_square_processor(directory: str | Path, vision: ClipVisionConfig) -> ClipImageProcessor:
    """Reads preprocessor_config.json, or the `image_processor` of processor_config.json, which transformers 5 writes.

    Raises:
        CheckpointError: the file cannot be read, contradicts config.json, or has other steps than CLIP's.
    """
    default = ClipImageProcessor(image_size=vision.image_size, patch_size=vision.patch_size)
    raw, path = read_preprocessor(Path(directory))
    return default if raw is None else _parse_options(raw, default, path)


def _parse_options(raw: Mapping[str, Any], default: ClipImageProcessor, path: Path) -> ClipImageProcessor:
    options = dataclasses.replace(
        default,
        rescale=raw.get("rescale_factor") or default.rescale,
        mean=tuple(raw.get("image_mean") or default.mean),
        std=tuple(raw.get("image_std") or default.std),
    )
    for key in ("size", "crop_size"):
        sizes = {raw[key]} if isinstance(raw.get(key), int) else set((raw.get(key) or {}).values())
        if sizes - {default.image_size}:
            raise CheckpointError(
                f"{path} has {key} {raw[key]}, but vision_config in {path.with_name('config.json')} has image_size "
                f"{default.image_size}. The two come from different models: copy both from one."
            )
    steps = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
    odd = [key for key in steps if not raw.get(key, True)]
    if raw.get("resample", BICUBIC) != BICUBIC:
        odd.append("resample")
    if odd or len(options.mean) != 3 or len(options.std) != 3:
        raise CheckpointError(
            f"{path} has other steps than CLIP's ({', '.join(odd) or 'mean or std'}), which are not supported. Copy "
            "the file from the released model again."
        )
    return options
