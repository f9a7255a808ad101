import numpy as np
import pytest

from tarsier_jax.errors import InputError
from tarsier_jax.processing.positions import mrope_positions

IMAGE = 151655


def test_positions_are_the_originals(tables: dict) -> None:
    for row in tables["mrope"]:
        positions = mrope_positions(np.array(row["input_ids"]), np.array(row["grid_thw"]), 2, (IMAGE,))
        assert positions.dtype == np.int32
        np.testing.assert_array_equal(positions, row["position_ids_thw"])


def test_text_counts_up_on_all_axes() -> None:
    positions = mrope_positions(np.array([5, 6, 7]), np.zeros((0, 3), np.int32), 2, (IMAGE,))
    np.testing.assert_array_equal(positions, [[0, 1, 2]] * 3)


def test_text_resumes_after_the_longest_axis() -> None:
    """Three frames of 2 x 4 patches: 3 x 1 x 2 tokens; time is the longest axis."""
    positions = mrope_positions(np.array([1, *[IMAGE] * 6, 2]), np.array([[3, 2, 4]]), 2, (IMAGE,))
    np.testing.assert_array_equal(positions[:, -1], [4, 4, 4])
    np.testing.assert_array_equal(positions[0, 1:-1], [1, 1, 2, 2, 3, 3])


def test_placeholders_have_to_match_the_grids() -> None:
    with pytest.raises(InputError, match="3 visual tokens, but its images and videos make 4"):
        mrope_positions(np.array([IMAGE] * 3), np.array([[1, 4, 4]]), 2, (IMAGE,))
    with pytest.raises(InputError, match="among the visual tokens"):
        mrope_positions(np.array([IMAGE, 1, IMAGE, IMAGE, IMAGE]), np.array([[1, 4, 4]]), 2, (IMAGE,))
