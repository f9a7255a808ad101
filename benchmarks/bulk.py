"""Tests `infer.caption` on many clips, some of them broken, with kills at random times, and measures its memory.

    python -m benchmarks.bulk --broken 30                    # 300 clips of 360p to 1080p at the released pixel limits
    python -m benchmarks.bulk --clips 300 --small --kills 10
    python -m benchmarks.bulk --clips 2000 --small           # is memory flat?

Moving shapes are written as mp4 files of many sizes, landscape and portrait. With --small they have the sizes and
lengths of the embedded model's evaluation. The embedded model captions them in float32, with three prompts in turn.
Prints the program's summary of its last run (throughput, padding, compilations), whether every clip has exactly one
line and captions equal those of `infer.describe`, and the memory of all its processes at each tenth of the clips.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from eval.shapes.annotations import GROUNDED_PROMPT, VIDEO_PROMPT
from eval.shapes.clips import HELD_OUT, draw_clips
from eval.shapes.render import write_clip
from tarsier_jax.weights import EMBEDDED, resolve

SHORT_SIDES = (360, 480, 540, 720, 1080)
ASPECTS = (16 / 9, 4 / 3, 1.0, 3 / 4, 9 / 16)
PROMPTS = (VIDEO_PROMPT, GROUNDED_PROMPT, "What happens first?")


def write_videos(directory: Path, count: int, small: bool) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [directory / f"{i}.mp4" for i in range(count)]
    for i, path in enumerate(paths):
        (clip,) = draw_clips(HELD_OUT + i, 1, other=small and i % 2 == 1)
        frames = clip.video["frames"]
        if small:
            write_clip(path, frames)
        else:
            side, aspect = int(rng.choice(SHORT_SIDES)), float(rng.choice(ASPECTS))
            width, height = (round(side * max(1, x) / 2) * 2 for x in (aspect, 1 / aspect))
            write_scaled(path, frames, width, height)
    return paths


def write_scaled(path: Path, frames: np.ndarray, width: int, height: int) -> None:
    scale = ["-vf", f"scale={width}:{height}", "-preset", "ultrafast"]
    size = frames.shape[2], frames.shape[1]
    writer = imageio_ffmpeg.write_frames(str(path), size, fps=16, macro_block_size=1, output_params=scale)
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


# Ten kinds of damage. Each function receives an intact clip and the path of the broken one, and returns its path.


def missing(whole: Path, path: Path) -> Path:
    return path


def empty(whole: Path, path: Path) -> Path:
    path.touch()
    return path


def first_bytes(whole: Path, path: Path) -> Path:
    path.write_bytes(whole.read_bytes()[:100])
    return path


def without_head(whole: Path, path: Path) -> Path:
    path.write_bytes(whole.read_bytes()[200:])
    return path


def half(whole: Path, path: Path) -> Path:
    content = whole.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def letter(whole: Path, path: Path) -> Path:
    path.write_text("This is a letter. " * 100, encoding="utf-8")
    return path


def no_picture(whole: Path, path: Path) -> Path:
    return letter(whole, path.with_suffix(".png"))


def sound(whole: Path, path: Path) -> Path:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi", "-i", "sine=d=0.1", str(path)]
    subprocess.run(command, check=True)
    return path


def no_frames(whole: Path, path: Path) -> Path:
    path.with_suffix("").mkdir()
    return path.with_suffix("")


def no_media(whole: Path, path: Path) -> Path:
    return letter(whole, path.with_suffix(".txt"))


DAMAGES: tuple[Callable[[Path, Path], Path], ...] = (
    *(missing, empty, first_bytes, without_head, half),
    *(letter, no_picture, sound, no_frames, no_media),
)


def break_clips(paths: list[Path], count: int) -> list[Path]:
    """Damages `count` of the clips, evenly spaced, with the kinds of damage in turn."""
    paths = list(paths)
    for n in range(count):
        i = n * len(paths) // count
        whole = paths[i].with_suffix(".whole")
        paths[i].rename(whole)
        paths[i] = DAMAGES[n % len(DAMAGES)](whole, paths[i])
    return paths


def memory(pid: int) -> int:
    """Returns the bytes of a process and its descendants. Shared memory is counted once (Linux)."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except OSError:  # the process has ended
        return 0
    own = next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)
    return own * 1024 + sum(memory(int(child)) for child in children)


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_killed(command: list[str], output: Path, kills: int, clips: int) -> None:
    """Starts the command and kills it at a random moment, `kills` times."""
    wait = random.Random(0)
    for _ in range(kills):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        aim = lines_in(output) + wait.randrange(clips // (kills + 1))
        while process.poll() is None and lines_in(output) <= aim:
            time.sleep(0.01)
        time.sleep(wait.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"killed at {lines_in(output)} lines", flush=True)


def run_watched(command: list[str], output: Path, clips: int) -> tuple[int, list[tuple[int, int]]]:
    """Runs the command and returns its exit status, and (lines, bytes of memory) at each second."""
    samples = []
    process = subprocess.Popen(command)
    while process.poll() is None:
        samples.append((lines_in(output), memory(process.pid)))
        time.sleep(1)
    return process.returncode, samples


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bulk", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--broken", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--compare", type=int, default=0, help="number of clips that infer.describe also captions")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--n_frames", type=int, default=16)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as directory:
        return examine(args, Path(directory))


