import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tarsier_jax.config import Qwen2VisionConfig
from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.processing.image import (
    Qwen2ImageProcessor,
    fit_budget,
    load_image_processor,
    patch_frames,
    smart_resize,
)
from tests.processing.conftest import DATA, formula_frame, write_json

OPTIONS = Qwen2ImageProcessor()


def test_patches_are_the_originals() -> None:
    table = np.load(DATA / "upstream_patches.npz")
    for name in ("a", "b", "c", "d", "e"):
        width, height, count, max_pixels, min_pixels = table[f"{name}/spec"].tolist()
        frames = (fit_budget(formula_frame(width, height, t), min_pixels, max_pixels) for t in range(count))
        patches, grid = patch_frames(frames, count, OPTIONS, double=True)
        np.testing.assert_array_equal(grid, table[f"{name}/grid"])
        assert patches.dtype == np.float32 and patches.shape == (grid.prod(), 1176)
        np.testing.assert_allclose(patches[table[f"{name}/rows"]], table[f"{name}/patches"], rtol=0, atol=1e-5)


def test_patches_are_those_of_transformers() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    frames = [formula_frame(150, 90, t) for t in range(3)]
    expected = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)(images=frames, return_tensors="np")
    patches, grid = patch_frames(frames, 3, OPTIONS, double=True)
    np.testing.assert_array_equal([[1, *grid[1:]]] * 3, expected["image_grid_thw"])
    np.testing.assert_allclose(patches, expected["pixel_values"], rtol=0, atol=1e-5)


def test_frames_share_temporal_patches_unless_doubled() -> None:
    frames = [formula_frame(56, 56, t) for t in range(3)]
    pairs, grid = patch_frames(frames, 3, OPTIONS, double=False)
    np.testing.assert_array_equal(grid, [2, 4, 4])
    pairs = pairs.reshape(2, 16, 3, 2, 14, 14)  # temporal patch, patch, C, T, height, width
    singles = patch_frames(frames, 3, OPTIONS, double=True)[0].reshape(3, 16, 3, 2, 14, 14)
    for index, frame in ((0, 0), (1, 1), (2, 2), (3, 2)):  # the last frame fills up
        np.testing.assert_array_equal(pairs[index // 2, :, :, index % 2], singles[frame, :, :, 0])


def test_frames_of_other_sizes_follow_the_first() -> None:
    patches, grid = patch_frames([Image.new("RGB", (84, 56)), Image.new("RGB", (60, 200))], 2, OPTIONS, double=True)
    np.testing.assert_array_equal(grid, [2, 4, 6])
    assert len(patches) == 48


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((1080, 1920), (0, 460_800), (509, 905)),  # shrunk to the budget
        ((20, 30), (3136, 460_800), (46, 69)),  # grown to the least
        ((360, 640), (0, 460_800), (360, 640)),
    ],
)
def test_budget(size: tuple[int, int], limits: tuple[int, int], expected: tuple[int, int]) -> None:
    assert smart_resize(*size, 1, *limits) == expected


def test_images_that_the_original_refuses() -> None:
    with pytest.raises(InputError, match=r"dot.png is 1 x 1 pixels.*each side needs 28.*to 784 or more"):
        patch_frames([Image.new("RGB", (1, 1))], 1, OPTIONS, double=True, name="dot.png")
    with pytest.raises(InputError, match=r"more than 200 times the other\. Crop it"):
        fit_budget(Image.new("RGB", (402, 2)), 0, 460_800)
    thin = fit_budget(Image.new("RGB", (60, 2000)), 0, 20_000)
    with pytest.raises(InputError, match="fewer frames"):
        patch_frames([thin], 1, OPTIONS, double=True)


def test_the_mend_for_small_images_works() -> None:
    dot = fit_budget(Image.new("RGB", (1, 1)), 784, 460_800)
    assert patch_frames([dot], 1, OPTIONS, double=True)[1].tolist() == [1, 4, 4]


@pytest.mark.parametrize(
    "content",
    [
        {"size": {"min_pixels": 1000, "max_pixels": 50_000}},
        {"size": {"shortest_edge": 1000, "longest_edge": 50_000}},
        {"min_pixels": 1000, "max_pixels": 50_000},
        {"min_pixels": 1000, "max_pixels": 50_000, "size": {"shortest_edge": 1, "longest_edge": 2}},
    ],
)
def test_every_spelling_of_the_limits(tmp_path: Path, content: dict) -> None:
    write_json(tmp_path / "preprocessor_config.json", content)
    expected = dataclasses.replace(OPTIONS, min_pixels=1000, max_pixels=50_000)
    assert load_image_processor(tmp_path, Qwen2VisionConfig()) == expected


def test_options_without_a_file_are_the_released_ones(tmp_path: Path) -> None:
    assert load_image_processor(tmp_path, Qwen2VisionConfig()) == OPTIONS
    write_json(tmp_path / "processor_config.json", {"image_processor": {"image_mean": [0.5, 0.5, 0.5]}})
    assert load_image_processor(tmp_path, Qwen2VisionConfig()).mean == (0.5, 0.5, 0.5)


def test_a_checkpoint_may_pair_frames(tmp_path: Path) -> None:
    write_json(tmp_path / "preprocessor_config.json", {"double_frames": False})
    assert load_image_processor(tmp_path, Qwen2VisionConfig()) == dataclasses.replace(OPTIONS, double_frames=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"patch_size": 16}, r"preprocessor_config.json has patch_size 16.*config.json has 14"),
        ({"merge_size": 1}, "merge_size 1"),
        ({"resample": 2}, "resample"),
        ({"do_normalize": False}, "do_normalize"),
        ({"min_pixels": 5, "max_pixels": 4}, "not supported"),
    ],
)
def test_files_of_another_model(tmp_path: Path, content: dict, message: str) -> None:
    write_json(tmp_path / "preprocessor_config.json", content)
    with pytest.raises(CheckpointError, match=message):
        load_image_processor(tmp_path, Qwen2VisionConfig())


def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json cannot be read as JSON"):
        load_image_processor(tmp_path, Qwen2VisionConfig())
