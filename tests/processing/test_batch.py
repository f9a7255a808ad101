import itertools

import numpy as np
import pytest

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import InputError
from tarsier_jax.processing.batch import Buckets, Example, bucket, make_batch
from tarsier_jax.processing.positions import mrope_positions

CONFIG = ModelConfig(image_token_id=91, video_token_id=92)
BUCKETS = Buckets(patches=(16, 32), frames=(1, 4, 8), tokens=(8, 16, 24))


def example(n_text: int, *grids: tuple[int, int, int]) -> Example:
    """Each visual follows one token of text; n_text tokens end the prompt. Patch k of a sample is filled with k."""
    grid_thw = np.array(grids, np.int32).reshape(-1, 3)
    ids = [token for t, h, w in grids for token in (5, *[91] * (t * h * w // 4))]
    input_ids = np.array([*ids, *[7] * n_text], np.int32)
    n = int(grid_thw.prod(axis=1).sum())
    pixel_values = np.repeat(np.arange(n, dtype=np.float32)[:, None], 1176, axis=1)
    positions = mrope_positions(input_ids, grid_thw, 2, (91, 92))
    return Example(input_ids, input_ids.copy(), pixel_values, grid_thw, positions)


def test_a_padded_batch() -> None:
    first, second = example(2, (2, 2, 4), (1, 4, 4)), example(3, (1, 2, 2))
    batch = make_batch([first, second], CONFIG, BUCKETS, pad_id=3)
    assert batch.input_ids.shape == batch.labels.shape == batch.vision_token_index.shape == (2, 16)
    assert (batch.patches.shape, batch.frame_hw.shape) == ((1, 4, 16, 1176), (1, 4, 1, 2))
    np.testing.assert_array_equal(batch.lengths, [12, 5])
    np.testing.assert_array_equal(batch.input_ids[1], [5, 91, 7, 7, 7, *[3] * 11])
    np.testing.assert_array_equal(batch.labels[1], [5, 91, 7, 7, 7, *[-100] * 11])
    np.testing.assert_array_equal(batch.frame_hw[0, :, 0], [[2, 4], [2, 4], [4, 4], [2, 2]])
    np.testing.assert_array_equal(batch.patches[0, 1, :, 0], [*range(8, 16), *[0] * 8])
    dtypes = {name: str(value.dtype) for name, value in vars(batch).items() if value is not None}
    assert dtypes == {name: "float32" if name == "patches" else "int32" for name in dtypes}


def test_vision_token_index_finds_each_merged_patch() -> None:
    batch = make_batch([example(1, (2, 2, 4), (1, 4, 4)), example(1, (1, 2, 2))], CONFIG, BUCKETS)
    # Four merged patches fit into a padded frame of 16 patches.
    np.testing.assert_array_equal(batch.vision_token_index[0, :12], [-1, 0, 1, 4, 5, -1, 8, 9, 10, 11, -1, -1])
    np.testing.assert_array_equal(batch.vision_token_index[1, :4], [-1, 12, -1, -1])
    merged = batch.patches[..., 0].reshape(-1, 4)[:, 0]  # first patch of each merged one
    np.testing.assert_array_equal(merged[batch.vision_token_index[0, 6:10]], [16, 20, 24, 28])


def test_positions_count_on_through_the_padding() -> None:
    sample = example(2, (1, 4, 4))
    batch = make_batch([sample], CONFIG, BUCKETS)
    np.testing.assert_array_equal(batch.position_ids[0, :7].T, sample.position_ids)
    np.testing.assert_array_equal(batch.position_ids[0, 7], [5, 5, 5])  # one past the last, on every axis


def test_batches_of_text_have_one_shape() -> None:
    batch = make_batch([example(3), example(8)], CONFIG, BUCKETS)
    assert (batch.patches.shape, batch.frame_hw.shape, batch.input_ids.shape) == ((1, 0, 0, 1176), (1, 0, 1, 2), (2, 8))
    assert (batch.vision_token_index == -1).all()


def test_text_and_videos_in_one_batch() -> None:
    batch = make_batch([example(3), example(1, (1, 2, 2))], CONFIG, BUCKETS)
    assert (batch.vision_token_index[0] == -1).all()
    assert batch.vision_token_index[1, 1] == 0


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (example(1, (1, 6, 6)), r"36 patches in a frame. Lower max_pixels.*than 32"),
        (example(1, (9, 2, 2)), r"9 frames in a batch. Lower n_frames.*than 8"),
        (example(25), r"25 tokens in a sample.*than 24"),
    ],
)
def test_what_exceeds_every_bucket(sample: Example, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_batch([sample], CONFIG, BUCKETS)


def test_an_empty_batch() -> None:
    with pytest.raises(InputError, match="at least one example"):
        make_batch([], CONFIG, BUCKETS)


def test_default_buckets_waste_little() -> None:
    buckets = Buckets()
    for name, least, most in (("patches", 128, 2560), ("tokens", 128, 16384), ("frames", 8, 512)):
        usual = [size for size in getattr(buckets, name) if least <= size <= most]
        assert max(b / a for a, b in itertools.pairwise(usual)) <= 1.25
    assert bucket(buckets, "patches", 36 * 64) == 2304
    assert bucket(buckets, "tokens", 9243) == 9472
    assert bucket(buckets, "frames", 16) == 16


def test_buckets_rise() -> None:
    with pytest.raises(InputError, match="tokens are"):
        Buckets(tokens=(256, 128))
