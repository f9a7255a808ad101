"""Random samples, a processor without a tokenizer, and timers for the benchmarks."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tarsier_jax.config import ModelConfig
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.positions import mrope_positions

IMAGE, START, END = 151_655, 151_652, 151_653


class NoTexts:
    """The part of a processor that the engine needs, for random models. Answers end only at their limit."""

    eos_token_ids, pad_token_id = (), 0

    def __init__(self, config: ModelConfig):
        self.config = config

    def decode(self, tokens: list[int]) -> str:
        return ""


def make_example(config: ModelConfig, frames: int, height: int, width: int, answer: int, seed: int) -> Example:
    """Returns an example of a video, a question of 20 tokens and an answer.

    Args:
        config: Configuration of the model.
        frames: Frames of the video.
        height: Height of a frame in patches.
        width: Width of a frame in patches.
        answer: Tokens of the answer.
        seed: Random seed.
    """
    rng = np.random.default_rng(seed)
    grid = np.array([[frames, height, width]], np.int32)
    words = rng.integers(0, 150_000, 20 + answer).tolist()
    ids = np.array([START, *[IMAGE] * (frames * height * width // 4), END, *words], np.int32)
    labels = np.where(np.arange(len(ids)) >= len(ids) - answer, ids, -100).astype(np.int32)
    pixels = rng.standard_normal((frames * height * width, config.vision.patch_dim)).astype(np.float32)
    return Example(ids, labels, pixels, grid, mrope_positions(ids, grid, 2, (IMAGE,)))


def seconds(function: Callable[[], Any]) -> float:
    """Runs `function` and returns its seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def time_calls(call: Callable[[], Any], calls: int, rounds: int = 3) -> float:
    """Returns the median seconds of a call over rounds of `calls` calls each, after a first call that compiles."""
    jax.block_until_ready(call())
    times = [seconds(lambda: jax.block_until_ready([call() for _ in range(calls)][-1])) for _ in range(rounds)]
    return statistics.median(times) / calls
