"""Engines that answer in place of a model, and small benchmarks of moving shapes."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from eval.answers import Engines
from eval.benchmarks import Benchmark
from eval.benchmarks.annotations import videos_of
from eval.benchmarks.shapes import SHAPES, SHAPES_QA, description_samples, question_samples
from eval.predictions import AnnotatedSample, Prediction
from infer.engine import Completion, Engine, Request, RequestError
from tarsier_jax.processing.frame_sampling import FrameSelection

FIRST_SEED = 5
INDICES = (0, 3, 6, 9)  # of the frames of every video


class SampleProcessor:
    """Returns examples with four frames of 42 x 28 pixels per video.

    Attributes:
        samples: The samples that it received.
    """

    config = SimpleNamespace(vision=SimpleNamespace(patch_size=14))
    keeps_complete_prompts = False

    def __init__(self) -> None:
        self.samples: list[Mapping[str, Any]] = []

    def __call__(self, sample: Mapping[str, Any]) -> Any:
        self.samples.append(sample)
        num_videos = len(videos_of(sample["messages"]))
        selections = (FrameSelection(INDICES, tuple(i / 2 for i in INDICES), (28, 28)),) * num_videos
        return SimpleNamespace(selections=selections, grid_thw=np.array([[len(INDICES), 2, 3]] * num_videos))

    def decode(self, tokens: list[int]) -> str:
        return ""


class _Oracle(Engine):
    def __init__(self, rows: Sequence[AnnotatedSample], answer: Callable[[Any], str], processor: Any):
        self._rows, self._answer, self.processor = rows, answer, processor
        self.config: Any = SimpleNamespace(slots=4)

    def run(self, requests: Iterable[Request | RequestError]) -> Iterator[Completion | RequestError]:
        for request in requests:
            if isinstance(request, RequestError):
                yield request
            else:
                yield Completion(request, self._answer(self._rows[request.key]), [], "eos", 0.0)


class OracleEngines(Engines):
    """Engines that answer a row with `answer(row)`.

    Attributes:
        processor: The processor of the samples.
        rows: The rows that an engine was built for.
    """

    def __init__(self, answer: Callable[[Any], str], processor: Any = None):
        self._answer = answer
        self.processor: Any = processor or SampleProcessor()
        self.rows: list[AnnotatedSample] = []

    def fit(self, benchmark: Benchmark, rows: Sequence[AnnotatedSample]) -> Engine:
        self.rows += rows
        return _Oracle(rows, self._answer, self.processor)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file of predictions."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def reference_of(row: AnnotatedSample) -> str:
    return Prediction.of(row).reference


def shapes(clips: int) -> Benchmark:
    return dataclasses.replace(SHAPES, annotations=functools.partial(description_samples, FIRST_SEED, clips))


def shapes_qa(clips: int) -> Benchmark:
    return dataclasses.replace(SHAPES_QA, annotations=functools.partial(question_samples, FIRST_SEED, clips))
