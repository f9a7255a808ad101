"""The rows that the samples of a run fill, estimated from the sizes of some samples without decoding their videos."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from tarsier_jax.errors import InputError
from tarsier_jax.processing.packing import RowShape, RowSpace, UnitSize
from tarsier_jax.processing.processor import Processor
from tarsier_jax.processing.sizes import without_pixels
from train.config import TrainConfig
from train.data.annotations import mix_files, num_lines
from train.data.packing import BadSample, LoadLine, PackingConfig, PackUnit

NUM_SAMPLES = 512  # samples that are measured
_NUM_PACKED = 1024  # samples that are packed for an estimate
# A row that every sample fits.
_UNLIMITED = RowShape(tokens=2**40, bins=1, patches=2**40, frames=2**40, samples=2**40)

LoadUnit = Callable[[Processor, Mapping[str, Any], np.random.Generator], PackUnit]


@dataclasses.dataclass(frozen=True)
class MeasuredSample:
    """The sizes of a sample.

    Attributes:
        size: Its tokens and frames.
        seconds: Seconds from the first to the last selected frame, of each visual whose frames have times.
    """

    size: UnitSize
    seconds: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Material:
    """Some samples of a run.

    Attributes:
        samples: The usable samples.
        bad: The others.
    """

    samples: tuple[MeasuredSample, ...]
    bad: tuple[BadSample, ...]

    @property
    def sizes(self) -> list[UnitSize]:
        return [sample.size for sample in self.samples]

    @property
    def num_lines(self) -> int:
        """Lines of annotations that were measured."""
        return len(self.samples) + len(self.bad)


@dataclasses.dataclass(frozen=True)
class RowEstimate:
    """The mean content of rows.

    Attributes:
        samples: Samples per row.
        token_padding: Fraction of padding among tokens.
        patch_padding: Fraction of padding among patches; 0 for rows without bins.
        num_too_large: Samples that exceed an empty row.
    """

    samples: float
    token_padding: float
    patch_padding: float
    num_too_large: int


def measure_samples(
    config: TrainConfig, processor: Processor, load: LoadUnit, num_samples: int = NUM_SAMPLES
) -> Iterator[MeasuredSample | BadSample]:
    """Yields samples, measured in threads, or the reasons why they cannot be used.

    Args:
        config: Configuration of the run.
        processor: Processor of the run.
        load: Returns the unit of an annotation.
        num_samples: Samples to measure, random ones of the mixture; at most as many as there are lines.

    Raises:
        InputError: the annotations cannot be read.
    """
    data, threads = config.data, max(1, config.data.num_workers)
    packer = PackingConfig(processor, _UNLIMITED, 1, 1.0, "float32")
    load_line = LoadLine(functools.partial(load, without_pixels(processor)), packer, data.media_root)
    lines = mix_files(data.train, config.seed, repeat=True).seed(config.seed).random_map(load_line)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    for sample in lines[: min(num_samples, num_lines(data.train))].to_iter_dataset(options):
        yield _measured(sample) if isinstance(sample, PackUnit) else sample


def _measured(sample: PackUnit) -> MeasuredSample:
    times = [selection.times for selection in sample.unit[0].selections]
    return MeasuredSample(UnitSize.of(sample.unit), tuple(t[-1] - t[0] for t in times if t))


def collect(measured: Iterable[MeasuredSample | BadSample]) -> Material:
    """Returns the output of `measure_samples` as one record.

    Raises:
        InputError: no sample can be used.
    """
    lines = list(measured)
    samples = tuple(line for line in lines if isinstance(line, MeasuredSample))
    bad = tuple(line for line in lines if isinstance(line, BadSample))
    if not samples:
        raise InputError(
            f"None of {len(bad)} samples of config.data.train can be used. The first one: {bad[0].file} line "
            f"{bad[0].line}: {bad[0].reason}"
        )
    return Material(samples, bad)


def pack_sizes(sizes: Iterator[UnitSize], shape: RowShape, packing_buffer: int) -> Iterator[RowSpace]:
    """Yields the rows that `RowLoader` makes of an endless stream of samples, each of which fits a row."""
    waiting: list[UnitSize] = []
    while True:
        row, fits = RowSpace(shape), 0
        while fits is not None:
            waiting += itertools.islice(sizes, packing_buffer - len(waiting))
            fits = next((i for i, size in enumerate(waiting) if row.allocate(size) is not None), None)
            if fits is not None:
                waiting.pop(fits)
        yield row


def estimate_rows(sizes: Sequence[UnitSize], shape: RowShape, packing_buffer: int) -> RowEstimate:
    """Returns the mean content of rows of a shape, for samples of these sizes in random order.

    Raises:
        InputError: every sample exceeds an empty row.
    """
    fitting = [size for size in sizes if RowSpace(shape).allocate(size) is not None]
    if not fitting:
        raise InputError(
            f"All {len(sizes)} measured samples exceed an empty row of {shape.tokens} tokens and {shape.bins} bins of "
            f"{shape.patches} patches. `python -m train.plan` proposes rows that they fit."
        )
    rows = list(_until(_NUM_PACKED, pack_sizes(_in_random_order(fitting), shape, packing_buffer)))
    samples, tokens, patches = (
        float(np.mean([getattr(row, name) for row in rows])) for name in ("units", "tokens", "patches")
    )
    return RowEstimate(
        samples=samples,
        token_padding=1 - tokens / shape.tokens,
        patch_padding=1 - patches / (shape.bins * shape.patches) if shape.bins else 0.0,
        num_too_large=len(sizes) - len(fitting),
    )


def lines_per_row(material: Material, rows: RowEstimate) -> float:
    """Returns the lines of annotations that a row takes on average, those of unusable samples included."""
    return rows.samples * material.num_lines / (len(material.samples) - rows.num_too_large)


def steps_of_epochs(config: TrainConfig, num_epochs: float, lines_per_row: float, num_lines: int) -> int:
    """Returns the number of steps in which `num_epochs` times `num_lines` lines are read."""
    return math.ceil(num_epochs * num_lines / (lines_per_row * config.data.global_batch_size))


def _until(samples: int, rows: Iterator[RowSpace]) -> Iterator[RowSpace]:
    """Yields rows until they have that many samples."""
    while samples > 0:
        row = next(rows)
        samples -= row.units
        yield row


def _in_random_order(sizes: Sequence[UnitSize]) -> Iterator[UnitSize]:
    """Yields the sizes again and again, in another order at each pass."""
    rng = np.random.default_rng(0)
    while True:
        yield from (sizes[i] for i in rng.permutation(len(sizes)))
