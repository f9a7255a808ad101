"""Moving shapes: descriptions and questions about clips that are generated from seeds, judged by rules.

Every clip is described in six ways: as it is, from an mp4 file, at sizes and lengths that are not trained on, played
backwards (judged against the reversed events), as one frame, and with its frames in random order.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks.benchmark import Benchmark
from eval.metrics import AUTODQ, subtask_accuracy
from eval.predictions import AnnotatedSample
from eval.shapes.annotations import annotation, question_annotation
from eval.shapes.clips import HELD_OUT, FrameSize, draw_clip_scene
from eval.shapes.judge import RulesJudge
from eval.shapes.questions import LETTERS, letter_in, sample_question
from eval.shapes.render import render_scene, write_clip
from eval.shapes.world import Scene, reverse

_CLIPS, _MAX_NEW_TOKENS = 300, 96
# The source follows from `vid`, which is the seed of a clip.
_PLACEHOLDER = {"video_file": "<placeholder>"}


@functools.lru_cache(maxsize=8)  # the variants of a clip share its scene
def _clip(seed: int) -> tuple[Scene, FrameSize]:
    return draw_clip_scene(np.random.default_rng(seed))


def _other_clip(seed: int) -> tuple[Scene, FrameSize]:
    return draw_clip_scene(np.random.default_rng(seed), other=True)


def _backward_clip(seed: int) -> tuple[Scene, FrameSize]:
    scene, size = _clip(seed)
    return reverse(scene), size


def _in_memory(frames: np.ndarray, path: Path) -> dict[str, Any]:
    return {"frames": frames}


def _mp4_file(frames: np.ndarray, path: Path) -> dict[str, Any]:
    return {"video_file": str(write_clip(path.with_suffix(".mp4"), frames))}


def _middle_frame(frames: np.ndarray, path: Path) -> dict[str, Any]:
    return {"frames": frames[len(frames) // 2][None]}


def _random_order(frames: np.ndarray, path: Path) -> dict[str, Any]:
    return {"frames": np.random.default_rng(len(frames)).permutation(frames)}


_Draw = Callable[[int], tuple[Scene, FrameSize]]
_Show = Callable[[np.ndarray, Path], dict[str, Any]]
# Per subset, the scene and the frame size of a seed, and the video source of its frames, uint8 (T, H, W, 3).
VARIANTS: dict[str, tuple[_Draw, _Show]] = {
    "Shapes/held_out": (_clip, _in_memory),
    "Shapes/mp4_files": (_clip, _mp4_file),
    "Shapes/other_sizes": (_other_clip, _in_memory),
    "Shapes/backwards": (_backward_clip, _in_memory),
    "Shapes/one_frame": (_clip, _middle_frame),
    "Shapes/random_order": (_clip, _random_order),
}


def description_samples(first_seed: int, clips: int) -> Iterator[AnnotatedSample]:
    """Yields a sample per clip and variant; the clips have the seeds `first_seed`, `first_seed` + 1 and so on."""
    for seed in range(first_seed, first_seed + clips):
        for subset, (draw, _) in VARIANTS.items():
            scene, _ = draw(seed)
            yield {**annotation(scene, _PLACEHOLDER, seed), "dataset": subset}


def question_samples(first_seed: int, clips: int) -> Iterator[AnnotatedSample]:
    """Yields one random question with four options per clip."""
    for seed in range(first_seed, first_seed + clips):
        question = sample_question(_clip(seed)[0], np.random.default_rng(seed))
        yield question_annotation(question, _PLACEHOLDER, seed, seed)


def video_source(sample: AnnotatedSample, media: Path) -> Mapping[str, Any]:
    """Renders the clip of a sample; `media` is the directory for mp4 files."""
    draw, show = VARIANTS.get(sample["dataset"], (_clip, _in_memory))
    scene, size = draw(sample["vid"])
    return show(render_scene(scene, *size), media / str(sample["vid"]))


# An answer is the text of an option and then its letter, so the original's rule would read another letter.
_LETTERS = dataclasses.replace(
    subtask_accuracy(lambda row: letter_in(row.text or "") or None, lambda row: letter_in(row.reference)),
    constant_answers=lambda rows: list(LETTERS),
)
SHAPES = Benchmark(
    name="shapes",
    dataset="Shapes",
    metric=AUTODQ,
    annotations=functools.partial(description_samples, HELD_OUT, _CLIPS),
    video=video_source,
    subsets=dict.fromkeys(VARIANTS, _CLIPS),
    max_new_tokens=_MAX_NEW_TOKENS,
    judge=RulesJudge(),
)
SHAPES_QA = Benchmark(
    name="shapes-qa",
    dataset="ShapesQA",
    metric=_LETTERS,
    annotations=functools.partial(question_samples, HELD_OUT, _CLIPS),
    video=video_source,
    max_new_tokens=_MAX_NEW_TOKENS,
)
