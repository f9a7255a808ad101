"""Proposes the rows of a run from its annotations, without training.

    python -m train.plan --config configs/recap_7b.py --config.data.train=FILE --config.data.media_root=DIR

Measures some samples of the mixture: their tokens, frames, and sizes of frames. It decodes one frame of each video.
Packs the sizes into rows of the configuration and of other shapes, and prints for each: the samples per row, the
padding, the FLOPs per sample of a step relative to the configuration's (padding included), and the steps per epoch.
Ends with the flags of the rows with the fewest FLOPs. Longer rows take more memory; see `python -m train.aot`.
"""

import collections
import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import InputError
from tarsier_jax.families import load_config
from tarsier_jax.processing.packing import RowShape, RowSpace, UnitSize
from tarsier_jax.programs import prepare_process, run
from tarsier_jax.weights import resolve
from train.aot import OBJECTIVES
from train.config import TrainConfig, define_flags, read_flags
from train.data.annotations import num_lines
from train.data.packing import BadSample, fit_packing
from train.data.planning import (
    NUM_SAMPLES,
    Material,
    MeasuredSample,
    RowEstimate,
    collect,
    estimate_rows,
    lines_per_row,
    measure_samples,
    steps_of_epochs,
)
from train.debug_data import write_debug_data
from train.run import training_processor
from train.throughput import Work, step_flops

