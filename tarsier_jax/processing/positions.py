"""M-RoPE position ids: time, height and width of every token."""

from collections.abc import Collection

import numpy as np

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import InputError


def insert_separators(
    input_ids: np.ndarray, labels: np.ndarray, grid_thw: np.ndarray, config: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Inserts a newline token after each row of visual tokens, and a new-image token after each frame.

    The model has the embeddings of these tokens in the decoder's table. Without them, the arrays are returned
    unchanged.

    Args:
        input_ids: int (S,), with one placeholder per merged patch.
        labels: int (S,). Inserted tokens have the label -100.
        grid_thw: int (visuals, 3), patches in time, height and width.
        config: Configuration of the model.
    """
    if config.image_newline_id is None or config.image_new_id is None or not len(grid_thw):
        return input_ids, labels
    T, H, W = (grid_thw // (1, config.vision.spatial_merge_size, config.vision.spatial_merge_size)).T
    after = np.flatnonzero(np.isin(input_ids, (config.image_token_id, config.video_token_id))) + 1
    row_ends = after[np.cumsum(np.repeat(W, T * H)) - 1]
    frame_ends = after[np.cumsum(np.repeat(H * W, T)) - 1]
    at = np.concatenate([row_ends, frame_ends])
    ids = np.repeat([config.image_newline_id, config.image_new_id], [len(row_ends), len(frame_ends)])
    return np.insert(input_ids, at, ids), np.insert(labels, at, -100)


def rope_positions(input_ids: np.ndarray, grid_thw: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Returns position ids int32 (3, S): of M-RoPE, or 0, 1, 2, ... on all axes if the model's RoPE has one axis."""
    if not any(config.text.mrope_section[1:]):
        return np.tile(np.arange(len(input_ids), dtype=np.int32), (3, 1))
    placeholder_ids = config.image_token_id, config.video_token_id
    return mrope_positions(input_ids, grid_thw, config.vision.spatial_merge_size, placeholder_ids)


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
