"""Scores the predictions of a benchmark: figures as the original computes them, strict figures, and counts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from eval.benchmarks.benchmark import Benchmark
from eval.metrics.scores import SampleScore, Status, Table


@dataclasses.dataclass(frozen=True)
class BenchmarkScores:
    """The scores of a benchmark, and everything that they depend on.

    Attributes:
        benchmark: The benchmark.
        scores: All samples, missing ones included, in a fixed order.
        tables: The original's tables.
        records: The content of the original's record files by name.
        counts: Number of samples by status; the counts add up to the number of samples.
        figures: The original's figures, the headline first.
        strict_figures: The same figures where unreadable, failed and missing samples are wrong.
        baselines: Figures of answers that need no model or no video, by name, such as "constant answer (C)".
        audit: Counts of the parser audit, such as {"readers disagree": 3}; empty if there is no parser.
        notes: Sentences about the input, such as the number of repeated rows.
        settings: Model, judge, prompts, frames and versions.
    """

    benchmark: Benchmark
    scores: Sequence[SampleScore]
    tables: Sequence[Table]
    records: Mapping[str, str]
    counts: Mapping[Status, int]
    figures: Mapping[str, float]
    strict_figures: Mapping[str, float]
    baselines: Mapping[str, Mapping[str, float]]
    audit: Mapping[str, int]
    notes: Sequence[str]
    settings: Mapping[str, Any]
