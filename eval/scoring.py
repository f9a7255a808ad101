"""Scores the predictions of a benchmark: figures as the original computes them, strict figures, and counts."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval.benchmarks.benchmark import Benchmark
from eval.bootstrap import point_figures
from eval.judges.judge import Judge
from eval.judges.usage import MeteredJudge, estimate_usage
from eval.metrics.scores import STATUSES, Metric, SampleScore, Status, Table, arrays_of
from eval.predictions import ERROR, PLACEHOLDER, Prediction, Predictions
from tarsier_jax import __version__
from tarsier_jax.errors import InputError

_MAX_ANSWER = 20  # characters of a constant answer in a table


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


def score(
    benchmark: Benchmark,
    predictions: Predictions,
    judge: Judge | None = None,
    settings: Mapping[str, Any] | None = None,
    expected: Sequence[Prediction] | None = None,
    constant_answers: bool = False,
) -> BenchmarkScores:
    """Scores the predictions of a benchmark.

    Args:
        benchmark: The benchmark.
        predictions: Its predictions.
        judge: The judge of a metric that needs one.
        settings: Settings of the model that the scores depend on.
        expected: All samples of the benchmark. By default, their number follows from `benchmark.subsets`.
        constant_answers: Compute the baseline of constant answers although a judge is paid for it.

    Raises:
        InputError: a row cannot be scored, no row has an answer, or the judge cannot be used.
    """
    metric, dataset = benchmark.metric, benchmark.dataset
    judge = judge if metric.needs_judge else None
    _check_answers(dataset, predictions)
    present = _score_answers(benchmark, [row for row in predictions.rows if row.text is not None], judge)
    scores = [*present, *_missing(benchmark, predictions.rows, present, expected)]
    counts = collections.Counter(each.status for each in scores)
    return BenchmarkScores(
        benchmark=benchmark,
        scores=scores,
        tables=metric.tables(dataset, present),
        records=metric.records(dataset, present) if present else {},
        counts={status: counts[status] for status in STATUSES},
        figures=figures_of(metric, scores),
        strict_figures=figures_of(metric, scores, strict=True),
        baselines=_baselines(benchmark, predictions.rows, judge, constant_answers),
        audit=_audit(scores),
        notes=[*_notes(benchmark, predictions, scores, expected), *_usage(judge)],
        settings={
            **(settings or {}),
            **({} if judge is None else {"judge": judge.settings}),
            "package_version": __version__,
        },
    )


def _check_answers(dataset: str, predictions: Predictions) -> None:
    if predictions.rows and predictions.num_unanswered == len(predictions.rows):
        raise InputError(
            f"No row of {dataset} has an answer, and the videos are {PLACEHOLDER!r}: these are annotations instead of "
            "predictions. Pass the predictions of a model."
        )


def _score_answers(benchmark: Benchmark, answers: Sequence[Prediction], judge: Judge | None) -> list[SampleScore]:
    """Scores answers, and prints an estimate of the judge's work first."""
    metric = benchmark.metric
    if isinstance(judge, MeteredJudge):
        usage = estimate_usage(lambda estimator: metric.score(answers, estimator), judge)
        print(f"{benchmark.name}: the judge needs about {usage.summary(judge.prices)}.", flush=True)
    return metric.score(answers, judge)


def _missing(
    benchmark: Benchmark,
    rows: Sequence[Prediction],
    present: Sequence[SampleScore],
    expected: Sequence[Prediction] | None,
) -> list[SampleScore]:
    """Returns the scores of the samples without an answer: rows without one, and samples without a row."""
    keys = {each.prediction.key for each in present}
    unanswered = [row for row in rows if row.key not in keys]
    zeros = dict.fromkeys(benchmark.metric.value_names, 0.0)
    return [SampleScore(each, "missing", {}, zeros) for each in (*unanswered, *_absent(benchmark, rows, expected))]


