"""The samples of annotation lines, and the parameters of packing them into rows. `train.data.loading` packs them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np

from tarsier_jax.config import VisionConfig
from tarsier_jax.errors import InputError, reason_of
from tarsier_jax.processing.batch import Batch
from tarsier_jax.processing.packing import Row, RowShape, Unit
from tarsier_jax.processing.processor import Processor, ProcessorOptions
from train.checks import check, check_at_least
from train.data.annotations import AnnotationLine, read_sample

FORGIVEN = 10  # bad samples that a run accepts at any fraction


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Annotations of a run and how their samples are packed.

    Attributes:
        train: Annotation files, comma-separated, each with an optional weight: "a.jsonl=3,b.jsonl=1".
        eval: Held-out annotation files, in the same format; empty for none.
        media_root: Directory that relative paths of videos and images start from.
        seq_len: Tokens per packed row.
        vision_bins: Bins of patches per row; -1 for those that 0.9 of seq_len takes, the rest being text.
        patches_per_bin: Patches per bin; -1 for two of the largest frames that processor.max_pixels allows.
        frames_per_bin: Frames per bin; -1 for up to 32.
        max_samples_per_seq: Samples per row; 1 turns packing off.
        shuffle: Shuffle the lines at each pass; False keeps the order of the files.
        global_batch_size: Packed rows per optimizer step, over all devices and accumulation steps.
        packing_buffer: Decoded samples among which a row looks for the next one that fits.
        num_workers: Threads that decode.
        max_bad_fraction: Fraction of unusable samples above which the run stops.

    Raises:
        InputError: a number is out of its range.
    """

    train: str = ""
    eval: str = ""
    media_root: str = ""
    seq_len: int = 20_480
    vision_bins: int = -1
    patches_per_bin: int = -1
    frames_per_bin: int = -1
    max_samples_per_seq: int = 64
    shuffle: bool = True
    global_batch_size: int = 64
    packing_buffer: int = 4
    num_workers: int = 4
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        check_at_least(self, 1, "seq_len", "max_samples_per_seq", "packing_buffer")
        check_at_least(self, 0, "num_workers")
        check(self, ["vision_bins"], lambda bins: bins >= -1, "at least 0, or -1 to be derived")
        for name in ("patches_per_bin", "frames_per_bin"):
            check(self, [name], lambda size: size == -1 or size >= 1, "at least 1, or -1 to be derived")
        check(self, ["max_bad_fraction"], lambda share: 0 <= share <= 1, "between 0 and 1")

    @property
    def row_shape(self) -> RowShape:
        return RowShape(
            self.seq_len, self.vision_bins, self.patches_per_bin, self.frames_per_bin, self.max_samples_per_seq
        )


_MAX_FRAMES_PER_BIN = 32
_SMALLEST_BIN = 32  # patches; the sides of enlarged frames are rounded up
_VISUAL_FRACTION = 0.9  # of a row's tokens; the others are text


