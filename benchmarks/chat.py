"""The time to the first token of two turns about a video: the second turn continues the slot of the first on a CPU.

    python -m benchmarks.chat

The model is that of benchmarks.describe (random weights in float32), the video has 16 frames of 12 x 22 patches, and a
question has 20 tokens. Each round is a new conversation, and medians are printed. The last line is the second turn in
an engine without prefix reuse, which runs the whole conversation again. Frames are patchified before the measurement.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

THREADS = 2
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # before XLA counts its threads
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from benchmarks.describe import HEIGHT, WIDTH, make_reference
from benchmarks.samples import IMAGE, NoTexts, make_example
from infer.engine import Completion, Engine, EngineConfig, Request
from tarsier_jax.families import load_config
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.models.tarsier import Tarsier, unstack
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.packing import RowShape
from tarsier_jax.processing.positions import mrope_positions
from tarsier_jax.weights import load_weights

FRAMES, QUESTION, ANSWER = 16, 20, 64


def make_engine(model: Tarsier, reuse_prefixes: bool) -> Engine:
    """Returns an engine with two slots, whose rows fit the second turn."""
    tokens = FRAMES * HEIGHT * WIDTH // 4 + 2 + 2 * QUESTION + ANSWER
    row = RowShape(tokens=-(-tokens // 64) * 64, bins=FRAMES, patches=HEIGHT * WIDTH, frames=1, samples=1)
    processor: Any = NoTexts(model.config)
    return Engine(model, processor, EngineConfig(2, row.tokens, ANSWER, (row,), reuse_prefixes=reuse_prefixes))


def next_turn(example: Example, answer: list[int], seed: int) -> Example:
    """Returns a prompt with an answer and another question."""
    question = np.random.default_rng(seed).integers(0, 150_000, QUESTION)
    ids = np.concatenate([example.input_ids, answer, question]).astype(np.int32)
    positions = mrope_positions(ids, example.grid_thw, 2, (IMAGE,))
    return dataclasses.replace(example, input_ids=ids, labels=ids, position_ids=positions)


def ask(engine: Engine, example: Example) -> tuple[float, Completion]:
    """Returns the seconds to the first token, and the answer."""
    times: list[float] = []
    start = time.perf_counter()
    request = Request(0, example, SamplingOptions(ANSWER), on_tokens=lambda _: times.append(time.perf_counter()))
    (result,) = engine.run([request])
    assert isinstance(result, Completion), result
    return times[0] - start, result


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        make_reference(Path(directory))
        model = unstack(load_weights(Path(directory), load_config(directory)))
    engine, without_reuse = make_engine(model, True), make_engine(model, False)
    seconds: dict[str, list[float]] = {"first turn": [], "second turn": [], "second turn, without reuse": []}
    for seed in range(args.rounds):
        first = make_example(model.config, FRAMES, HEIGHT, WIDTH, 0, seed)
        first_seconds, answer = ask(engine, first)
        second = next_turn(first, answer.tokens, seed)
        second_seconds, continued = ask(engine, second)
        again_seconds, complete = ask(without_reuse, second)
        for name, value in zip(seconds, (first_seconds, second_seconds, again_seconds), strict=True):
            seconds[name].append(value)
        same = sum(a == b for a, b in zip(continued.tokens, complete.tokens, strict=True))
        reused = f"{continued.reused_tokens} of {len(second.input_ids)} tokens reused"
        print(f"round {seed}: {reused}, {same} of {ANSWER} tokens equal those without reuse", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:<28} {value * 1e3:8.1f} ms to the first token")
    print(f"the second turn starts {medians['first turn'] / medians['second turn']:.1f} times sooner than the first")
    return 0


if __name__ == "__main__":
    sys.exit(main())
