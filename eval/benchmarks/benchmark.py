"""The record of a benchmark."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from eval.judges.judge import Judge
from eval.metrics.scores import Metric
from eval.predictions import AnnotatedSample

VideoSource = Callable[[AnnotatedSample, Path], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: On the command line.
        dataset: Part of a row's `dataset` before the first slash.
        metric: The metric.
        annotations: Name of the annotation file in --annotations, or a function that generates the samples.
        video: Path of a video in --data_root with the fields of a row, such as "TVBench/{vid}", or a function of a
            sample and a directory for media that returns the source of a video item.
        subsets: Number of samples per `dataset` of the complete benchmark; empty if it is not known.
        prompt: Prompt of a row without one.
        prefill: Beginning of the answer, for a row without one.
        n_frames: Frames per video.
        max_new_tokens: Limit of an answer.
        judge: The benchmark's own judge, which needs no --judge.
    """

    name: str
    dataset: str
    metric: Metric
    annotations: str | Callable[[], Iterable[AnnotatedSample]]
    video: str | VideoSource
    subsets: Mapping[str, int] = dataclasses.field(default_factory=dict)
    prompt: str = ""
    prefill: str = ""
    n_frames: int = 16
    max_new_tokens: int = 512
    judge: Judge | None = None
