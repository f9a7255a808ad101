"""Frames per second and memory of video readers, and of the rows that training loads.

    python -m benchmarks.loading --clips 40 --workers 2          # whole samples and readers, on clips of 360p to 1080p
    python -m benchmarks.loading --large                          # one hour of 1080p, a 4K and an 8K clip
    python -m benchmarks.loading --rows 6 --workers 8             # six rows per step of training

Each reads 16 frames per clip. Whole samples: our processor in threads against the original's calls in one thread
(decord, a resize to the pixel budget, transformers' image processor). Readers, frames as PIL images in one thread:
ours; decord, which decodes from the start up to frame 3,000 and seeks beyond; PyAV with a seek and forward decoding per
frame. Files are cached, rounds alternate, and medians are printed. With --large, each reader runs in its own process,
and the peak memory of the process is printed. With --rows, a `RowLoader` packs the clips of 360p to 1080p into rows of
16,384 tokens in bfloat16. The memory is the peak of the process above the imports, with one step in use and one ahead;
the times are those with samples that take a second each and no CPU.
"""

import argparse
import dataclasses
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import imageio_ffmpeg
import numpy as np
from PIL import Image

import tarsier_jax
from benchmarks.bulk import write_videos
from infer.bulk.inputs import Item
from infer.bulk.loading import ItemLoader
from tarsier_jax.processing.frame_sampling import sample_uniform
from tarsier_jax.processing.image import Qwen2ImageProcessor, fit_budget
from tarsier_jax.processing.processor import Processor
from tarsier_jax.processing.video import open_clip
from tarsier_jax.weights import EMBEDDED
from train.config import TrainConfig
from train.data.annotations import mix_files, read_sample
from train.data.loading import RowLoader
from train.data.packing import DataConfig, Load, PackingConfig, PackUnit, fit_packing
from train.sft import sft_objective

NUM_FRAMES = 16
_PROMPT = "Describe the video in detail."
SCANNED = 3000  # length up to which decord decodes from the start


def read_ours(path: Path) -> int:
    clip = open_clip(path)
    return sum(1 for _ in clip.read(sample_uniform(clip.length, NUM_FRAMES)))


def read_decord(path: Path) -> int:
    from decord import VideoReader, cpu

    reader = VideoReader(str(path), ctx=cpu(0), num_threads=1)
    indices = sample_uniform(len(reader), NUM_FRAMES)
    if len(reader) > SCANNED:
        return len([Image.fromarray(frame) for frame in reader.get_batch(indices).asnumpy()])
    targets, count = set(indices), 0
    for i in range(indices[-1] + 1):
        frame = reader.next()
        if i in targets:
            Image.fromarray(frame.asnumpy())
            count += 1
    return count


