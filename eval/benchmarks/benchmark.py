"""The record of a benchmark."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.metrics import Scores
from eval.predictions import AnnotatedSample, Prediction


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: On the command line.
        annotations: Returns the samples, in the format of docs/design.md: a user turn with a video item and the prompt,
            then an assistant turn whose `reference` is the expected answer; its other texts are the prefill. `dataset`
            is the subset, `idx` is the index in it, and `vid` is the video.
        video_source: Returns the source of a sample's video item, such as {"video_file": PATH}. Its arguments are the
            sample and the directory of the benchmark's media.
        metric: Returns the scores of predictions; its second argument is the judge.
        judge: Returns the verdict on one prediction.
        max_new_tokens: Of an answer.
    """

    name: str
    annotations: Callable[[], Iterable[AnnotatedSample]]
    video_source: Callable[[AnnotatedSample, Path], Mapping[str, Any]]
    metric: Callable[[Sequence[Prediction], Any], Scores]
    judge: Callable[[Prediction], Any]
    max_new_tokens: int
