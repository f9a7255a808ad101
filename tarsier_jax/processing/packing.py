"""Packs several samples into one row of a fixed shape: training compiles once, with little padding."""

import dataclasses
from collections.abc import Iterator, Sequence
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


@dataclasses.dataclass(frozen=True)
class UnitSize:
    """The size of a unit.

    Attributes:
        examples: Number of examples.
        tokens: Number of tokens of all examples.
        grid_thw: Time, height and width in patches of their visuals, int32 (visuals, 3).
    """

    examples: int
    tokens: int
    grid_thw: np.ndarray

    @classmethod
    def of(cls, unit: Unit) -> "UnitSize":
        return cls(len(unit), sum(len(example.input_ids) for example in unit), unit[0].grid_thw)

    @property
    def frame_patches(self) -> np.ndarray:
        """Patches of each frame, int (frames,)."""
        return np.repeat(self.grid_thw[:, 1:].prod(axis=1), self.grid_thw[:, 0])


class RowSpace:
    """The space of a row and its part in use.

    Attributes:
        shape: Capacity of the row.
        tokens: Tokens in use.
        units: Number of units.
        examples: Number of examples.
    """

    def __init__(self, shape: RowShape):
        self.shape = shape
        self.tokens = self.units = self.examples = 0
        self._patches = np.zeros(shape.bins, np.int64)  # in use, of each bin
        self._frames = np.zeros(shape.bins, np.int64)

    @property
    def patches(self) -> int:
        """Patches in use."""
        return int(self._patches.sum())

    def allocate(self, size: UnitSize) -> np.ndarray | None:
        """Allocates tokens, and patches of bins: each frame is placed in the first bin that it fits.

        Returns:
            Bin and offset of each frame, int64 (frames, 2), or None if the unit does not fit.
        """
        if self.tokens + size.tokens > self.shape.tokens or self.examples + size.examples > self.shape.samples:
            return None
        patches, frames = self._patches.copy(), self._frames.copy()
        places = [np.zeros((0, 2), np.int64)]
        for t, h, w in size.grid_thw.tolist():
            capacity = np.minimum((self.shape.patches - patches) // (h * w), self.shape.frames - frames)
            total = np.cumsum(capacity)
            if not len(total) or total[-1] < t:
                return None
            starts = np.minimum(total - capacity, t)  # frames of the visual in the bins before
            counts = np.minimum(total, t) - starts
            bins = np.repeat(np.arange(len(counts)), counts)
            offsets = patches[bins] + h * w * (np.arange(t) - starts[bins])
            places.append(np.stack([bins, offsets], axis=1))
            patches += h * w * counts
            frames += counts
        self._patches, self._frames = patches, frames
        self.units += 1
        self.tokens += size.tokens
        self.examples += size.examples
        return np.concatenate(places)


class Row:
    """A row under construction: `add` units while they fit, then `build` the batch."""

    def __init__(self, shape: RowShape, config: ModelConfig):
        self.shape, self.config = shape, config
        self._space = RowSpace(shape)
        self._units: list[tuple[Unit, np.ndarray]] = []  # each with the bin and the offset of its frames, (frames, 2)

    @property
    def tokens(self) -> int:
        """Tokens of all samples, without padding."""
        return self._space.tokens

    @property
    def num_examples(self) -> int:
        return self._space.examples

    def add(self, unit: Unit) -> bool:
        """Adds the unit if it fits, and returns whether it did.

        Raises:
            InputError: the unit does not fit into an empty row.
        """
        size = UnitSize.of(unit)
        places = self._space.allocate(size)
        if places is not None:
            self._units.append((unit, places))
        elif not self._units:
            raise self._too_large(size)
        return places is not None

    def build(self, pad_id: int, dtype: Any = np.float32) -> Batch:
        """Returns the row as a batch of one row and one group, with patches in `dtype`."""
        shape, S = self.shape, self.shape.tokens
        input_ids, labels = np.full((1, S), pad_id, np.int32), np.full((1, S), -100, np.int32)
        position_ids, segment_ids = np.zeros((1, S, 3), np.int32), np.zeros((1, S), np.int32)
        vision_token_index = np.full((1, S), -1, np.int32)
        start = 0
        for segment, (example, index) in enumerate(self._indexed_examples(), 1):
            at = slice(start, start := start + len(example.input_ids))
            input_ids[0, at], labels[0, at] = example.input_ids, example.labels
            position_ids[0, at], segment_ids[0, at] = example.position_ids.T, segment
            placeholders = np.isin(example.input_ids, (self.config.image_token_id, self.config.video_token_id))
            vision_token_index[0, at][placeholders] = index
        patches = np.zeros((1, shape.bins, shape.patches, self.config.vision.patch_dim), dtype)
        frame_hw = np.zeros((1, shape.bins, shape.frames, 2), np.int32)
        count = np.zeros(shape.bins, np.int64)
        for (example, *_), places in self._units:
            first = 0
            for (bin_, offset), (h, w) in zip(places, frame_sizes(example), strict=True):
                patches[0, bin_, offset : offset + h * w] = example.pixel_values[first : first + h * w]
                frame_hw[0, bin_, count[bin_]] = h, w
                first, count[bin_] = first + h * w, count[bin_] + 1
        lengths = np.array([self.tokens], np.int32)
        return Batch(input_ids, labels, position_ids, lengths, patches, frame_hw, vision_token_index, segment_ids)

    def _indexed_examples(self) -> Iterator[tuple[Example, np.ndarray]]:
        """Yields each example with the indices of its merged patches."""
        for unit, places in self._units:
            index = self._index(unit[0], places)
            yield from ((example, index) for example in unit)

    def _index(self, example: Example, places: np.ndarray) -> np.ndarray:
        """Returns the indices of the example's merged patches in the row's padded array, int32 (visual tokens,)."""
        num_tokens = self.config.vision.num_tokens
        parts = [
            num_tokens(bin_ * self.shape.patches + offset) + np.arange(num_tokens(size))
            for (bin_, offset), size in zip(places.tolist(), frame_sizes(example).prod(axis=1).tolist(), strict=True)
        ]
        return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int32)

    def _too_large(self, size: UnitSize) -> InputError:
        patches = size.frame_patches
        return InputError(
            f"{size.examples} answers of {size.tokens} tokens, with {len(patches)} frames of up to "
            f"{patches.max(initial=0)} patches, "
            f"are more than the capacity of an empty row: {self.shape.samples} answers, {self.shape.tokens} tokens, "
            f"{self.shape.bins} bins of {self.shape.patches} patches or {self.shape.frames} frames. Use fewer frames "
            "(n_frames), smaller frames (max_pixels), or larger rows."
        )


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """Returns rows of one shape as one batch, with one group per row."""
    names = [field.name for field in dataclasses.fields(Batch)]
    return Batch(**{name: np.concatenate([getattr(row, name) for row in rows]) for name in names})