_ROW_LENGTHS = (1.0, 0.875, 0.75, 0.625, 0.5)  # fractions of the longest row
_FRAMES = 4  # numbers of frames per bin that are tried
_SMALLEST_BIN = 512  # patches of a proposed bin, which attention on TPUs computes in tiles of that size
_TILE = 64  # patches; divisor of the patches of a proposed bin
_BIN_COUNTS = 4  # numbers of bins that are tried first, per length and size of bins
_INTERVAL = 5.0  # seconds between two lines of progress
_BAD_LINES = 5  # bad samples that are named


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows of a shape, and an estimate of their content.

    Attributes:
        shape: Sizes of a row.
        rows: Content of the rows.
        flops: FLOPs of a training step per sample, padding included.
    """

    shape: RowShape
    rows: RowEstimate
    flops: float


def make_plan(sizes: Sequence[UnitSize], shape: RowShape, packing_buffer: int, model: ModelConfig) -> Plan:
    """Raises InputError: every sample exceeds an empty row."""
    rows = estimate_rows(sizes, shape, packing_buffer)
    return Plan(shape, rows, row_flops(model, shape) / rows.samples)


def row_flops(model: ModelConfig, shape: RowShape) -> float:
    """Returns the FLOPs of a training step for a row, padding included.

    All parameters are trained, and all tokens are predicted. Attention computes the lower triangle of a row's tokens,
    and all pairs of patches of a bin.
    """
    work = Work(
        tokens=shape.tokens,
        token_pairs=shape.tokens * (shape.tokens + 1) // 2,
        patches=shape.bins * shape.patches,
        patch_pairs=shape.bins * shape.patches**2,
        targets=shape.tokens,
    )
    return step_flops(model, work)


def propose(sizes: Sequence[UnitSize], longest: RowShape, packing_buffer: int, model: ModelConfig) -> list[Plan]:
    """Returns the rows with the fewest FLOPs per sample for several lengths, the longest first.

    Every sample that fits `longest.tokens` fits the proposed rows.

    Args:
        sizes: Sizes of samples.
        longest: Shape with the tokens of the longest row. Its frames and samples apply to all rows.
        packing_buffer: Samples among which a row looks for the next one that fits.
        model: Sizes of the model.
    """
    fitting = [size for size in sizes if size.tokens <= longest.tokens]
    if not fitting:
        return []

    def plan_of(shape: RowShape) -> Plan | None:
        return make_plan(sizes, shape, packing_buffer, model) if _fit_all(fitting, shape) else None

    proposals = []
    bin_sizes = _bin_sizes(fitting, model) or [longest.patches]
    for length in _ROW_LENGTHS:
        row = dataclasses.replace(longest, tokens=max(64, int(longest.tokens * length) // 64 * 64))
        shapes = [shape for patches in bin_sizes for shape in _shapes(fitting, row, patches, model)]
        best = min(filter(None, map(plan_of, shapes)), key=lambda plan: plan.flops, default=None)
        if best is not None:
            proposals.append(_with_fewer_bins(best, plan_of))
    return proposals


def _with_fewer_bins(plan: Plan, plan_of: Callable[[RowShape], Plan | None]) -> Plan:
    """Returns the plan, with one bin fewer as long as this saves FLOPs per sample."""
    while plan.shape.bins:
        fewer = plan_of(dataclasses.replace(plan.shape, bins=plan.shape.bins - 1))
        if fewer is None or fewer.flops >= plan.flops:
            break
        plan = fewer
    return plan


def _fit_all(sizes: Sequence[UnitSize], shape: RowShape) -> bool:
    return all(RowSpace(shape).allocate(size) is not None for size in sizes)


def _bin_sizes(sizes: Sequence[UnitSize], model: ModelConfig) -> list[int]:
    """Returns patches per bin that contain some frames of the largest size, or of one of the two most frequent sizes.

    Samples without frames need none.
    """
    counts = collections.Counter(patches for size in sizes for patches in size.frame_patches.tolist())
    largest, multiple = max(counts, default=0), model.vision.bin_multiple
    if _TILE % multiple == 0:
        multiple = _TILE
    bins = set()
    for frame in {largest, *(patches for patches, _ in counts.most_common(2))} - {0}:
        first = math.ceil(_SMALLEST_BIN / frame)
        bins |= {math.ceil((first + more) * frame / multiple) * multiple for more in range(_FRAMES)}
    return sorted(patches for patches in bins if largest <= patches <= _FRAMES * max(largest, _SMALLEST_BIN))


def _shapes(sizes: Sequence[UnitSize], row: RowShape, patches: int, model: ModelConfig) -> list[RowShape]:
    """Returns the row with bins of `patches` patches: as many as its tokens can use, and up to a third fewer."""
    visual_tokens = model.vision.num_tokens(sum(int(size.frame_patches.sum()) for size in sizes))
    visual_fraction = visual_tokens / sum(size.tokens for size in sizes)
    most = math.ceil(1.15 * visual_fraction * row.tokens / model.vision.num_tokens(patches))
    numbers = {round(count) for count in np.linspace(2 / 3 * most, most, _BIN_COUNTS)}
    frames = max(1, min(row.frames, patches // model.vision.smallest_frame))
    return [dataclasses.replace(row, bins=bins, patches=patches, frames=frames) for bins in sorted(numbers)]


def format_material(material: Material, num_all: int, model: ModelConfig) -> str:
    """Returns a table of the measured samples, and the reasons of bad ones."""
    sizes = material.sizes
    frames = [size.frame_patches for size in sizes]
    visual = [model.vision.num_tokens(patches).sum() for patches in frames]
    rows = {
        "frames per sample": [len(patches) for patches in frames],
        "seconds per video": [seconds for sample in material.samples for seconds in sample.seconds],
        "patches per frame": np.concatenate(frames),
        "visual tokens per sample": visual,
        "tokens per sample": [size.tokens for size in sizes],
    }
    lines = [f"{material.num_lines} of {num_all:,} lines, {len(material.bad)} of them unusable"]
    lines += [f"  {bad.file} line {bad.line}: {bad.reason}" for bad in material.bad[:_BAD_LINES]]
    lines.append(f"{'':<26}{'smallest':>10}{'median':>10}{'95%':>10}{'largest':>10}")
    for name, values in rows.items():
        if len(values):
            numbers = np.quantile(values, (0, 0.5, 0.95, 1))
            lines.append(f"{name:<26}" + "".join(f"{number:>10,.0f}" for number in numbers))
    return "\n".join(lines)


def format_plans(plans: Sequence[Plan], config: TrainConfig, material: Material, num_all: int) -> str:
    """Returns a table of plans, whose first one is the reference of the FLOPs."""
    lines = ["  seq_len      bins x patches   samples/row   padding: tokens  patches   FLOPs/sample   steps/epoch"]
    for plan in plans:
        shape, rows = plan.shape, plan.rows
        steps = steps_of_epochs(config, 1, lines_per_row(material, rows), num_all)
        lines.append(
            f"  {shape.tokens:>7,}  {shape.bins:>6} x {shape.patches:>7,}   {rows.samples:>11.2f}   "
            f"{rows.token_padding:>15.1%}  {rows.patch_padding:>7.1%}   {plan.flops / plans[0].flops:>12.2f}   "
            f"{steps:>11,}" + (f"   {rows.num_too_large} samples are too large" if rows.num_too_large else "")
        )
    return "\n".join(lines)


def format_flags(shape: RowShape) -> str:
    """Returns the flags of a training program for rows of a shape."""
    values = {
        "seq_len": shape.tokens,
        "vision_bins": shape.bins,
        "patches_per_bin": shape.patches,
        "frames_per_bin": shape.frames,
    }
    return " ".join(f"--config.data.{key}={value}" for key, value in values.items())


def _with_progress(measured: Iterable[MeasuredSample | BadSample]) -> Iterator[MeasuredSample | BadSample]:
    """Yields the samples, and prints their number from time to time."""
    last = time.perf_counter()
    for number, sample in enumerate(measured, 1):
        if time.perf_counter() - last > _INTERVAL:
            print(f"measured {number} samples", file=sys.stderr, flush=True)
            last = time.perf_counter()
        yield sample


def plan_rows(config: TrainConfig, program: str, num_samples: int, max_seq_len: int) -> None:
    """Prints the material, the rows of the configuration and the proposed ones.

    Raises:
        TarsierError: the checkpoint or the annotations cannot be used.
    """
    directory = resolve(config.model)
    model = load_config(directory)
    objective = OBJECTIVES[program](config)
    data = fit_packing(config.data, config.processor, model.vision, objective.answers)
    processor = training_processor(directory, model, config)
    load = objective.load_plain or objective.load
    material = collect(_with_progress(measure_samples(config, processor, load, num_samples)))
    num_all = num_lines(data.train)
    print(format_material(material, num_all, model), flush=True)
    longest = dataclasses.replace(data.row_shape, tokens=max_seq_len or data.seq_len)
    proposals = propose(material.sizes, longest, data.packing_buffer, model)
    if not proposals:
        raise InputError(f"No row of up to {longest.tokens} tokens fits the samples. Raise --max_seq_len.")
    present = make_plan(material.sizes, data.row_shape, data.packing_buffer, model)
    print(
        f"rows of the configuration, then proposals\n{format_plans([present, *proposals], config, material, num_all)}"
    )
    best = min(proposals, key=lambda plan: plan.flops)
    print(
        f"fewest FLOPs, for frames of up to {best.shape.patches:,} patches (a larger one is a bad sample):\n"
        f"{format_flags(best.shape)}"
    )


def main() -> int:
    values = define_flags()
    flags.DEFINE_integer("samples", NUM_SAMPLES, "Samples to measure.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "max_seq_len",
        0,
        "Tokens of the longest proposed row; 0 for config.data.seq_len.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_enum("program", "sft", list(OBJECTIVES), "Program whose samples are packed.", flag_values=values)
    config = read_flags(values)
    if not config.model:
        raise InputError("config.model is empty. Set --config.model=DIRECTORY or a hub id.")
    prepare_process()
    with tempfile.TemporaryDirectory() as directory:
        config = write_debug_data(config, Path(directory))
        plan_rows(config, values.program, values.samples, values.max_seq_len)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
