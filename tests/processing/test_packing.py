import dataclasses

import numpy as np
import pytest

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import InputError
from tarsier_jax.processing.batch import Batch, Example
from tarsier_jax.processing.packing import Row, RowShape, stack_rows
from tarsier_jax.processing.positions import mrope_positions

IMAGE = 91
CONFIG = ModelConfig(image_token_id=IMAGE, video_token_id=92)
SHAPE = RowShape(tokens=32, bins=3, patches=24, frames=3, samples=4)


def example(n_text: int, *grids: tuple[int, int, int], seed: int = 0) -> Example:
    """Random pixels. One token of text precedes each visual; n_text tokens, the answer, end the sample."""
    rng = np.random.default_rng(seed)
    grid_thw = np.array(grids, np.int32).reshape(-1, 3)
    ids = [token for t, h, w in grids for token in (5, *[IMAGE] * (t * h * w // 4))]
    answer = rng.integers(6, 90, n_text)
    input_ids = np.array([*ids, *answer], np.int32)
    labels = np.array([*[-100] * len(ids), *answer], np.int32)
    pixels = rng.standard_normal((int(grid_thw.prod(axis=1).sum()), 1176)).astype(np.float32)
    return Example(input_ids, labels, pixels, grid_thw, mrope_positions(input_ids, grid_thw, 2, (IMAGE, 92)))


def answered(sample: Example, n_text: int, seed: int) -> Example:
    """The same visuals and question with another answer."""
    other = example(n_text, *(tuple(grid) for grid in sample.grid_thw.tolist()), seed=seed)
    return dataclasses.replace(other, pixel_values=sample.pixel_values)


def filled(*units: list[Example], shape: RowShape = SHAPE) -> Row:
    row = Row(shape, CONFIG)
    for unit in units:
        assert row.add(unit)
    return row


def merged_patches(batch: Batch, segment: int) -> np.ndarray:
    """The pixels that vision_token_index finds for a sample: (visual tokens, 4 patches of 1176)."""
    merged = batch.patches[0].reshape(-1, 4 * 1176)
    index = batch.vision_token_index[0, batch.segment_ids[0] == segment]
    return merged[index[index >= 0]]


def test_two_samples_in_a_row() -> None:
    first, second = example(3, (1, 4, 4)), example(6, seed=1)
    batch = filled([first], [second]).build(pad_id=3)
    np.testing.assert_array_equal(batch.input_ids, [[*first.input_ids, *second.input_ids, *[3] * 18]])
    np.testing.assert_array_equal(batch.labels, [[*first.labels, *second.labels, *[-100] * 18]])
    np.testing.assert_array_equal(batch.segment_ids, [[*[1] * 8, *[2] * 6, *[0] * 18]])
    np.testing.assert_array_equal(batch.vision_token_index, [[-1, 0, 1, 2, 3, *[-1] * 27]])
    np.testing.assert_array_equal(batch.position_ids[0, :8].T, first.position_ids)
    np.testing.assert_array_equal(batch.position_ids[0, 8:14].T, second.position_ids)  # from 0 again
    np.testing.assert_array_equal(batch.lengths, [14])
    np.testing.assert_array_equal(batch.frame_hw, [[[[4, 4], [0, 0], [0, 0]], *[[[0, 0]] * 3] * 2]])
    assert batch.patches.shape == (1, 3, 24, 1176)
    assert not batch.patches[0, 0, 16:].any() and not batch.patches[0, 1:].any()


def test_every_row_has_one_shape_and_its_dtypes() -> None:
    batches = [filled().build(0), filled([example(2)]).build(0), filled([example(2, (3, 2, 4))]).build(0)]
    shapes = [{name: (x.shape, x.dtype.name) for name, x in vars(batch).items()} for batch in batches]
    assert shapes[0] == shapes[1] == shapes[2]
    assert {name for name, (_, dtype) in shapes[0].items() if dtype != "int32"} == {"patches"}


def test_an_empty_row_is_padding() -> None:
    batch = filled().build(pad_id=3)
    assert batch.lengths == 0 and (batch.input_ids == 3).all() and (batch.labels == -100).all()
    assert not batch.segment_ids.any() and not batch.frame_hw.any() and (batch.vision_token_index == -1).all()


def test_vision_token_index_finds_each_merged_patch() -> None:
    """Frames of different sizes and samples share bins, a frame goes into the first bin that has room."""
    first, second = example(2, (2, 2, 6), (1, 2, 4), seed=1), example(3, (2, 4, 2), (1, 4, 4), seed=2)
    batch = filled([first], [second]).build(0)
    bins = [[[2, 6], [2, 6], [0, 0]], [[2, 4], [4, 2], [4, 2]], [[4, 4], [0, 0], [0, 0]]]
    np.testing.assert_array_equal(batch.frame_hw, [bins])
    for segment, sample in ((1, first), (2, second)):
        np.testing.assert_array_equal(merged_patches(batch, segment), sample.pixel_values.reshape(-1, 4 * 1176))
        placeholders = batch.vision_token_index[0, batch.segment_ids[0] == segment] >= 0
        np.testing.assert_array_equal(placeholders, sample.input_ids == IMAGE)


def test_an_earlier_bin_is_filled_up() -> None:
    """A small frame goes back to a bin that had no room for the one before."""
    sample = example(1, (1, 4, 4), (1, 4, 4), (1, 2, 4))
    batch = filled([sample]).build(0)
    np.testing.assert_array_equal(batch.frame_hw[0, :2, :2], [[[4, 4], [2, 4]], [[4, 4], [0, 0]]])
    np.testing.assert_array_equal(merged_patches(batch, 1), sample.pixel_values.reshape(-1, 4 * 1176))


def test_two_answers_about_the_same_visuals_store_them_once() -> None:
    preferred = example(2, (2, 4, 4), seed=1)
    rejected, other = answered(preferred, 4, seed=2), example(3, (1, 2, 4), seed=3)
    batch = filled([preferred, rejected], [other]).build(0)
    np.testing.assert_array_equal(batch.segment_ids, [[*[1] * 11, *[2] * 13, *[3] * 6, 0, 0]])
    np.testing.assert_array_equal(batch.frame_hw[0, :, 0], [[4, 4], [4, 4], [0, 0]])
    np.testing.assert_array_equal(batch.frame_hw[0, :, 1], [[2, 4], [0, 0], [0, 0]])
    for segment, sample in ((1, preferred), (2, rejected), (3, other)):
        np.testing.assert_array_equal(merged_patches(batch, segment), sample.pixel_values.reshape(-1, 4 * 1176))
    np.testing.assert_array_equal(batch.labels[0, 11:24], rejected.labels)


@pytest.mark.parametrize(
    ("unit", "limit"),
    [
        ([example(24)], "tokens"),
        ([example(1, (3, 4, 4))], "bins"),
        ([example(1, (1, 2, 14))], "patches"),
        ([example(1, (9, 2, 2))], "frames"),
        ([example(1), example(1), example(1), example(1)], "samples"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_leaves_the_row_as_it_was(unit: list[Example], limit: str) -> None:
    first, last = example(4, (1, 4, 4)), example(2, (1, 2, 4))
    row = filled([first])
    assert not row.add(unit)
    assert row.add([last])  # a smaller unit still fits
    expected = filled([first], [last]).build(0)
    for name, value in vars(row.build(0)).items():
        np.testing.assert_array_equal(value, getattr(expected, name), err_msg=f"{limit}: {name}")
    roomier = dataclasses.replace(SHAPE, **{limit: 3 * getattr(SHAPE, limit)})
    assert filled([first], shape=roomier).add(unit)  # that limit was the reason


def test_a_row_can_be_filled_to_the_last_place() -> None:
    row = filled([example(8, (3, 4, 4))], [example(4, (3, 2, 4))])
    assert row.tokens == 32 == row.build(0).lengths
    assert (row.build(0).frame_hw[0, :, :2].prod(axis=-1).sum(axis=1) == 24).all()
    assert not row.add([example(1)])


@pytest.mark.parametrize(
    ("sample", "sizes"),
    [
        (example(33), r"1 answers of 33 tokens, with 0 frames of up to 0 patches, are more .* 32 tokens, 3 bins"),
        (example(1, (1, 4, 8)), r"10 tokens, with 1 frames of up to 32 patches, are more than .* 3 bins of 24 patches"),
        (
            example(1, (4, 4, 4), (1, 2, 2)),
            r"20 tokens, with 5 frames of up to 16 patches, are more than .* 3 bins of 24",
        ),
    ],
)
def test_a_sample_that_no_row_can_hold(sample: Example, sizes: str) -> None:
    with pytest.raises(InputError, match=rf"{sizes}.*\(n_frames\).*\(max_pixels\), or larger rows"):
        filled().add([sample])


def test_rows_without_bins_hold_text_only() -> None:
    shape = dataclasses.replace(SHAPE, bins=0)
    assert filled([example(5)], shape=shape).build(0).patches.shape == (1, 0, 24, 1176)
    with pytest.raises(InputError, match="1 frames of up to 4 patches"):
        filled(shape=shape).add([example(5, (1, 2, 2))])


@pytest.mark.parametrize("name", ["tokens", "patches", "frames", "samples"])
def test_rows_that_can_hold_nothing(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} of at least 1, not 0"):
        dataclasses.replace(SHAPE, **{name: 0})


def test_rows_become_a_batch_with_a_group_each() -> None:
    samples = [example(3, (1, 4, 4), seed=1), example(5, seed=2), example(2, (2, 2, 4), seed=3)]
    rows = [filled([samples[0]], [samples[1]]).build(0), filled([samples[2]]).build(0)]
    batch = stack_rows(rows)
    assert batch.input_ids.shape == (2, 32) and batch.position_ids.shape == (2, 32, 3)
    assert batch.patches.shape == (2, 3, 24, 1176) and batch.frame_hw.shape == (2, 3, 3, 2)
    np.testing.assert_array_equal(batch.lengths, [13, 6 + 1])
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(batch.position_ids[i], row.position_ids[0])
        np.testing.assert_array_equal(
            batch.vision_token_index[i], row.vision_token_index[0]
        )  # counted within its group
        np.testing.assert_array_equal(batch.patches[i], row.patches[0])


def test_patches_in_bfloat16() -> None:
    sample = example(2, (1, 4, 4))
    batch = filled([sample]).build(0, "bfloat16")
    assert batch.patches.dtype.name == "bfloat16"
    np.testing.assert_array_equal(batch.patches[0, 0, :16], sample.pixel_values.astype("bfloat16"))