def figures_of(metric: Metric, scores: Sequence[SampleScore], strict: bool = False) -> dict[str, float]:
    """Returns the figures of scores; empty without a sample."""
    return point_figures(metric, arrays_of(scores, strict)) if scores else {}


def _usage(judge: Judge | None) -> list[str]:
    return [f"The judge: {judge.pop_usage().summary(judge.prices)}."] if isinstance(judge, MeteredJudge) else []


def _absent(
    benchmark: Benchmark, rows: Sequence[Prediction], expected: Sequence[Prediction] | None
) -> list[Prediction]:
    """Returns the samples of the benchmark that have no row; without `expected`, as numbers in place of samples."""
    if expected is not None:
        keys = {row.key for row in rows}
        return [dataclasses.replace(each, text=None) for each in expected if each.key not in keys]
    counts = collections.Counter(row.dataset for row in rows)
    row_format = rows[0].row_format if rows else "messages"
    return [
        Prediction(subset, f"absent {i}", "", None, None, (), {}, f"{subset} absent {i}", row_format)
        for subset, size in benchmark.expected_counts(counts.keys()).items()
        for i in range(size - counts[subset])
    ]


def _baselines(
    benchmark: Benchmark, rows: Sequence[Prediction], judge: Judge | None, always: bool
) -> dict[str, dict[str, float]]:
    """Returns the figures of the best constant answer."""
    metric = benchmark.metric
    if not rows or (metric.needs_judge and benchmark.judge is None and not always):
        return {}
    results = {}
    for answer in metric.constant_answers(rows):
        scores = metric.score([dataclasses.replace(row, text=answer) for row in rows], judge)
        name = answer if len(answer) <= _MAX_ANSWER else f"{answer[:_MAX_ANSWER]}..."
        results[f"constant answer {name!r}"] = figures_of(metric, scores)
    headline = {name: next(iter(figures.values()), math.nan) for name, figures in results.items()}
    best = [name for name in results if headline[name] == max(headline.values())][:1]
    return {name: results[name] for name in best}


def _audit(scores: Sequence[SampleScore]) -> dict[str, int]:
    """Returns how often the letter of the original's rule and that of a strict reader differ."""
    letters = [each.details for each in scores if "letter" in each.details]
    if not letters:
        return {}
    return {
        "answers": len(letters),
        "readers disagree": sum(each["letter"] != each["strict_letter"] for each in letters),
        "only the original's rule reads a letter": sum(
            each["strict_letter"] is None and each["letter"] is not None for each in letters
        ),
        "only the strict reader reads a letter": sum(
            each["letter"] is None and each["strict_letter"] is not None for each in letters
        ),
    }


def _notes(
    benchmark: Benchmark,
    predictions: Predictions,
    scores: Sequence[SampleScore],
    expected: Sequence[Prediction] | None,
) -> list[str]:
    """Returns sentences about rows that are left out, repeated, or scored in a special way."""
    rows = predictions.rows
    keys = {row.key for row in rows if expected is None} or {each.key for each in expected or ()}
    counts = {
        "Repeated rows with the same answer, ignored": predictions.num_repeated,
        "Repeated rows with another answer (the first row counts)": predictions.num_conflicting,
        f"Answers {ERROR} (missing; the comparable figure scores them as text, as the original does)": sum(
            row.text == ERROR for row in rows
        ),
        "Rows that are not in the annotation file, scored": sum(row.key not in keys for row in rows),
    }
    sentences = [f"{text}: {count}." for text, count in counts.items() if count]
    if rows and not any(row.text for row in rows):
        sentences.append("No row has an answer. Check that these are predictions.")
    subsets = {row.dataset for row in rows}
    sizes = benchmark.expected_counts(subsets)
    if expected is None and not sizes:
        sentences.append("The size of the benchmark is not known: missing samples are not counted without annotations.")
    if absent := sizes.keys() - subsets:
        sentences.append(f"No row is of {', '.join(sorted(absent))}: the figures are of {len(subsets)} subsets.")
    return sentences + benchmark.metric.notes(scores)
