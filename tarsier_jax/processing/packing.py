"""Packs several samples into one row of a fixed shape: training compiles once, with little padding."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import InputError
from tarsier_jax.processing.batch import Batch, Example, frame_sizes

# Examples that are packed into one row together and have the same visuals, which are stored once: a chosen and a
# rejected answer. Most units are one example.
Unit = Sequence[Example]


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The capacity of a row.

    Attributes:
        tokens: Number of tokens of all samples.
        bins: Number of bins of patches.
        patches: Patches per bin, which limits the size of a frame.
        frames: Maximum number of frames per bin.
        samples: Maximum number of samples; 1 turns packing off.

    Raises:
        InputError: a value is below 1 (`bins`: below 0).
    """

    tokens: int
    bins: int
    patches: int
    frames: int
    samples: int

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < (0 if name == "bins" else 1):
                raise InputError(f"A row needs {name} of at least 1, not {value}.")


class Row:
    """A row under construction: `add` units while they fit, then `build` the batch."""

    def __init__(self, shape: RowShape, config: ModelConfig):
        self.shape, self.config = shape, config
        self.examples: list[tuple[Example, np.ndarray]] = []  # each with the index of its merged patches
        self.tokens = 0
        self._patches = np.zeros(shape.bins, np.int64)  # occupied patches of each bin
        self._frames = np.zeros(shape.bins, np.int64)
        self._visuals: list[tuple[Example, list[tuple[int, int]]]] = []  # bin and offset of each frame

    def add(self, unit: Unit) -> bool:
        """Adds the unit if it fits, and returns whether it did.

        Raises:
            InputError: the unit does not fit into an empty row.
        """
        tokens = sum(len(example.input_ids) for example in unit)
        places = None
        if self.tokens + tokens <= self.shape.tokens and len(self.examples) + len(unit) <= self.shape.samples:
            places = self._allocate(frame_sizes(unit[0]).prod(axis=1))
        if places is None:
            if not self.examples:
                raise self._too_large(unit, tokens)
            return False
        self.tokens += tokens
        self._visuals.append((unit[0], places))
        index = self._index(unit[0], places)
        self.examples += [(example, index) for example in unit]
        return True

    def build(self, pad_id: int, dtype: Any = np.float32) -> Batch:
        """Returns the row as a batch of one row and one group, with patches in `dtype`."""
        shape, S = self.shape, self.shape.tokens
        input_ids, labels = np.full((1, S), pad_id, np.int32), np.full((1, S), -100, np.int32)
        position_ids, segment_ids = np.zeros((1, S, 3), np.int32), np.zeros((1, S), np.int32)
        vision_token_index = np.full((1, S), -1, np.int32)
        start = 0
        for segment, (example, index) in enumerate(self.examples, 1):
            at = slice(start, start := start + len(example.input_ids))
            input_ids[0, at], labels[0, at] = example.input_ids, example.labels
            position_ids[0, at], segment_ids[0, at] = example.position_ids.T, segment
            placeholders = np.isin(example.input_ids, (self.config.image_token_id, self.config.video_token_id))
            vision_token_index[0, at][placeholders] = index
        patches = np.zeros((1, shape.bins, shape.patches, self.config.vision.patch_dim), dtype)
        frame_hw = np.zeros((1, shape.bins, shape.frames, 2), np.int32)
        count = np.zeros(shape.bins, np.int64)
        for example, places in self._visuals:
            first = 0
            for (bin_, offset), (h, w) in zip(places, frame_sizes(example), strict=True):
                patches[0, bin_, offset : offset + h * w] = example.pixel_values[first : first + h * w]
                frame_hw[0, bin_, count[bin_]] = h, w
                first, count[bin_] = first + h * w, count[bin_] + 1
        lengths = np.array([self.tokens], np.int32)
        return Batch(input_ids, labels, position_ids, lengths, patches, frame_hw, vision_token_index, segment_ids)

    def _allocate(self, sizes: np.ndarray) -> list[tuple[int, int]] | None:
        """Allocates patches of bins for frames of these sizes, first fit.

        Returns:
            Bin and offset of each frame, or None if they do not fit.
        """
        patches, frames = self._patches.copy(), self._frames.copy()
        places = []
        for size in sizes.tolist():
            free = np.flatnonzero((patches + size <= self.shape.patches) & (frames < self.shape.frames))
            if not len(free):
                return None
            places.append((int(free[0]), int(patches[free[0]])))
            patches[free[0]] += size
            frames[free[0]] += 1
        self._patches, self._frames = patches, frames
        return places

    def _index(self, example: Example, places: list[tuple[int, int]]) -> np.ndarray:
        """Returns the indices of the example's merged patches in the row's padded array, int32 (visual tokens,)."""
        num_tokens = self.config.vision.num_tokens
        parts = [
            num_tokens(bin_ * self.shape.patches + offset) + np.arange(num_tokens(size))
            for (bin_, offset), size in zip(places, frame_sizes(example).prod(axis=1).tolist(), strict=True)
        ]
        return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int32)

    def _too_large(self, unit: Unit, tokens: int) -> InputError:
        sizes = frame_sizes(unit[0]).prod(axis=1)
        largest = sizes.max(initial=0)
        return InputError(
            f"{len(unit)} answers of {tokens} tokens, with {len(sizes)} frames of up to {largest} patches, "
            f"are more than the capacity of an empty row: {self.shape.samples} answers, {self.shape.tokens} tokens, "
            f"{self.shape.bins} bins of {self.shape.patches} patches or {self.shape.frames} frames. Use fewer frames "
            "(n_frames), smaller frames (max_pixels), or larger rows."
        )


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """Returns rows of one shape as one batch, with one group per row."""
    names = [field.name for field in dataclasses.fields(Batch)]
    return Batch(**{name: np.concatenate([getattr(row, name) for row in rows]) for name in names})