def fit_packing(data: DataConfig, options: ProcessorOptions, vision: VisionConfig, answers: int = 1) -> DataConfig:
    """Derives the sizes of the bins that are -1.

    A bin contains two of the largest frames: of frames of any smaller size, at least a third of the bin is filled by
    each further one. It contains one if all frames have one size, or if a row contains one sample, whose frames need as
    many bins at any size.

    Args:
        data: Configuration of the data.
        options: Options of the processor.
        vision: Sizes of the vision tower.
        answers: Sequences that share the frames of one sample: two in DPO.

    Returns:
        The configuration with vision_bins, patches_per_bin and frames_per_bin set. A row has bins for the full-size
        frames in 0.9 of seq_len, at least for those of one sample if seq_len takes them, and at most for n_frames per
        sample. Longer videos have smaller frames, which share bins.

    Raises:
        InputError: bins would split a merged patch, or a frame of the only size.
    """
    multiple = vision.bin_multiple
    if data.patches_per_bin != -1 and data.patches_per_bin % multiple:
        raise InputError(
            f"config.data.patches_per_bin is {data.patches_per_bin}, but must be a multiple of {multiple}, the patches "
            "that the model does not split: those of a token, or of a frame if all frames have one size."
        )
    samples = max(1, data.max_samples_per_seq // answers)
    largest = max(vision.largest_frame(options.max_pixels), _SMALLEST_BIN)
    patches = data.patches_per_bin
    if patches == -1:
        patches = largest * (1 if largest == vision.smallest_frame or samples == 1 else 2)
        patches = -(-patches // 64) * 64 if patches > 512 else patches  # tiles of the accelerators' kernels
        patches -= patches % multiple
    bins = data.vision_bins
    if bins == -1:
        frames = _full_size_frames(data.seq_len / vision.budget_tokens(options.max_pixels), options.n_frames, samples)
        bins = max(1, math.ceil(frames / max(1, patches // largest)))
    per_bin = data.frames_per_bin
    if per_bin == -1:
        per_bin = max(1, min(_MAX_FRAMES_PER_BIN, patches // vision.smallest_frame))
    return dataclasses.replace(data, vision_bins=bins, patches_per_bin=patches, frames_per_bin=per_bin)


def _full_size_frames(capacity: float, n_frames: int, samples: int) -> float:
    """Returns the number of full-size frames that the bins of a row must contain.

    Args:
        capacity: Frames whose tokens fill a row.
        n_frames: Frames per sample.
        samples: Maximum number of samples per row.
    """
    return min(max(_VISUAL_FRACTION * capacity, min(n_frames, math.floor(capacity))), samples * n_frames)


@dataclasses.dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used.

    Attributes:
        file: Annotation file.
        line: Line number, from 1.
        reason: Reason.
    """

    file: str
    line: int
    reason: str


@dataclasses.dataclass(frozen=True)
class PackUnit:
    """A sample ready to be packed.

    Attributes:
        unit: Examples that share frames: one in SFT, two in DPO.
        extra: Other arrays, such as DPO's reference log-probabilities.
        key: Identifier of the sample, such as the key of a reference record.
    """

    unit: Unit
    extra: Mapping[str, np.ndarray]
    key: str = ""


@dataclasses.dataclass(frozen=True)
class PackedRow:
    """A packed row.

    Attributes:
        batch: Batch of one row.
        extra: Other arrays, (1, units, ...).
        num_drawn: Samples that the stream drew since its previous row, bad ones included.
        num_truncated: Samples of the row whose text was truncated.
        bad: Bad samples among those drawn.
        keys: Keys of the units.
    """

    batch: Batch
    extra: dict[str, np.ndarray]
    num_drawn: int
    num_truncated: int
    bad: tuple[BadSample, ...]
    keys: tuple[str, ...]


# Returns the unit of a line's JSON. Raises TarsierError for a bad one.
Load = Callable[[Mapping[str, Any], np.random.Generator], PackUnit]


@dataclasses.dataclass(frozen=True)
class LoadLine(grain.transforms.RandomMap):
    """Maps an AnnotationLine to a PackUnit or a BadSample."""

    load: Load
    packer: "PackingConfig"
    media_root: str = ""

    def random_map(  # pyright: ignore[reportIncompatibleMethodOverride]  # grain annotates None
        self, element: AnnotationLine, rng: np.random.Generator
    ) -> PackUnit | BadSample:
        try:
            unit = self.load(read_sample(element.text, self.media_root), rng)
            if not any((example.labels >= 0).any() for example in unit.unit):
                raise InputError(
                    'Nothing of the sample is trained on: its answer is empty, has "loss": false, or is beyond '
                    "max_seq_len."
                )
            Row(self.packer.shape, self.packer.processor.config).add(unit.unit)  # raises if it exceeds an empty row
            return self._with_patches(unit)
        except Exception as e:  # one bad sample must not stop the run; `check_share` limits their fraction
            return BadSample(element.file, element.number, reason_of(e))

    def _with_patches(self, unit: PackUnit) -> PackUnit:
        """Returns the unit with its patches in the dtype of the row, once for all its examples, which share them."""
        patches = unit.unit[0].pixel_values.astype(self.packer.dtype)
        return dataclasses.replace(
            unit, unit=[dataclasses.replace(example, pixel_values=patches) for example in unit.unit]
        )


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """Parameters of packing.

    Attributes:
        processor: Processor of the samples.
        shape: Sizes of a row.
        packing_buffer: Decoded samples among which a row looks for the next one that fits.
        max_bad_fraction: Fraction of bad samples above which the run stops.
        dtype: Dtype of the patches.
        extra: Name -> shape (units, ...) of the extra arrays of a row.
    """

    processor: Processor
    shape: RowShape
    packing_buffer: int
    max_bad_fraction: float
    dtype: str
    extra: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


def check_share(num_bad: int, num_drawn: int, share: float, last: BadSample) -> None:
    """Raises InputError when too many samples are bad."""
    if num_bad > FORGIVEN + share * num_drawn:
        raise InputError(
            f"{num_bad} of {num_drawn} samples cannot be used, more than data.max_bad_fraction {share:g} allows. The "
            f"last one: {last.file} line {last.line}: {last.reason}"
        )
