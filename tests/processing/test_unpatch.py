"""The frames of a model's input are the resized frames."""

import numpy as np
import pytest
from PIL import Image

from tarsier_jax.processing.image import Qwen2ImageProcessor
from tarsier_jax.processing.square_image import ClipImageProcessor
from tarsier_jax.processing.unpatch import pictures_of


def random_frames(count: int, height: int, width: int) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


@pytest.mark.parametrize(("double", "count"), [(True, 3), (False, 3), (False, 4)])
def test_frames_of_qwen2_vl(double: bool, count: int) -> None:
    frames, image = random_frames(count, 56, 84), Qwen2ImageProcessor()
    patches, grid = image.patch(iter(frames), count, (0, 100_000), double, "clip")
    pictures = pictures_of(patches, grid, image, double)
    assert len(pictures) == (count if double else 4)
    for frame, picture in zip(frames, pictures, strict=False):
        assert (np.asarray(frame) == np.asarray(picture)).all()


def test_frames_of_the_first_tarsier() -> None:
    frames, image = random_frames(2, 56, 56), ClipImageProcessor(image_size=56)
    patches, grid = image.patch(iter(frames), 2, (0, 100_000), True, "clip")
    for frame, picture in zip(frames, pictures_of(patches, grid, image, True), strict=True):
        assert (np.asarray(frame) == np.asarray(picture)).all()
