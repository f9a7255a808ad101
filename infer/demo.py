"""Captions a clip without a download: `python -m infer.demo`.

Until a trained small model is embedded in the package, the weights are random, and the caption is noise.
"""

import sys
import tempfile
from pathlib import Path

import imageio.v3 as imageio
import numpy as np

from infer import describe
from infer.random_model import write_random_checkpoint
from tarsier_jax.cli import run


def render_frames(frames: int = 48, height: int = 144, width: int = 192) -> np.ndarray:
    """A red disc crosses a blue square, uint8 (frames, height, width, 3)."""
    rows, columns = np.mgrid[:height, :width]
    clip = np.full((frames, height, width, 3), 235, np.uint8)
    clip[:, 50:100, 70:120] = (40, 80, 200)
    for i, frame in enumerate(clip):
        disc = (rows - height / 2) ** 2 + (columns - 20 - (width - 42) * i / (frames - 1)) ** 2 < 18**2
        frame[disc] = (210, 40, 40)
    return clip


def render_clip(path: Path) -> Path:
    """Writes the frames as an mp4 of 24 frames a second."""
    imageio.imwrite(path, render_frames(), fps=24, codec="libx264")
    return path


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        clip = render_clip(Path(directory) / "disc.mp4")
        model = write_random_checkpoint(Path(directory) / "random-tarsier2")
        print("This model is random: the words below are noise. They show that everything runs.\n")
        flags = ["--model", str(model), "--input", str(clip), "--max_new_tokens", "24"]
        return describe.main(describe.parse(flags))


if __name__ == "__main__":
    sys.exit(run(main))
