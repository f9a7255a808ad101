"""Captions a clip without a download: `python -m infer.demo`.

Writes demo.png, the frames that the model saw over its caption. Until a trained small model is embedded in the package,
the weights are random, and the caption is noise.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

import tarsier_jax
from eval.shapes.render import render, write_clip
from eval.shapes.script import generate
from infer.contact_sheet import contact_sheet
from infer.runtime import Options, describe_file, prepare_process
from tarsier_jax.cli import run
from tarsier_jax.errors import InputError
from tarsier_jax.processing.sampling import sample_uniform
from tarsier_jax.processing.video import open_clip
from train.untrained import TINY, write_untrained

_PROMPT = "Describe the video in detail."
_OPTIONS = Options(max_new_tokens=24)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infer.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="demo.png", help="picture to write (default demo.png)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    prepare_process()
    with tempfile.TemporaryDirectory() as directory:
        path = render_clip(Path(directory) / "shapes.mp4")
        model, processor = tarsier_jax.load(write_untrained(Path(directory) / "random-tarsier2", TINY))
        caption = describe_file(model, processor, str(path), _PROMPT, _OPTIONS).caption
        clip = open_clip(path)
        frames = list(clip.read(sample_uniform(clip.length, processor.options.n_frames)))
    try:
        contact_sheet(frames, caption).save(args.output, format="PNG")
    except OSError as e:
        raise InputError(f"--output {args.output} cannot be written ({e.strerror}). Choose another file.") from None
    print("This model is random: the words below are noise. They show that everything runs.\n")
    print(f"{caption}\n\nframes and caption: {args.output}")
    return 0


def render_clip(path: Path) -> Path:
    """Three shapes and five events."""
    scene = generate(np.random.default_rng(0), frames=48, aspect=4 / 3, shapes=3, events=5)
    return write_clip(path, render(scene, 144, 192))


if __name__ == "__main__":
    sys.exit(run(lambda: main(parse())))
