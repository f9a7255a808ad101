"""Scores of invented samples, and a metric of right and wrong answers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.benchmarks.benchmark import Benchmark
from eval.bootstrap import point_figures
from eval.metrics.scores import STATUSES, Metric, SampleScore, ScoreArrays, Status, Table, arrays_of, weighted_mean
from eval.predictions import Prediction
from eval.scoring import BenchmarkScores


def accuracy(arrays: ScoreArrays, weights: np.ndarray) -> dict[str, np.ndarray]:
    return {"Accuracy": 100 * weighted_mean(arrays.values["accuracy"], weights)}


def _not_called(*args: Any) -> Any:
    raise AssertionError


METRIC = Metric(
    value_names=("accuracy",),
    figures=accuracy,
    score=_not_called,
    tables=_not_called,
    records=_not_called,
    constant_answers=_not_called,
)


def sample_score(
    idx: int, value: float, subset: str = "Quiz/Plays", vid: str = "", status: Status = "scored", **fields: Any
) -> SampleScore:
    """Returns the score of a sample; `fields` are those of its Prediction, or `details`."""
    details = fields.pop("details", {})
    prediction = {"prompt": "Which one?", "question": None, "text": "A", "references": ("A",), "extra_info": {}}
    return SampleScore(
        prediction=Prediction(dataset=subset, idx=idx, vid=vid or f"{idx}.mp4", **{**prediction, **fields}),
        status=status,
        values={"accuracy": value} if status == "scored" else {},
        strict={"accuracy": value if status == "scored" else 0.0},
        details=details,
    )


def random_scores(num_samples: int, subsets: Sequence[str], seed: int = 0) -> list[SampleScore]:
    """Returns right and wrong answers, two per video, one in ten without a score."""
    rng = np.random.default_rng(seed)
    return [
        sample_score(
            i,
            float(rng.random() < 0.6),
            subsets[i % len(subsets)],
            f"{i // 2}.mp4",
            STATUSES[rng.integers(1, 4)] if rng.random() < 0.1 else "scored",
        )
        for i in range(num_samples)
    ]


def benchmark_scores(scores: Sequence[SampleScore], **fields: Any) -> BenchmarkScores:
    """Returns scores of a benchmark `quiz`; `fields` replace those of BenchmarkScores."""
    figures, strict = (point_figures(METRIC, arrays_of(scores, strict)) for strict in (False, True))
    return dataclasses.replace(
        BenchmarkScores(
            benchmark=Benchmark("quiz", "Quiz", METRIC, "Quiz.jsonl", "Quiz/{vid}"),
            scores=scores,
            tables=[Table("Evaluation Summary", ("Task", "Accuracy"), [("OVERALL", f"{figures['Accuracy']:.1f}")])],
            records={"Quiz_eval_result.txt": "=====Evaluation Summary=====\n"},
            counts={status: [score.status for score in scores].count(status) for status in STATUSES},
            figures=figures,
            strict_figures=strict,
            baselines={"constant answer (C)": {"Accuracy": 27.5}},
            audit={"readers disagree": 3},
            notes=["Two rows are repeated."],
            settings={"model": "org/describer", "dtype": "bfloat16", "judge": {"model": "rules", "temperature": None}},
        ),
        **fields,
    )
