import numpy as np
import pytest

from tarsier_jax.errors import InputError
from tarsier_jax.processing.frame_sampling import allocate_frames, sample_segments, sample_uniform, select_frames


def test_samplers_give_the_originals_indices(tables: dict) -> None:
    for row in tables["samplers"]:
        total, n = row["total_frames"], row["n_frames"]
        assert sample_uniform(total, n) == row["v1"], row
        assert sample_segments(total, n) == row["v2"], row


def test_training_draws_one_frame_of_each_segment() -> None:
    draws = np.array([sample_segments(103, 4, np.random.default_rng(seed)) for seed in range(200)])
    # Segments of 26, 26, 26 and 25 frames.
    np.testing.assert_array_equal(draws.min(axis=0), [0, 26, 52, 78])
    np.testing.assert_array_equal(draws.max(axis=0), [25, 51, 77, 102])
    assert sample_segments(103, 4, np.random.default_rng(7)) == sample_segments(103, 4, np.random.default_rng(7))


def test_allocation_shares_frames_like_the_original(tables: dict) -> None:
    for row in tables["allocation"]:
        videos = [item["video"] for item in row["content"] if item["type"] == "video"]
        n_images = len(row["content"]) - len(videos)
        shares = allocate_frames(
            videos, n_images, row["n_frames"], row["max_n_frames"], row["force_frames_n_divisible"]
        )
        assert shares == row["result"], row


def test_a_video_that_would_get_no_frame_is_an_error() -> None:
    with pytest.raises(InputError, match="Raise n_frames"):
        allocate_frames([{}, {}, {}], n_images=0, n_frames=2, max_n_frames=16)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({}, [0, 33, 66, 99]),
        ({"frame_indices": [5, 5, 2]}, [5, 5, 2]),
        ({"frame_indices": [100, 100, 0]}, [99, 99, 0]),  # the frame at the duration is the last one
        ({"time_indices": [0, 1.24, 10]}, [0, 12, 99]),
        ({"start_frame": 10, "end_frame": 19}, [10, 13, 16, 19]),
        ({"start_frame": 10}, [10, 40, 69, 99]),
        ({"start_time": 1, "end_time": 1.9}, [10, 13, 16, 19]),
        ({"start_time": 9, "end_time": 10}, [90, 93, 96, 99]),
        ({"start_frame": 95, "end_frame": 104}, [95, 96, 98, 99]),  # an end past the last frame means that
        ({"start_time": 0, "end_time": 9999}, [0, 33, 66, 99]),
        ({"fps": 0.4}, [0, 25, 50, 75]),
        ({"fps": 5}, [0, 33, 66, 99]),  # 50 frames are more than may be shown
        ({"fps": 1, "start_time": 2, "end_time": 4}, [20, 30, 40]),
        ({"fps": 100, "start_frame": 7, "end_frame": 9}, [7, 8, 9]),
    ],
)
def test_select_frames(item: dict, expected: list[int]) -> None:
    assert select_frames(item, length=100, rate=10.0, n=4) == expected


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"time_indices": [0.5, 2.99, 3, 9]}, [0, 2, 3, 4]),  # the frame on the screen
        ({"start_time": 2.5, "end_time": 5}, [2, 3]),
        ({"fps": 1}, [0, 1, 2, 3, 4]),
        ({"fps": 0.25}, [0, 3, 4]),  # at 0, 4, 8 and 12 s
        ({}, [0, 1, 3, 4]),
    ],
)
def test_seconds_of_a_variable_rate(item: dict, expected: list[int]) -> None:
    times = np.array([0, 1, 2, 3, 8.0])
    assert select_frames(item, length=5, rate=0.5, n=5 if "fps" in item else 4, times=times) == expected


def test_timestamps_that_jitter_mean_what_the_rate_says() -> None:
    times = np.arange(100) / 10 + np.random.default_rng(0).uniform(-0.02, 0.02, 100)
    item = {"time_indices": [0.04, 0.06, 1.24]}
    assert select_frames(item, 100, 10.0, n=4, times=times) == select_frames(item, 100, 10.0, n=4) == [0, 1, 12]


def test_select_frames_by_the_second_sampler() -> None:
    assert select_frames({}, 100, None, 2, sampler="v2") == [24, 74]
    indices = select_frames({"start_frame": 90}, 100, None, 2, "v2", np.random.default_rng(0))
    assert 90 <= indices[0] < 95 <= indices[1] < 100


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            {"frame_indices": [3, 120]},
            r"a.mp4 \(frame_indices \[3, 120\]\) has frames 0 to 99, but \[120\] are selected",
        ),
        ({"frame_indices": [-1]}, r"\[-1\]"),
        ({"frame_indices": []}, "none are selected"),
        ({"time_indices": [11.0, 12.0]}, r"\[110, 120\]"),
        ({"start_frame": 100}, "Correct the start and end"),
        ({"start_time": 12.5}, r"125 to 99 are selected \(start_time 12.5\)"),
        ({"start_time": 1, "start_frame": 2}, "has both start_time and start_frame"),
        ({"time_indices": [1], "end_time": 2}, "end_time cannot be combined with a list of frames"),
        ({"frame_indices": [1.5]}, "frame_indices must be whole numbers"),
        ({"start_frame": 9, "end_frame": 3}, "9 to 3"),
        ({"frame_indices": [1], "fps": 2}, "has both frame_indices and fps"),
    ],
)
def test_frames_outside_of_the_clip(item: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        select_frames(item, length=100, rate=10.0, n=4, name="a.mp4")


@pytest.mark.parametrize("item", [{"fps": 2}, {"time_indices": [1]}, {"start_time": 1}])
def test_seconds_need_a_frame_rate(item: dict) -> None:
    with pytest.raises(InputError, match="does not have a frame rate"):
        select_frames(item, length=100, rate=None, n=4)
