"""Preference pairs for `train.dpo`.

`python -m train.micro.preference_pairs --output DIR [--model CHECKPOINT] [--clips N] [--seed N]`.

Samples two descriptions of every clip of moving shapes: one of the clip, one of the clip with perturbed frames. The
judge of moving shapes scores both. A pair is stored if the first one is better by a margin in recall R and precision P:
dR >= 0, dP >= 0 and dR + dP >= 0.3. DIR contains the clips of these pairs, and pairs.jsonl.
Source: Tarsier2 (arXiv 2501.07888), section 3.3, with a rule-based judge in place of AutoDQ.
"""

import argparse
import collections
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import tarsier_jax
from eval.shapes.annotations import user_turn
from eval.shapes.clips import ShapeClip, draw_clips
from eval.shapes.describe import event_sentences
from eval.shapes.judge import score_description
from eval.shapes.render import write_clip
from infer.engine import Engine, Frontend, RequestError, fit_config
from tarsier_jax.errors import InputError
from tarsier_jax.files import atomic_write, local_path, locked
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.processing.perturb import PERTURBATIONS
from tarsier_jax.programs import add_model_flag, prepare_process, resolve_dtype, run

FIRST_SEED = 5 * 10**8  # between the training seeds of SFT and the held-out ones
_SLOTS, _MAX_NEW_TOKENS = 32, 96
_MARGIN = 0.3


def preferred(events: Sequence[str], clean: str, disturbed: str) -> bool:
    """Returns whether the first description is better by the margin, and not worse in recall or precision."""
    (recall, precision), (other_recall, other_precision) = (
        score_description(clean, events),
        score_description(disturbed, events),
    )
    more_recall, more_precision = recall - other_recall, precision - other_precision
    return min(more_recall, more_precision) >= 0 and more_recall + more_precision >= _MARGIN


def _request(clip: ShapeClip, disturb: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"messages": [user_turn(clip.video | ({"disturb": disturb} if disturb else {}))]}


def _pair(path: Path, better: str, worse: str) -> dict[str, Any]:
    answer = {"type": "text", "text": better, "chosen": better, "rejected": worse}
    messages = [user_turn({"video_file": path.name}), {"role": "assistant", "content": [answer]}]
    return {"messages": messages, "task": "video/caption", "idx": int(path.stem)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.micro.preference_pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_flag(parser)
    parser.add_argument("--output", required=True, type=local_path, help="directory for clips and pairs.jsonl")
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="seed of the first clip (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    if args.clips < 1 or args.seed < 0 or args.temperature <= 0:
        raise InputError("--clips must be at least 1, --seed at least 0, and --temperature above 0.")
    prepare_process()
    with locked(args.output, inside=True):
        num_pairs = write_pairs(args)
    print(f"{num_pairs} pairs of {args.clips} clips: {args.output / 'pairs.jsonl'}")
    return 0


def write_pairs(args: argparse.Namespace) -> int:
    """Writes the clips and pairs; returns the number of pairs."""
    model, processor = tarsier_jax.load(args.model, resolve_dtype(args.dtype), adapter=args.adapter)
    engine = Engine(model, processor, fit_config(processor, _SLOTS, _MAX_NEW_TOKENS))
    num_pairs = 0
    with (
        atomic_write(args.output / "pairs.jsonl") as partial,
        partial.open("w", encoding="utf-8") as file,
        tqdm(total=args.clips, unit="clip") as bar,
    ):
        for number, clip, clean, disturbed in described(engine, args.seed, args.clips, args.temperature):
            if preferred(event_sentences(clip.scene), clean, disturbed):
                path = write_clip(args.output / f"{number}.mp4", clip.video["frames"])
                file.write(json.dumps(_pair(path, clean, disturbed)) + "\n")
                num_pairs += 1
            bar.set_postfix_str(f"{num_pairs} pairs", refresh=False)
            bar.update()
    return num_pairs


def described(engine: Engine, first: int, count: int, temperature: float) -> Iterator[tuple[int, ShapeClip, str, str]]:
    """Yields (seed, clip, description, description of the perturbed clip) in the order of completion."""
    clips: dict[int, ShapeClip] = {}
    texts: dict[int, dict[bool, str]] = collections.defaultdict(dict)

    def samples() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, clip in enumerate(draw_clips(first, count), first):
            clips[number] = clip
            perturbation = {"kind": str(np.random.default_rng(number).choice(PERTURBATIONS)), "seed": number}
            yield 2 * number, _request(clip)
            yield 2 * number + 1, _request(clip, perturbation)

    with Frontend(engine) as frontend:
        for key, result in frontend.answer_all(samples(), SamplingOptions(_MAX_NEW_TOKENS, temperature)):
            if isinstance(result, RequestError):
                raise InputError(result.reason)
            number, is_perturbed = divmod(key, 2)
            texts[number][bool(is_perturbed)] = result.text
            if len(texts[number]) == 2:
                pair = texts.pop(number)
                yield number, clips.pop(number), pair[False], pair[True]


if __name__ == "__main__":
    sys.exit(run(lambda: main(parse())))
