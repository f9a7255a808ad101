"""Scores of samples, tables of them, and the interface of a metric."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from prettytable import PrettyTable

from eval.judges.judge import Judge
from eval.predictions import Prediction, RowFormat

OVERALL = "OVERALL"
Status = Literal["scored", "unreadable", "judge failed", "missing"]
STATUSES: tuple[Status, ...] = ("scored", "unreadable", "judge failed", "missing")


@dataclasses.dataclass(frozen=True)
class SampleScore:
    """The score of one sample.

    Attributes:
        prediction: The sample with its answer.
        status: "scored"; "unreadable" for an answer that the metric cannot read; "judge failed" for an answer without a
            usable verdict; "missing" for a sample without an answer.
        values: The original's values by name, such as {"accuracy": 1.0}; empty if the original leaves the sample out.
        strict: The same values where an unreadable, failed or missing sample is wrong.
        details: Further entries of the sample's record, such as the events and their verdicts.
    """

    prediction: Prediction
    status: Status
    values: Mapping[str, float]
    strict: Mapping[str, float]
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of cells as they are printed.

    Attributes:
        title: Heading.
        columns: Names of the columns.
        rows: Cells by row.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        table = PrettyTable(list(self.columns))
        table.add_rows([list(row) for row in self.rows])
        return str(table)


@dataclasses.dataclass(frozen=True)
class ScoreArrays:
    """The values of the samples of a benchmark as arrays, N samples.

    Attributes:
        keys: "DATASET_IDX" per sample.
        subsets: `dataset` per sample.
        videos: The clip per sample.
        row_format: Format of the predictions.
        values: Arrays (N,) by name; nan for a sample that is left out.
    """

    keys: Sequence[str]
    subsets: Sequence[str]
    videos: Sequence[str]
    row_format: RowFormat
    values: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        value_names: Names of a sample's values.
        figures: Returns the figures by name, the headline first, in the units that the original prints. Its arguments
            are the samples and their weights (R, N); a figure has shape (R,). R > 1 serves the bootstrap.
        score: Returns the scores of predictions, in their order, and None or a judge.
        tables: Returns the original's tables of scored samples; its first argument is the dataset's name.
        records: Returns the content of the original's record files by name; arguments as for `tables`.
        constant_answers: Returns answers that a model without a video could always give, such as the letters of
            options. The best of them is a baseline.
        notes: Returns sentences about scores that the original computes in a special way, or not at all.
        needs_judge: Whether `score` needs a judge.
    """

    value_names: Sequence[str]
    figures: Callable[[ScoreArrays, np.ndarray], dict[str, np.ndarray]]
    score: Callable[[Sequence[Prediction], Judge | None], list[SampleScore]]
    tables: Callable[[str, Sequence[SampleScore]], list[Table]]
    records: Callable[[str, Sequence[SampleScore]], dict[str, str]]
    constant_answers: Callable[[Sequence[Prediction]], list[str]]
    notes: Callable[[Sequence[SampleScore]], list[str]] = lambda scores: []
    needs_judge: bool = False


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the means (R,) of values (N,) with weights (R, N). A nan is left out; nan without any value."""
    present = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights[:, present] @ values[present]) / weights[:, present].sum(axis=1)


def macro_mean(arrays: ScoreArrays, name: str, weights: np.ndarray) -> np.ndarray:
    """Returns the means (R,) of the weighted means of subsets. A subset without a value is left out."""
    means = []
    for subset in dict.fromkeys(arrays.subsets):
        members = np.array([other == subset for other in arrays.subsets])
        means.append(weighted_mean(arrays.values[name][members], weights[:, members]))
    with np.errstate(invalid="ignore"):
        table = np.array(means)  # (subsets, R)
        present = ~np.isnan(table)
        return np.where(present, table, 0).sum(axis=0) / present.sum(axis=0)


def status_of(prediction: Prediction, otherwise: Status = "scored") -> Status:
    """Returns "missing" for a sample without an answer, else `otherwise`."""
    return "missing" if prediction.is_missing else otherwise


def most_common(texts: Iterable[str]) -> list[str]:
    """Returns the distinct texts, the most frequent one first."""
    return [text for text, _ in collections.Counter(texts).most_common()]


def exact_mean(values: Sequence[float]) -> float:
    """Returns the mean of exact sums, which does not depend on the order; nan of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def rounded(value: float, digits: int) -> str:
    """Returns a number as the original prints it: rounded half to even after scaling, without trailing zeros."""
    return str(float(np.round(value, digits)))


def group_by_subset(scores: Sequence[SampleScore]) -> dict[str, list[SampleScore]]:
    """Groups scores by `dataset`, sorted by it."""
    groups: dict[str, list[SampleScore]] = {}
    for score in scores:
        groups.setdefault(score.prediction.dataset, []).append(score)
    return dict(sorted(groups.items()))


def arrays_of(scores: Sequence[SampleScore], strict: bool = False) -> ScoreArrays:
    """Returns the original's values of scores as arrays, or the strict ones."""
    rows = [score.strict if strict else score.values for score in scores]
    names = dict.fromkeys(name for score in scores for name in score.strict)  # which every sample has
    return ScoreArrays(
        keys=[score.prediction.key for score in scores],
        subsets=[score.prediction.dataset for score in scores],
        videos=[score.prediction.vid for score in scores],
        row_format=scores[0].prediction.row_format if scores else "messages",
        values={name: np.array([row.get(name, math.nan) for row in rows]) for name in names},
    )