def read_pyav(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        assert stream.duration is not None and stream.average_rate is not None and stream.time_base is not None
        length = round(stream.duration * stream.time_base * stream.average_rate)
        count = 0
        for index in sample_uniform(length, NUM_FRAMES):
            pts = round(index / stream.average_rate / stream.time_base)
            container.seek(pts, stream=stream)
            frames = (frame for frame in container.decode(stream) if frame.pts is not None and frame.pts >= pts)
            frame = next(frames, None)
            if frame is not None:
                frame.to_image()
                count += 1
        return count


READERS: dict[str, Callable[[Path], int]] = {"ours": read_ours, "decord": read_decord, "PyAV": read_pyav}


def original(paths: Sequence[Path], max_pixels: int) -> int:
    """Patchifies all clips and returns the number of frames."""
    from decord import VideoReader, cpu
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil()
    count = 0
    for path in paths:
        reader = VideoReader(str(path), ctx=cpu(0), num_threads=1)
        frames = reader.get_batch(sample_uniform(len(reader), NUM_FRAMES)).asnumpy()
        images = [fit_budget(Image.fromarray(frame), 0, max_pixels) for frame in frames]
        processor(images=images, return_tensors="np")
        count += len(frames)
    return count


def ours(paths: Sequence[Path], processor: Processor, workers: int) -> int:
    loader = ItemLoader(processor, _PROMPT)
    items = [Item(i, i, str(path), {}) for i, path in enumerate(paths)]
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(loader, items):
            pass
    return loader.frames


def compare_readers(clips: int, workers: int, rounds: int) -> None:
    """Prints the rates of whole samples and of readers."""
    _, processor = tarsier_jax.load(EMBEDDED)
    processor = dataclasses.replace(processor, image=Qwen2ImageProcessor())
    with tempfile.TemporaryDirectory() as directory:
        paths = write_videos(Path(directory), clips, small=False)
        samples = {
            f"ours, {workers} threads": lambda: ours(paths, processor, workers),
            "the original's calls": lambda: original(paths, processor.options.max_pixels),
        }
        readers = {name: lambda read=read: sum(map(read, paths)) for name, read in READERS.items()}
        for title, functions in (("whole samples", samples), ("readers, one thread", readers)):
            print(f"{title}, {clips} clips, medians of {rounds} rounds")
            print_rates(alternate(functions, rounds))


def alternate(functions: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Returns the frames per second of each function in each round."""
    rates: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, run in functions.items():
            start = time.perf_counter()
            count = run()
            rates[name].append(count / (time.perf_counter() - start))
    return rates


def print_rates(rates: dict[str, list[float]]) -> None:
    first = next(iter(rates.values()))
    for name, values in rates.items():
        ratio = np.median(np.divide(first, values))
        each = ", ".join(f"{rate:.1f}" for rate in values)
        print(f"  {name:<22} {statistics.median(values):7.1f} frames/s  ({each})  ours: {ratio:.2f} times", flush=True)


def compare_large(rounds: int) -> None:
    """Prints the seconds and the peak memory of each reader on large clips."""
    with tempfile.TemporaryDirectory() as directory:
        for name, path in write_large(Path(directory)):
            print(f"{name}: {path.stat().st_size / 2**20:.0f} MiB")
            seconds: dict[str, list[float]] = {reader: [] for reader in READERS}
            memory = dict.fromkeys(READERS, 0)
            for _ in range(rounds):
                for reader in READERS:
                    command = [sys.executable, "-m", "benchmarks.loading", "--reader", reader, str(path)]
                    values = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                    seconds[reader].append(float(values[-2]))
                    memory[reader] = max(memory[reader], int(values[-1]))
            for reader in READERS:
                median = statistics.median(seconds[reader])
                print(f"  {reader:<8} {median:6.2f} s  {memory[reader]:6.0f} MiB above the imports", flush=True)


def write_large(directory: Path) -> Iterable[tuple[str, Path]]:
    """Writes an hour of 1080p (30 s repeated, a key frame every 250 frames), 4 s of 4K and 2 s of 8K in H.264."""
    kinds = {"an hour of 1080p": ("1920x1080", 30), "4 s of 4K": ("3840x2160", 4), "2 s of 8K": ("7680x4320", 2)}
    for name, (size, seconds) in kinds.items():
        part, path = directory / f"part_{size}.mp4", directory / f"{size}.mp4"
        picture = ["-f", "lavfi", "-i", f"testsrc2=s={size}:r=25:d={seconds}", "-vf", "noise=alls=8:allf=t"]
        run_ffmpeg(*picture, "-c:v", "libx264", "-preset", "veryfast", "-crf", "30", "-pix_fmt", "yuv420p", part)
        loops = 119 if seconds == 30 else 0
        run_ffmpeg("-stream_loop", loops, "-i", part, "-c", "copy", path)
        yield name, path
        path.unlink()


class DelayedLoad:
    """Returns one unit after a second, as often as it is called.

    Attributes:
        most: Largest number of simultaneous calls.
    """

    def __init__(self, unit: PackUnit):
        self._unit, self._mutex, self._running, self.most = unit, threading.Lock(), 0, 0

    def __call__(self, sample: Mapping[str, Any], rng: np.random.Generator) -> PackUnit:
        with self._mutex:
            self._running += 1
            self.most = max(self.most, self._running)
        time.sleep(1)
        with self._mutex:
            self._running -= 1
        return self._unit


def measure_rows(clips: int, num_rows: int, workers: int) -> None:
    """Prints the memory per row, and threads and times with samples that take a second, whatever the CPUs."""
    _, processor = tarsier_jax.load(EMBEDDED)
    processor = dataclasses.replace(processor, image=Qwen2ImageProcessor())
    data = fit_packing(DataConfig(), processor.options, processor.config.vision)
    packing = PackingConfig(processor, data.row_shape, data.packing_buffer, data.max_bad_fraction, "bfloat16")
    load = functools.partial(sft_objective(TrainConfig()).load, processor)
    with tempfile.TemporaryDirectory() as directory:
        lines: Any = mix_files(write_annotations(Path(directory), clips), 0, repeat=True)

        def open_rows(load: Load) -> RowLoader:
            return RowLoader(lines, load, packing, seed=0, media_root="", num_rows=num_rows, num_workers=workers)

        memory = measure_memory(open_rows(load))
        delayed = DelayedLoad(load(read_sample(lines[0].text, ""), np.random.default_rng(0)))
        seconds, resume = measure_times(open_rows, delayed)
    print(
        f"{num_rows} rows, {workers} workers: {memory / num_rows:.0f} MiB per row. Samples of 1 s: {delayed.most} at "
        f"once, {seconds:.1f} s per step, {resume:.1f} s to the first step after a resume"
    )


def measure_memory(loader: RowLoader, steps: int = 5) -> float:
    """Returns the MiB of the process above those before the first step."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(steps):
        next(loader)
    loader.close()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def measure_times(open_rows: Callable[[Load], RowLoader], load: Load, steps: int = 5) -> tuple[float, float]:
    """Returns the seconds per step, and those of a resume up to its first step."""
    loader = open_rows(load)
    next(loader)
    start = time.perf_counter()
    for _ in range(steps):
        next(loader)
    per_step, state = (time.perf_counter() - start) / steps, loader.get_state()
    loader.close()
    loader = open_rows(load)
    start = time.perf_counter()
    loader.set_state([state])
    next(loader)
    resume = time.perf_counter() - start
    loader.close()
    return per_step, resume


def write_annotations(directory: Path, clips: int) -> str:
    """Writes clips of 360p to 1080p with a description each, and returns the file."""
    file = directory / "clips.jsonl"
    with file.open("w") as out:
        for path in write_videos(directory, clips, small=False):
            video = {"type": "video", "video": {"video_file": str(path)}}
            question = {"role": "user", "content": [video, {"type": "text", "text": _PROMPT}]}
            out.write(json.dumps({"messages": [question, {"role": "assistant", "content": "A circle moves."}]}) + "\n")
    return str(file)


def run_ffmpeg(*arguments: object) -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)


def read_once(reader: str, path: Path) -> None:
    """Prints the seconds and the MiB of memory of one reader for one file."""
    if reader == "decord":
        import decord  # noqa: F401
    if reader == "PyAV":
        import av  # noqa: F401
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    count = READERS[reader](path)
    seconds = time.perf_counter() - start
    assert count == NUM_FRAMES, count
    print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loading", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="measure large clips and memory")
    parser.add_argument("--rows", type=int, help="measure the rows of training, as many per step")
    parser.add_argument("--reader", nargs=2, metavar=("READER", "FILE"), help="measure one reader on one file")
    args = parser.parse_args()
    if args.reader:
        read_once(args.reader[0], Path(args.reader[1]))
    elif args.rows:
        measure_rows(args.clips, args.rows, args.workers)
    elif args.large:
        compare_large(args.rounds)
    else:
        compare_readers(args.clips, args.workers, args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