def examine(args: argparse.Namespace, directory: Path) -> int:
    model, clips, output = directory / "model", directory / "clips", directory / "out.jsonl"
    shutil.copytree(resolve(EMBEDDED), model)
    if not args.small:
        (model / "preprocessor_config.json").write_text("{}", encoding="utf-8")  # the released models' limits
    clips.mkdir()
    paths = break_clips(write_videos(clips, args.clips, args.small), args.broken)
    source = directory / "list.jsonl"
    requests = [{"input": str(path), "prompt": PROMPTS[i % len(PROMPTS)]} for i, path in enumerate(paths)]
    source.write_text("".join(json.dumps(line) + "\n" for line in requests), encoding="utf-8")
    shared = ["--model", str(model), "--n_frames", str(args.n_frames), "--max_new_tokens", "96"]
    sizes = ["--slots", str(args.slots), "--workers", str(args.workers)]
    files = ["--input", str(source), "--output", str(output)]
    command = [sys.executable, "-m", "infer.caption", *shared, *sizes, *files]
    run_killed(command, output, args.kills, args.clips)
    status, samples = run_watched(command, output, args.clips)
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    once = sorted(line["idx"] for line in lines) == list(range(args.clips))
    errors = [line["error"] for line in lines if "error" in line]
    summary = "every clip once" if once else "NOT every clip once"
    print(f"{len(lines)} lines, {summary}; {len(errors)} errors, status {status}")
    for error in errors[: len(DAMAGES)]:
        print(f"  {error.replace(str(directory), '')}")
    right = compare_with_describe(lines, args.compare, shared)
    print_memory(samples, args.clips)
    return 0 if once and right and len(errors) == args.broken and status == bool(errors) else 1


def compare_with_describe(lines: list[dict], count: int, flags: list[str]) -> bool:
    """Returns whether the first `count` captions equal those of `infer.describe`, which answers one clip at a time."""
    captions = sorted((line for line in lines if "caption" in line), key=lambda line: line["idx"])[:count]
    if not captions:
        return True
    alone = {}
    for prompt in PROMPTS:
        inputs = [line["input"] for line in captions if line["prompt"] == prompt]
        if not inputs:
            continue
        command = [sys.executable, "-m", "infer.describe", *flags, "--json", "--prompt", prompt, "--input", *inputs]
        stdout = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        alone |= {line["input"]: line["caption"] for line in map(json.loads, stdout.splitlines())}
    same = sum(alone[line["input"]] == line["caption"] for line in captions)
    print(f"{same} of {len(captions)} captions equal those of infer.describe")
    return same == len(captions)


def print_memory(samples: list[tuple[int, int]], clips: int) -> None:
    tenths = [[size for lines, size in samples if clips * n <= 10 * lines < clips * (n + 1)] for n in range(10)]
    medians = [float(np.median(sizes)) for sizes in tenths if sizes]
    print("GiB at each tenth: " + " ".join(f"{size / 2**30:.2f}" for size in medians))


if __name__ == "__main__":
    sys.exit(main())
