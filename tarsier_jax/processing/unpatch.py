"""The frames that the model receives, as pictures."""

import numpy as np
from PIL import Image

from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.image import Qwen2ImageProcessor, normalisation
from tarsier_jax.processing.processor import Processor
from tarsier_jax.processing.square_image import ClipImageProcessor
from tarsier_jax.processing.visuals import VisualInputs


def frames_of(visuals: Example | VisualInputs, index: int, processor: Processor) -> list[Image.Image]:
    """Returns the frames of one image or video of a sample as the model receives them."""
    sizes = visuals.grid_thw.prod(axis=1)
    start = int(sizes[:index].sum())
    patches = visuals.pixel_values[start : start + int(sizes[index])]
    frames = pictures_of(patches, visuals.grid_thw[index], processor.image, processor.double_frames)
    return frames[: len(visuals.selections[index].indices)]  # a patch of two frames may contain the last one twice


def pictures_of(
    patches: np.ndarray, grid: np.ndarray, image: Qwen2ImageProcessor | ClipImageProcessor, double: bool
) -> list[Image.Image]:
    """Returns the frames of one image or video, the inverse of `image.patch`.

    Args:
        patches: float32 (patches, C).
        grid: int32 (3,), time, height and width in patches.
        image: The image processor that made the patches.
        double: Whether every frame fills its own temporal patch.
    """
    frames, merge = 1, 1  # per temporal patch, and patches per side of a block
    if isinstance(image, Qwen2ImageProcessor):
        frames, merge = image.temporal_patch_size, image.merge_size
    (t, height, width), size = grid.tolist(), image.patch_size
    values = patches.reshape(t, height // merge, width // merge, merge, merge, 3, frames, size, size)
    if double:
        values = values[:, :, :, :, :, :, :1]
    scale, shift = normalisation(image.rescale, image.mean, image.std)
    values = (values - shift[:, None]) / scale[:, None]  # their shape is (channels, 1, 1, 1) here
    values = values.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(-1, height * size, width * size, 3)
    return [Image.fromarray(frame) for frame in np.clip(np.rint(values), 0, 255).astype(np.uint8)]
