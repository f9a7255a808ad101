"""The record of a benchmark."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
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
        video: Path of a video in --data_root, such as "TVBench/{vid}" (see `eval.benchmarks.videos`), or a function of
            a sample and a directory for media that returns the source of a video item.
        subsets: Number of samples per `dataset` of the complete benchmark; empty if it is not known.
        prompt: Prompt of a row without a text of the user.
        prefill: Beginning of the answer for a row without one.
        n_frames: Frames per video; `eval.run` sets the default of the model.
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

    @property
    def needs_judge(self) -> bool:
        """Whether the scores need the judge of --judge."""
        return self.metric.needs_judge and self.judge is None

    def expected_counts(self, datasets: Collection[str]) -> Mapping[str, int]:
        """Returns `subsets`, or nothing if `datasets` has others: the two row formats name some subsets differently."""
        return self.subsets if set(datasets) <= self.subsets.keys() else {}
