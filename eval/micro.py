"""Scores a model on moving shapes: `python -m eval.micro [--model CHECKPOINT] [--clips 500] [--seed N]`.

Clips are drawn from the seed, described, and judged by grammar (`eval.shapes.judge`): F1 of events, as AutoDQ defines
it. Beside the clips as they are: from mp4 files, at sizes and lengths that are not trained on,
played backwards (scored against the reversed events), with one frame only, and with frames in random order. Then
questions with four options. Seeds from 1,000,000,000 on are those that its training leaves out.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import tarsier_jax
from eval.shapes.annotations import question_annotation, user_turn
from eval.shapes.clips import HELD_OUT, ShapeClip, draw_clips
from eval.shapes.describe import event_sentences
from eval.shapes.judge import corpus_scores
from eval.shapes.questions import letter_in, sample_question
from eval.shapes.render import write_clip
from eval.shapes.world import reverse
from infer.engine import Engine, answer_samples, fit_config
from tarsier_jax.errors import InputError
from tarsier_jax.files import local_path
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.processor import Processor
from tarsier_jax.programs import add_model_flag, prepare_process, resolve_dtype, run

_SLOTS = 32
_MAX_NEW_TOKENS = 96


def backwards(clip: ShapeClip) -> ShapeClip:
    return ShapeClip(reverse(clip.scene), {"frames": clip.video["frames"][::-1]})


def one_frame(clip: ShapeClip) -> ShapeClip:
    """The frame in the middle."""
    frames = clip.video["frames"]
    return ShapeClip(clip.scene, {"frames": frames[len(frames) // 2][None]})


def shuffled(clip: ShapeClip) -> ShapeClip:
    frames = clip.video["frames"]
    return ShapeClip(clip.scene, {"frames": np.random.default_rng(len(frames)).permutation(frames)})


def as_file(clip: ShapeClip, path: Path) -> ShapeClip:
    return ShapeClip(clip.scene, {"video_file": str(write_clip(path, clip.video["frames"]))})


class Scorer:
    def __init__(self, engine: Engine):
        self._engine = engine

    def describe(self, name: str, clips: Iterable[ShapeClip]) -> dict[str, float]:
        """Recall, precision and F1 of the events in descriptions of the clips."""
        events = []

        def asked() -> Iterator[dict[str, Any]]:
            for clip in clips:
                events.append(event_sentences(clip.scene))
                yield {"messages": [user_turn(clip.video)]}

        return corpus_scores(answer_samples(self._engine, asked(), _MAX_NEW_TOKENS, name=name), events)

    def choose(self, clips: Iterable[ShapeClip], seed: int) -> dict[str, tuple[int, int]]:
        """One question a clip: for each kind, how many were asked and how many answered rightly."""
        asked, kinds, letters = [], [], []
        for i, clip in enumerate(clips):
            question = sample_question(clip.scene, np.random.default_rng(seed + i))
            asked.append(question_annotation(question, clip.video, i, i))
            kinds.append(question.kind)
            letters.append(question.answer)
        answers = answer_samples(self._engine, asked, _MAX_NEW_TOKENS, name="questions")
        right = [letter_in(answer) == letter for answer, letter in zip(answers, letters, strict=True)]
        return {
            k: (kinds.count(k), sum(r for r, kind in zip(right, kinds, strict=True) if kind == k)) for k in set(kinds)
        }


def score(model: Tarsier, processor: Processor, clips: int, seed: int) -> dict[str, float]:
    """All scores, 0 to 1, by name; prints each as it is known."""
    scorer = Scorer(Engine(model, processor, fit_config(processor, _SLOTS, _MAX_NEW_TOKENS)))
    scores = {}

    def note(name: str, value: float, detail: str = "") -> None:
        scores[name] = round(value, 4)
        print(f"{name:<28} {value:.3f}  {detail}", flush=True)

    def describe(name: str, shown: Iterable[ShapeClip]) -> None:
        found = scorer.describe(name, shown)
        note(f"F1, {name}", found["f1"], f"recall {found['recall']:.3f}  precision {found['precision']:.3f}")

    held_out = list(draw_clips(seed, clips))
    describe("held-out clips", held_out)
    with tempfile.TemporaryDirectory() as directory:
        files = (as_file(clip, Path(directory, f"{i}.mp4")) for i, clip in enumerate(held_out))
        describe("the same as mp4 files", files)
    describe("other sizes and lengths", draw_clips(seed, clips, other=True))
    describe("backwards", map(backwards, held_out))
    describe("one frame", map(one_frame, held_out))
    describe("frames in random order", map(shuffled, held_out))
    chosen = scorer.choose(held_out, seed)
    note("accuracy, questions", sum(right for _, right in chosen.values()) / len(held_out))
    for kind, (asked, right) in sorted(chosen.items()):
        note(f"accuracy, {kind}", right / asked, f"of {asked}")
    return scores


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.micro", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flag(parser)
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--seed", type=int, default=HELD_OUT)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--json", type=local_path, help="file to write the scores into")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    if args.clips < 1 or args.seed < 0:
        raise InputError(f"--clips {args.clips} has to be at least 1, and --seed {args.seed} at least 0.")
    prepare_process()
    model, processor = tarsier_jax.load(args.model, dtype=resolve_dtype(args.dtype))
    scores = score(model, processor, args.clips, args.seed)
    if args.json:
        args.json.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run(lambda: main(parse())))
