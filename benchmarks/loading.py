"""Frames decoded and patchified a second: ours in threads, against the original's calls in one thread.

    python -m benchmarks.loading --clips 40 --workers 2

Clips of 360p to 1080p, landscape and portrait, 16 frames of each at the released pixel limits. The original's path:
decord's VideoReader with one thread, get_batch, a resize to the pixel budget, then transformers' image processor (PIL),
in one process, one clip after the other. Both start with warm files; rounds alternate, and medians are shown.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from PIL import Image

import tarsier_jax
from benchmarks.bulk import write_clips
from infer.engine import Request
from infer.inputs import Item
from infer.loading import LoadReport, load_requests
from tarsier_jax.processing.image import ImageOptions, fit_budget
from tarsier_jax.processing.processor import Processor
from tarsier_jax.processing.sampling import sample_uniform
from tarsier_jax.weights import EMBEDDED

FRAMES = 16
PROMPT = "Describe the video in detail."


def original(paths: Sequence[Path], max_pixels: int) -> int:
    """Frames, all of them patchified."""
    from decord import VideoReader, cpu
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil()
    count = 0
    for path in paths:
        reader = VideoReader(str(path), ctx=cpu(0), num_threads=1)
        frames = reader.get_batch(sample_uniform(len(reader), FRAMES)).asnumpy()
        images = [fit_budget(Image.fromarray(frame), 0, max_pixels) for frame in frames]
        processor(images=images, return_tensors="np")
        count += len(frames)
    return count


def ours(paths: Sequence[Path], processor: Processor, workers: int) -> tuple[int, LoadReport]:
    report = LoadReport()
    items = [Item(i, i, str(path), {}) for i, path in enumerate(paths)]
    for loaded in load_requests(items, processor, PROMPT, Request, workers, report):
        assert isinstance(loaded, Request), loaded
    return report.frames, report


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loading", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    _, processor = tarsier_jax.load(EMBEDDED)
    processor = dataclasses.replace(processor, image=ImageOptions())
    rates: dict[str, list[float]] = {"original": [], "ours": [], "a thread": []}
    with tempfile.TemporaryDirectory() as directory:
        paths = write_clips(Path(directory), args.clips, small=False)
        for _ in range(args.rounds):
            start = time.perf_counter()
            count = original(paths, processor.options.max_pixels)
            rates["original"].append(count / (time.perf_counter() - start))
            start = time.perf_counter()
            count, report = ours(paths, processor, args.workers)
            rates["ours"].append(count / (time.perf_counter() - start))
            rates["a thread"].append(report.frames / report.seconds)
    for name, found in rates.items():
        print(f"{name:<10} {statistics.median(found):7.1f} frames/s  ({', '.join(f'{rate:.1f}' for rate in found)})")
    ratio = np.median(np.divide(rates["ours"], rates["original"]))
    print(f"ours with {args.workers} threads: {ratio:.2f} times the original's one thread")
    return 0


if __name__ == "__main__":
    sys.exit(main())
