"""Writes a small benchmark of moving shapes: `python -m eval.shapes --output DIR [--clips 100] [--seed N] [--gif]`.

DIR contains the clips as video files; descriptions.jsonl has a description per clip in the format of DREAM-1K, and
questions.jsonl a question with four options per clip in the format of TVBench. Paths in them are relative to DIR.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from eval.shapes.annotations import annotation, question_annotation
from eval.shapes.clips import HELD_OUT, draw_clips
from eval.shapes.questions import sample_question
from eval.shapes.render import write_clip
from tarsier_jax.errors import InputError
from tarsier_jax.files import locked, source_text
from tarsier_jax.mirror import output_directory
from tarsier_jax.programs import run


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.shapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=source_text, help="directory to write into")
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=HELD_OUT, help="of the first clip (default: not trained on)")
    parser.add_argument("--gif", action="store_true", help="write GIF files instead of mp4")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    if args.clips < 1 or args.seed < 0:
        raise InputError(f"--clips {args.clips} must be at least 1, and --seed {args.seed} at least 0.")
    with output_directory(args.output) as output, locked(output, inside=True):
        write_benchmark(output, args)
    print(f"{args.clips} clips, descriptions.jsonl and questions.jsonl are in {args.output}")
    return 0


def write_benchmark(output: Path, args: argparse.Namespace) -> None:
    descriptions, question_lines = [], []
    for i, clip in enumerate(draw_clips(args.seed, args.clips)):
        path = write_clip(output / f"{i}{'.gif' if args.gif else '.mp4'}", clip.video["frames"])
        video, rng = {"video_file": path.name}, np.random.default_rng(args.seed + i)
        descriptions.append(annotation(clip.scene, video, i))
        question_lines.append(question_annotation(sample_question(clip.scene, rng), video, i, i))
    for name, lines in (("descriptions", descriptions), ("questions", question_lines)):
        (output / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run(lambda: main(parse())))
