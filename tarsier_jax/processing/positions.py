"""M-RoPE position ids: time, height and width of every token."""

from collections.abc import Collection

import numpy as np

from tarsier_jax.errors import InputError


def mrope_positions(
    input_ids: np.ndarray, grid_thw: np.ndarray, merge: int, placeholder_ids: Collection[int]
) -> np.ndarray:
    """Returns position ids int32 (3, S): time, height, width.

    The ids of text increase on all three axes at once. The tokens of a visual count frames, rows and columns of merged
    patches from the end of the preceding text. The following text resumes at the largest id on any axis plus one. This
    is the rule of the original model and of transformers 4 (Qwen2VLForConditionalGeneration.get_rope_index).
    transformers 5 resumes at the larger of height and width and ignores the number of frames.

    Args:
        input_ids: int (S,), with one placeholder per merged patch.
        grid_thw: int (visuals, 3), patches in time, height and width.
        merge: Patches per side that are merged into one token.
        placeholder_ids: Ids of the placeholder tokens of visuals.

    Raises:
        InputError: placeholders and grids do not match.
    """
    grids = np.asarray(grid_thw, np.int64).reshape(-1, 3) // (1, merge, merge)
    counts = grids.prod(axis=1)
    at = np.flatnonzero(np.isin(input_ids, list(placeholder_ids)))
    if len(at) != counts.sum():
        raise InputError(f"The prompt has {len(at)} visual tokens, but its images and videos make {counts.sum()}.")
    positions = np.empty((3, len(input_ids)), np.int32)
    cursor = following = 0  # next token, next id
    for grid, count, first in zip(grids, counts, np.cumsum(counts) - counts, strict=True):
        start, end = int(at[first]), int(at[first + count - 1]) + 1
        if end - start != count:
            raise InputError("The chat template puts other tokens among the visual tokens of one image or video.")
        positions[:, cursor:start] = np.arange(following, following + start - cursor)
        following += start - cursor
        positions[:, start:end] = following + np.indices(tuple(grid)).reshape(3, -1)
        cursor, following = end, following + int(grid.max())
    positions[:, cursor:] = np.arange(following, following + len(input_ids) - cursor)
    return positions
