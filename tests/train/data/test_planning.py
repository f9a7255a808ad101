"""Estimates of rows from the sizes of samples, against the samples and the rows themselves."""

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tarsier_jax.errors import InputError
from tarsier_jax.processing.packing import RowShape, UnitSize
from tarsier_jax.processing.processor import Processor
from tarsier_jax.processing.sizes import without_pixels
from tests.train.texts import load, open_rows, write_lines, write_texts
from train.config import TrainConfig
from train.data.annotations import mix_files, num_lines
from train.data.packing import BadSample, DataConfig, PackingConfig, PackUnit
from train.data.planning import (
    Material,
    MeasuredSample,
    collect,
    estimate_rows,
    lines_per_row,
    measure_samples,
    pack_sizes,
    steps_of_epochs,
)
from train.sft import sft_objective

SHAPE = RowShape(tokens=64, bins=2, patches=16, frames=2, samples=8)
BOX = [[[0.1, 0.1], [0.9, 0.1], [0.9, 0.4], [0.1, 0.4]]]


def text_size(tokens: int) -> UnitSize:
    return UnitSize(1, tokens, np.zeros((0, 3), np.int32))


def chat(*visuals: dict[str, Any]) -> dict[str, Any]:
    content = [*visuals, {"type": "text", "text": "Describe the video in detail."}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Nothing happens."}]}


def video(file: str, **keys: Any) -> dict[str, Any]:
    return {"type": "video", "video": {"video_file": file, **keys}}


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (200, 90)).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


@pytest.mark.parametrize("double_frames", [True, False])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"start_frame": 5, "end_frame": 7},
        {"frame_indices": [9, 3, 3]},
        {"disturb": {"kind": "reverse", "seed": 1}},
        {"mask_boxes": [BOX] * 16},
    ],
    ids=lambda keys: next(iter(keys), "whole"),
)
def test_sizes_equal_those_of_the_examples(
    processor: Processor, clip: str, picture: str, keys: dict[str, Any], double_frames: bool
) -> None:
    processor = processor.replace(force_frames_n_divisible=4, double_frames=double_frames)
    sample = chat(video(clip, **keys), {"type": "image", "image": {"image_file": picture}})
    measured, example = without_pixels(processor)(sample, training=True), processor(sample, training=True)
    for field in ("input_ids", "labels", "grid_thw", "position_ids", "selections", "frames", "num_truncated"):
        np.testing.assert_array_equal(getattr(measured, field), getattr(example, field), err_msg=field)
    assert measured.pixel_values.shape == (len(example.pixel_values), 0)


def test_times_of_a_video(processor: Processor, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 48), (20 * i,) * 3) for i in range(8)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=500)
    lines = write_lines(tmp_path / "a.jsonl", [chat(video("a.gif"))])
    config = TrainConfig(data=DataConfig(train=lines, media_root=str(tmp_path)))
    (sample,) = measure_samples(config, processor, sft_objective(config).load)
    assert isinstance(sample, MeasuredSample) and sample.seconds == (3.5,)  # from the first of 8 frames to the last


def test_rows_of_sizes_equal_those_of_the_samples(tmp_path: Path, processor: Processor) -> None:
    files = write_texts(tmp_path / "a.jsonl", np.random.default_rng(0).integers(3, 41, 24).tolist())
    packer = PackingConfig(processor, SHAPE, 3, 0.01, "float32", {"weight": (8, 1)})
    packed = open_rows(files, packer, num_rows=1)
    rows = [row for _ in range(30) for row in next(packed)]
    packed.close()
    lines = mix_files(files, 0, repeat=True)
    texts = {str(i): tokens for i, tokens in enumerate(np.random.default_rng(0).integers(3, 41, 24).tolist())}
    order = (str(lines[i].number - 1) for i in itertools.count())
    estimated = list(itertools.islice(pack_sizes((text_size(texts[key]) for key in order), SHAPE, 3), 30))
    assert [(len(row.keys), int(row.batch.lengths[0])) for row in rows] == [(r.units, r.tokens) for r in estimated]


def test_the_mean_content_of_rows() -> None:
    frames = UnitSize(1, 20, np.array([[2, 2, 4]], np.int32))  # 16 patches
    rows = estimate_rows([text_size(30), text_size(65)], SHAPE, 4)
    assert (rows.samples, rows.token_padding, rows.patch_padding, rows.num_too_large) == (2, 4 / 64, 1, 1)
    rows = estimate_rows([frames], SHAPE, 4)
    assert (rows.samples, rows.token_padding, rows.patch_padding) == (2, 24 / 64, 0)
    rows = estimate_rows([text_size(40), text_size(24)], SHAPE, 8)
    assert rows.samples == pytest.approx(2, abs=0.1)  # each text of 40 tokens with one of 24
    assert estimate_rows([text_size(30)], dataclasses.replace(SHAPE, bins=0), 4).patch_padding == 0
    with pytest.raises(InputError, match=r"All 1 measured samples exceed an empty row of 64 tokens and 2 bins of 16"):
        estimate_rows([text_size(65)], SHAPE, 4)


def test_epochs_count_all_lines(tmp_path: Path) -> None:
    """10 samples of which 2 exceed a row, and 6 bad lines: a row of 2 samples takes 4 lines."""
    bad = BadSample("a.jsonl", 1, "")
    samples = tuple(MeasuredSample(text_size(n), ()) for n in (*[30] * 8, 65, 65))
    material = Material(samples, (bad,) * 6)
    lines = lines_per_row(material, estimate_rows(material.sizes, SHAPE, 4))
    assert lines == 4
    a, b = write_texts(tmp_path / "a", [1] * 70), write_texts(tmp_path / "b", [1] * 30)
    config = TrainConfig(data=DataConfig(train=f"{a},{b}", global_batch_size=8))
    assert [steps_of_epochs(config, epochs, lines, num_lines(config.data.train)) for epochs in (1, 2, 0.32, 2.56)] == [
        4,
        7,
        1,
        8,
    ]


def test_measuring_names_bad_lines(tmp_path: Path, processor: Processor) -> None:
    def load_text(_: Processor, sample: Mapping[str, Any], rng: np.random.Generator) -> PackUnit:
        return load(sample, rng)

    lines = [{"id": "0", "tokens": 5}, "{", {"id": "2", "tokens": 0}, {"id": "3", "tokens": 7000}]
    config = TrainConfig(data=DataConfig(train=write_lines(tmp_path / "a.jsonl", lines)))
    material = collect(measure_samples(config, processor, load_text))
    assert sorted(size.tokens for size in material.sizes) == [5, 7000] and material.num_lines == 4
    reasons = {bad.line: bad.reason for bad in material.bad}
    assert reasons.keys() == {2, 3} and reasons[3] == "Sample 2 is empty."
    assert len(list(measure_samples(config, processor, load_text, 3))) == 3
    with pytest.raises(InputError, match=r"None of 2 samples of config\.data\.train can be used\. .* line [23]: "):
        collect(iter(material.bad))
