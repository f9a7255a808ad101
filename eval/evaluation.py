"""Evaluates a model on a benchmark: answers its samples, scores the answers, and compares them with baselines."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from eval.answers import Engines, View, answer_rows
from eval.benchmarks import Benchmark
from eval.benchmarks.annotations import first_videos, load_annotations
from eval.benchmarks.videos import find_videos
from eval.judges.judge import Judge
from eval.predictions import AnnotatedSample, Prediction, Predictions
from eval.scoring import BenchmarkScores, score


@dataclasses.dataclass(frozen=True)
class BenchmarkInput:
    """The input of a run for one benchmark.

    Attributes:
        benchmark: The benchmark, with the run's frames and tokens.
        annotations: All samples of the benchmark.
        samples: The samples of the run.
        rows: The samples of the run whose videos exist, with their paths.
        missing: Paths of the other videos.
    """

    benchmark: Benchmark
    annotations: Sequence[AnnotatedSample]
    samples: Sequence[AnnotatedSample]
    rows: Sequence[AnnotatedSample]
    missing: Sequence[str]

    @classmethod
    def load(
        cls,
        benchmark: Benchmark,
        annotations: str | Path | None = None,
        data_root: str | Path | None = None,
        limit: int | None = None,
    ) -> Self:
        """Reads the annotations and finds the videos.

        Args:
            benchmark: The benchmark.
            annotations: Directory with the annotation file, or its URL in an object store.
            data_root: Directory with the videos, or its URL.
            limit: Only samples of the first `limit` videos.

        Raises:
            InputError: see `load_annotations` and `find_videos`.
        """
        rows = load_annotations(benchmark, annotations)
        samples = first_videos(rows, limit)
        return cls(benchmark, rows, samples, *find_videos(benchmark, samples, data_root))

    def with_frames(self, n_frames: int) -> Self:
        """Returns the input with another number of frames per video."""
        return dataclasses.replace(self, benchmark=dataclasses.replace(self.benchmark, n_frames=n_frames))


def evaluate(
    engines: Engines,
    source: BenchmarkInput,
    output: Path,
    judge: Judge | None = None,
    settings: Mapping[str, Any] | None = None,
    baselines: bool = False,
) -> BenchmarkScores:
    """Answers the samples of a benchmark that have no answer yet, and scores all of them.

    Args:
        engines: Engines of the model.
        source: The samples.
        output: Directory of the run. Predictions are in predictions/NAME.jsonl.
        judge: The judge of a metric that needs one; `benchmark.judge` takes precedence.
        settings: Settings of the run, for the report.
        baselines: Also answer the samples with one frame, with shuffled frames, and without a video; the predictions
            are in baselines/BASELINE/NAME.jsonl, and their figures are among the baselines of the scores.

    Raises:
        InputError: the predictions of an earlier run cannot be read, or the answers cannot be scored.
        EngineError: the engine failed.
    """
    benchmark, name = source.benchmark, f"{source.benchmark.name}.jsonl"
    expected = [Prediction.of(sample) for sample in source.samples]

    def score_rows(rows: Sequence[AnnotatedSample]) -> BenchmarkScores:
        predictions = Predictions([Prediction.of(row) for row in rows])
        return score(benchmark, predictions, benchmark.judge or judge, settings, expected)

    rows = answer_rows(engines, benchmark, source.rows, output / "predictions" / name)
    scores, figures = score_rows(rows), {}
    if baselines:
        answered = [row for row in rows if "visuals" in row]
        for baseline, view in BASELINES.items():
            path = output / "baselines" / baseline / name
            figures[baseline] = score_rows(answer_rows(engines, benchmark, answered, path, view)).figures
    return dataclasses.replace(scores, baselines={**scores.baselines, **figures})


def _one_frame(video: Mapping[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    return _with_frames(video, [indices[len(indices) // 2]])


def _shuffled_frames(video: Mapping[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    return _with_frames(video, np.random.default_rng(0).permutation(indices).tolist())


def _no_video(video: Mapping[str, Any], indices: Sequence[int]) -> None:
    return None


def _with_frames(video: Mapping[str, Any], indices: list[int]) -> dict[str, Any]:
    """Returns a video with these frames, without other keys that select frames."""
    return {**{key: video[key] for key in ("video_file", "frames") if key in video}, "frame_indices": indices}


BASELINES: Mapping[str, View] = {
    "one_frame": _one_frame,
    "shuffled_frames": _shuffled_frames,
    "no_video": _no_video,
}
