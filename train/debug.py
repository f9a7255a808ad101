"""What "random" stands for in a configuration: a tiny model and a few clips, so that debug sizes need no files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from PIL import Image

from infer.demo import render_frames
from infer.random_model import write_random_checkpoint

_CLIPS = 8


def write_debug_model(directory: Path) -> Path:
    """A random Tarsier2 of two layers."""
    return _once(directory, write_random_checkpoint)


def write_debug_clips(directory: Path) -> Path:
    """Annotations of a few rendered clips; gives their file."""
    return _once(directory, _write_clips) / "annotations.jsonl"


def _write_clips(directory: Path) -> None:
    directory.mkdir(parents=True)
    lines = []
    for i in range(_CLIPS):
        frames = 8 + 4 * i
        clip = [Image.fromarray(f) for f in render_frames(frames, 96 + 16 * (i % 3), 128 + 32 * (i % 2))]
        clip[0].save(directory / f"{i}.gif", save_all=True, append_images=clip[1:], duration=40)
        video = {"type": "video", "video": {"video_file": f"{i}.gif"}}
        question = {"type": "text", "text": "Describe the video in detail."}
        answer = {"type": "text", "text": f"A red disc crosses a blue square in {frames} frames."}
        worse = "A blue square crosses a red disc." if i % 2 else "Nothing happens."
        answer |= {"chosen": answer["text"], "rejected": worse}
        messages = [{"role": "user", "content": [video, question]}, {"role": "assistant", "content": [answer]}]
        lines.append(json.dumps({"messages": messages, "task": "video/caption", "idx": i}))
    (directory / "annotations.jsonl").write_text("\n".join(lines) + "\n")


def _once(directory: Path, write: Callable[[Path], object]) -> Path:
    """Process 0 writes, and renames when all is there; the others wait."""
    if jax.process_index() == 0 and not directory.exists():
        partial = directory.with_name(f".{directory.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write(partial)
        partial.rename(directory)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(str(directory))
    return directory
