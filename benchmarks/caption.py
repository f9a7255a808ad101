"""Bulk captioning against Hugging Face's `generate`, side by side in one run on a CPU, two threads each.

    python -m benchmarks.caption                 # a random model at the sizes of benchmarks.describe
    python -m benchmarks.caption --embedded      # the small trained model in the package

All run the same clips with the same weights in float32, greedy: the engine; `generate` on one clip at a time, as in the
original's programs; `generate` on batches, padded on the left. With the random model the lengths of captions differ by
a factor of four (4 to 16 tokens times --tokens). With the embedded model captions end with the end-of-turn token. For
all three, clips are patchified before the measurement.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_THREADS = 2
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_THREADS])  # before XLA counts its threads
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import torch

import tarsier_jax
from benchmarks.describe import make_prompt, make_reference
from benchmarks.samples import NoTexts
from convert.references import Qwen2VlReference
from eval.shapes.annotations import user_turn
from eval.shapes.clips import draw_clips
from infer.engine import Completion, Engine, EngineConfig, Request, fit_config
from tarsier_jax.families import load_config
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.models.tarsier import unstack
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.packing import RowShape
from tarsier_jax.weights import EMBEDDED, load_weights, resolve


class Reference:
    """Hugging Face's model, which answers examples of equal or different shapes, padded on the left."""

    def __init__(self, model: Any, eos_ids: Sequence[int]):
        self.model, self.eos_ids = model, list(eos_ids) or None

    def answer(self, examples: Sequence[Example], limits: Sequence[int]) -> list[list[int]]:
        longest = max(len(e.input_ids) for e in examples)
        inputs = {
            "input_ids": np.zeros((len(examples), longest), np.int64),
            "attention_mask": np.zeros((len(examples), longest), np.int64),
            "position_ids": np.zeros((3, len(examples), longest), np.int64),
        }
        for row, example in enumerate(examples):
            at = slice(longest - len(example.input_ids), None)
            inputs["input_ids"][row, at], inputs["attention_mask"][row, at] = example.input_ids, 1
            inputs["position_ids"][:, row, at] = example.position_ids
        video = self.model.config.video_token_id in examples[0].input_ids
        pixels, grids = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
        inputs[pixels] = np.concatenate([e.pixel_values for e in examples])
        inputs[grids] = np.concatenate([e.grid_thw for e in examples]).astype(np.int64)
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        ends = {"eos_token_id": self.eos_ids, "pad_token_id": 0, "do_sample": False}
        out = self.model.generate(**tensors, max_new_tokens=max(limits), **ends)[:, longest:].tolist()
        return [_until_end(row[:limit], self.eos_ids or []) for row, limit in zip(out, limits, strict=True)]


def _until_end(tokens: list[int], eos_ids: Sequence[int]) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in eos_ids]
    return tokens[: ends[0]] if ends else tokens


def random_case(clips: int, tokens: int, slots: int, directory: Path) -> tuple[Engine, Reference, list, list[int]]:
    theirs = make_reference(directory)
    model = unstack(load_weights(directory, load_config(directory)))
    examples = [make_prompt(model.config, seed) for seed in range(clips)]
    limits = [tokens * (4 + 12 * (7 * i % clips) // max(clips - 1, 1)) for i in range(clips)]  # mixed, 4 to 16 times
    rows = RowShape(tokens=len(examples[0].input_ids) * 2, bins=10, patches=264, frames=1, samples=2)
    config = EngineConfig(slots, len(examples[0].input_ids), max(limits), (rows,))
    processor: Any = NoTexts(model.config)
    return Engine(model, processor, config), Reference(theirs, []), examples, limits


def embedded_case(clips: int, slots: int) -> tuple[Engine, Reference, list, list[int]]:
    model, processor = tarsier_jax.load(EMBEDDED)
    examples = [processor({"messages": [user_turn(clip.video)]}) for clip in draw_clips(2 * 10**9, clips)]
    theirs = Qwen2VlReference(resolve(EMBEDDED), model.config, processor.eos_token_ids)
    engine = Engine(model, processor, fit_config(processor, slots, 96))
    return engine, Reference(theirs.model, processor.eos_token_ids), examples, [96] * clips


def time_answers(name: str, function: Any, clips: int) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    answers = function()
    seconds = time.perf_counter() - start
    print(f"{name:<32} {seconds:8.1f} s  {clips / seconds:7.2f} clips/s", flush=True)
    return seconds, answers


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.caption", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8, help="size of Hugging Face's batches")
    parser.add_argument("--tokens", type=int, default=4, help="a sixteenth of the longest answer of the random model")
    args = parser.parse_args()
    torch.set_num_threads(_THREADS)
    with tempfile.TemporaryDirectory() as directory:
        if args.embedded:
            case = embedded_case(args.clips, args.slots)
        else:
            case = random_case(args.clips, args.tokens, args.slots, Path(directory))
    engine, theirs, examples, limits = case
    n, batch = len(examples), args.batch
    print(f"{n} clips of {min(len(e.input_ids) for e in examples)} to {max(len(e.input_ids) for e in examples)} tokens")

    def ours() -> list[list[int]]:
        tokens: dict[int, list[int]] = {}
        for answer in engine.run(
            Request(i, e, SamplingOptions(limit)) for i, (e, limit) in enumerate(zip(examples, limits, strict=True))
        ):
            assert isinstance(answer, Completion), answer
            tokens[answer.key] = answer.tokens
        return [tokens[i] for i in range(n)]

    theirs.answer(examples[:1], [2])  # PyTorch's work at the first call
    engine_seconds, our_answers = time_answers("the engine", ours, n)
    one, their_answers = time_answers(
        "Hugging Face, one by one",
        lambda: [theirs.answer([e], [limit])[0] for e, limit in zip(examples, limits, strict=True)],
        n,
    )
    several, _ = time_answers(
        f"Hugging Face, batches of {batch}",
        lambda: [a for i in range(0, n, batch) for a in theirs.answer(examples[i : i + batch], limits[i : i + batch])],
        n,
    )
    report = engine.stats
    lengths = sorted(map(len, our_answers))
    same = sum(a == b for a, b in zip(our_answers, their_answers, strict=True))
    print(f"answers of {lengths[0]} to {lengths[-1]} tokens; {same} of {n} equal Hugging Face's one by one")
    print(f"padding: {report.token_padding:.1%} of prompt tokens, {report.patch_padding:.1%} of patches")
    print(f"the engine is {one / engine_seconds:.2f} times one by one, {several / engine_seconds:.2f} times batches")
    return 0


if __name__ == "__main__":
    sys.exit(main())
