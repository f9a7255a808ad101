"""Golden data of the first Tarsier (tests/data/tarsier1): its checkpoints, and the examples of its cases.

Pictures are prepared here by Pillow and NumPy, independently of `tarsier_jax.processing`. The clips of some cases are
not in the repository: such a test is skipped unless TARSIER1_CLIPS is a directory that contains them.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from tarsier_jax.config import ClipVisionConfig, ModelConfig
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.video import open_clip

GOLDENS = Path(__file__).parent / "data" / "tarsier1"
FIRST_CLASS = ("t56-gqa", "t336-mha")
NAMES = (*FIRST_CLASS, "ps56-qwen2")

# config.json of Tarsier-7b, with the fields that matter.
TARSIER_7B = {
    "architectures": ["TarsierForConditionalGeneration"],
    "image_new_idx": 32003,
    "image_newline_idx": 32002,
    "image_token_index": 32000,
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "text_config": {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064},
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
_STD = np.array([0.26862954, 0.26130258, 0.27577711])
_MAX_FRAMES = 8


def write_checkpoint(directory: Path, name: str) -> Path:
    """Writes the checkpoint `name` into a subdirectory of `directory` with this name."""
    spec = importlib.util.spec_from_file_location("make_checkpoint", GOLDENS / "make_checkpoint.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(directory / name, name)
    return directory / name


def read_cases(name: str) -> dict[str, dict[str, Any]]:
    """Returns the cases of a file by their name."""
    return {case["name"]: case for case in json.loads((GOLDENS / f"{name}.json").read_text())["cases"]}


def read_arrays(name: str) -> Any:
    """Returns the arrays of a file, "CASE/ARRAY" -> values."""
    return np.load(GOLDENS / f"{name}.npz")


def case_ids(select: Callable[[dict[str, Any]], bool]) -> list[tuple[str, str]]:
    """Returns (file, case) of the selected cases of the first class."""
    return [(name, case) for name in FIRST_CLASS for case, content in read_cases(name).items() if select(content)]


def case_examples(case: dict[str, Any], config: ModelConfig) -> list[Example]:
    """Returns the example of each row of a case, without padding."""
    rows = case.get("rows") or [{**case, "file": file} for file in _files_of_rows(case)]
    labels = case.get("labels", case["input_ids"])
    mask = np.array(case.get("attention_mask", np.ones_like(case["input_ids"])), bool)
    return [
        make_example(np.array(ids)[valid], np.array(row_labels)[valid], _frames(row, config), config)
        for ids, row_labels, row, valid in zip(case["input_ids"], labels, rows, mask, strict=True)
    ]


def _files_of_rows(case: dict[str, Any]) -> list[Any]:
    return case["file"] if case["kind"] == "batch" else [case.get("file")]


def make_example(ids: np.ndarray, labels: np.ndarray, pixels: np.ndarray, config: ModelConfig) -> Example:
    """Returns an example from token ids with one image token per frame.

    Args:
        ids: int (S,).
        labels: int (S,).
        pixels: float32 (frames, 3, size, size).
        config: Configuration of the model.
    """
    vision = config.vision
    assert isinstance(vision, ClipVisionConfig)
    side = vision.grid_size // vision.spatial_merge_size
    frame = ([config.image_token_id] * side + [config.image_newline_id]) * side + [config.image_new_id]
    parts, targets = [], []
    for i, label in zip(ids.tolist(), labels.tolist(), strict=True):
        is_image = i == config.image_token_id
        parts += frame if is_image else [i]
        targets += [-100] * len(frame) if is_image else [label]
    input_ids, grid = np.array(parts, np.int32), [1, vision.grid_size, vision.grid_size]
    position_ids = np.tile(np.arange(len(input_ids), dtype=np.int32), (3, 1))
    grid_thw = np.array([grid] * len(pixels), np.int32).reshape(-1, 3)
    return Example(input_ids, np.array(targets, np.int32), patchify(pixels, vision), grid_thw, position_ids)


def patchify(pixels: np.ndarray, vision: ClipVisionConfig) -> np.ndarray:
    """Returns the patches of frames in row-major order, float32 (frames * N, C)."""
    n, p = vision.grid_size, vision.patch_size
    return pixels.reshape(-1, 3, n, p, n, p).transpose(0, 2, 4, 1, 3, 5).reshape(-1, vision.patch_dim)


def _frames(row: dict[str, Any], config: ModelConfig) -> np.ndarray:
    """Returns the pixels of a row, float32 (frames, 3, size, size)."""
    vision = config.vision
    assert isinstance(vision, ClipVisionConfig)
    images = []
    for file, n in row.get("files") or [[row.get("file"), row.get("n_frames", _MAX_FRAMES)]]:
        images += _read(file, min(n, _MAX_FRAMES), row)
    pixels = [_normalize(_square(image, row.get("do_image_padding", False)), vision.image_size) for image in images]
    return np.stack(pixels) if pixels else np.zeros((0, 3, vision.image_size, vision.image_size), np.float32)


def _read(file: Any, n: int, row: dict[str, Any]) -> list[Image.Image]:
    if file is None:
        return []
    if isinstance(file, list):
        return [Image.open(GOLDENS / "media" / each).convert("RGB") for each in file]
    path = GOLDENS / "media" / file
    if path.suffix == ".png":
        return [Image.open(path).convert("RGB")]
    if path.suffix == ".gif":
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(path))]
        return [frames[i] for i in sorted(set(_indices(0, len(frames), n)))]
    clip = open_clip(_clips() / file)
    assert clip.rate is not None
    start = min(clip.length - 1, int(clip.rate * row.get("start_time", 0)))
    end = clip.length - 1
    if row.get("end_time"):
        end = min(max(start, int(clip.rate * row["end_time"])), end)
    return list(clip.read(_indices(start, end - start + 1, n)))


def _clips() -> Path:
    if not (directory := os.environ.get("TARSIER1_CLIPS")):
        pytest.skip("TARSIER1_CLIPS is not set to a directory with bikes.mp4 and demo_test.mp4")
    return Path(directory)


def _indices(start: int, total: int, n: int) -> list[int]:
    return [start + (0 if n == 1 else round(i * (total - 1) / (n - 1))) for i in range(n)]


def _square(image: Image.Image, padding: bool) -> Image.Image:
    side = max(image.size)
    if not padding:
        return image.resize((side, side), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in _MEAN))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _normalize(image: Image.Image, size: int) -> np.ndarray:
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.float64) / 255
    return ((pixels - _MEAN) / _STD).transpose(2, 0, 1).astype(np.float32)


def rename_clip(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors of Hugging Face's CLIPVisionModel with the names of a checkpoint."""
    return {
        f"vision_tower.vision_model.{name.removeprefix('vision_model.')}": tensor  # the prefix of transformers 4
        for name, tensor in state.items()
        if not name.endswith("position_ids")
    }
