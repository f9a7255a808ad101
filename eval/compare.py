"""Compares runs: `python -m eval.compare RUN RUN ... [--reference] [--output DIR]`.

A RUN is a directory that eval.run or eval.score wrote as --output. For each benchmark of all runs, the figures are
printed side by side with 95% bootstrap intervals over videos. The difference of a run to the first one is computed over
the samples that both have scored, with a paired interval: it excludes 0 if the runs differ by more than chance.
DIR (default: comparison) gets compare.md, compare.json and a plot NAME.png per benchmark.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prettytable import PrettyTable, TableStyle

from eval import bootstrap
from eval.benchmarks import BENCHMARKS
from eval.bootstrap import Difference, Estimate
from eval.metrics.scores import OVERALL, Metric, ScoreArrays
from eval.plots import plot_runs
from eval.report import StoredScores, read_scores
from eval.texts import digits_of, figure_text, flatten_settings, with_interval
from tarsier_jax.errors import InputError
from tarsier_jax.files import atomic_write, is_remote, source_text
from tarsier_jax.mirror import output_directory
from tarsier_jax.processing.jsonl import to_json
from tarsier_jax.programs import run
from tarsier_jax.storage import local_source

STRICT = f"{OVERALL}, strict"
_REFERENCE_TABLES = Path(__file__).with_name("reference_tables.json")
_COUNTS = ("Task", "Success", "Failed")  # the other columns of a published table are figures
# Settings that change the meaning of a figure; the version of the judge's client does not.
_RULES = re.compile(r"^judge(?!\.openai)|prompt|row_format")
_NOT_STORED = "not stored"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs of one benchmark.

    Attributes:
        benchmark: Name of the benchmark.
        runs: Estimates by name of the run.
        references: Published figures by name of the model, without intervals.
        differences: Differences to the first run by name of the run, and by subset, OVERALL or STRICT.
        settings: Settings that differ, by name: one text per run.
        warnings: Sentences about differences that make the figures incomparable.
    """

    benchmark: str
    runs: Mapping[str, Sequence[Estimate]]
    references: Mapping[str, Sequence[Estimate]]
    differences: Mapping[str, Mapping[str, Difference]]
    settings: Mapping[str, Sequence[str]]
    warnings: Sequence[str]


def compare_runs(
    runs: Mapping[str, Mapping[str, StoredScores]], metrics: Mapping[str, Metric], reference: bool = False
) -> list[Comparison]:
    """Compares runs in each benchmark that all of them have.

    Args:
        runs: Scores by name of the run and by benchmark.
        metrics: Metrics by benchmark.
        reference: Add the published figures of Tarsier2-Recap-7b and Tarsier2-7B.

    Raises:
        InputError: there is nothing to compare.
    """
    first, *others = runs.values()
    names = [name for name in first if all(name in other for other in others)]
    if not names:
        contents = "; ".join(f"{run} has {', '.join(scores)}" for run, scores in runs.items())
        raise InputError(f"The runs have no benchmark in common: {contents}. Pass runs of the same benchmark.")
    if unknown := [name for name in names if name not in metrics]:
        raise InputError(f"There is no benchmark {', '.join(unknown)} in this version. Score the predictions again.")
    tables = read_published() if reference else {}
    if reference and not any(name in benchmarks for name in names for benchmarks in tables.values()):
        raise InputError(f"No figures of {', '.join(names)} are published. Omit --reference.")
    return [
        _compare({run: scores[name] for run, scores in runs.items()}, name, metrics[name], tables) for name in names
    ]


def _compare(runs: Mapping[str, StoredScores], name: str, metric: Metric, tables: Mapping[str, Any]) -> Comparison:
    arrays = {run: (scores.arrays(), scores.arrays(strict=True)) for run, scores in runs.items()}
    estimates = {run: bootstrap.estimate(metric, *pair) for run, pair in arrays.items()}
    first, *others = arrays
    subsets = [each.subset for each in estimates[first]]
    settings = _different_settings(list(runs.values()))
    return Comparison(
        benchmark=name,
        runs=estimates,
        references={
            model: reference_estimates(table[name], subsets) for model, table in tables.items() if name in table
        },
        differences={other: dict(_differences(metric, arrays[first], arrays[other], subsets)) for other in others},
        settings=settings,
        warnings=[*_setting_warnings(settings), *_sample_warnings(runs)],
    )


def _differences(
    metric: Metric, first: Sequence[ScoreArrays], second: Sequence[ScoreArrays], subsets: Sequence[str]
) -> Iterator[tuple[str, Difference]]:
    """Yields the difference in each subset, in all samples, and in all samples by strict values."""
    for subset in subsets:
        yield subset, bootstrap.compare(metric, _of_subset(first[0], subset), _of_subset(second[0], subset))
    yield STRICT, bootstrap.compare(metric, first[1], second[1])


def _of_subset(arrays: ScoreArrays, subset: str) -> ScoreArrays:
    return bootstrap.select_samples(arrays, np.flatnonzero([subset in (OVERALL, each) for each in arrays.subsets]))


def _different_settings(runs: Sequence[StoredScores]) -> dict[str, list[str]]:
    texts = [{"row_format": each.summary["row_format"], **flatten_settings(each.summary["settings"])} for each in runs]
    names = dict.fromkeys(name for each in texts for name in each)
    settings = {name: [each.get(name, _NOT_STORED) for each in texts] for name in names}
    return {name: values for name, values in settings.items() if len(set(values)) > 1}


def _setting_warnings(settings: Mapping[str, Sequence[str]]) -> list[str]:
    rules = [f"{name} ({', '.join(values)})" for name, values in settings.items() if _RULES.search(name)]
    return [f"The figures are not comparable, because these settings differ: {'; '.join(rules)}."] if rules else []


def _sample_warnings(runs: Mapping[str, StoredScores]) -> Iterator[str]:
    (first, scores), *others = runs.items()
    samples = {sample["idx"]: sample for sample in scores.samples}
    for other, scores in others:
        pairs = [(samples[each["idx"]], each) for each in scores.samples if each["idx"] in samples]
        if not len(pairs) == len(samples) == len(scores.samples):
            yield (
                f"The runs have different samples: {first} has {len(samples)}, {other} has {len(scores.samples)}, and "
                f"{len(pairs)} are in both. Only the differences are over the same samples."
            )
        for key in ("prompt", "references"):
            answers = [pair for pair in pairs if all(each["prediction"] is not None for each in pair)]
            if count := sum(one[key] != another[key] for one, another in answers):
                yield f"The figures are not comparable: {key} of {count} samples differ in {first} and {other}."


def read_published() -> dict[str, dict[str, list[dict[str, str]]]]:
    """Returns the published tables by model and benchmark."""
    return json.loads(_REFERENCE_TABLES.read_text(encoding="utf-8"))


def reference_estimates(rows: Sequence[Mapping[str, str]], subsets: Sequence[str]) -> list[Estimate]:
    """Returns the estimates of a published table, whose rows are subsets of a run, or their initials ("AA")."""
    names = {alias: subset for subset in subsets for alias in (_initials(subset), subset)}
    return [
        Estimate(
            subset=names[row["Task"]],
            num_samples=int(row["Success"]) + int(row["Failed"]),
            num_scored=int(row["Success"]),
            figures={name: float(value) for name, value in row.items() if name not in _COUNTS},
            intervals={},
            strict_figures={},
        )
        for row in rows
        if row["Task"] in names
    ]


def _initials(subset: str) -> str:
    return "".join(word[0] for word in re.split(r"[\W_]+", subset.split("/")[-1]) if word)


def markdown(comparison: Comparison) -> str:
    """Returns a section with the warnings, the table and the settings that differ."""
    first, *others = comparison.runs
    columns = [*comparison.runs, *(f"{other} - {first}" for other in others)]
    rows = [*_figure_rows(comparison), *_overall_rows(comparison)]
    table = _table(["Subset", "Figure", *columns, *(f"{model} (published)" for model in comparison.references)], rows)
    lines = [f"## {comparison.benchmark}", *(f"**Warning:** {text}" for text in comparison.warnings), table]
    if comparison.settings:
        settings = [[name, *values] for name, values in comparison.settings.items()]
        lines += ["Settings that differ:", _table(["Setting", *comparison.runs], settings)]
    return "\n\n".join(lines) + "\n"


def _figure_rows(comparison: Comparison) -> list[list[str]]:
    """Returns a row per subset with the headline figure."""
    estimates = next(iter(comparison.runs.values()))
    headline = next(iter(estimates[-1].figures))
    return [_row(comparison, each.subset, headline) for each in estimates[:-1]]


def _overall_rows(comparison: Comparison) -> list[list[str]]:
    """Returns a row per figure over all samples, and one of the strict headline figure."""
    overall = next(iter(comparison.runs.values()))[-1]
    rows = [_row(comparison, OVERALL, name) for name in overall.figures]
    name = next(iter(overall.figures))
    strict = [figure_text(run[-1].strict_figures[name], digits_of(name)) for run in comparison.runs.values()]
    differences = [_difference_text(each[STRICT], name) for each in comparison.differences.values()]
    return [*rows, [STRICT, name, *strict, *differences, *("" for _ in comparison.references)]]


def _row(comparison: Comparison, subset: str, name: str) -> list[str]:
    figures = [_estimate_text(each, subset, name) for each in comparison.runs.values()]
    differences = [_difference_text(each[subset], name) for each in comparison.differences.values()]
    return [
        subset,
        name,
        *figures,
        *differences,
        *(_estimate_text(e, subset, name) for e in comparison.references.values()),
    ]


def _estimate_text(estimates: Sequence[Estimate], subset: str, name: str) -> str:
    matches = [each for each in estimates if each.subset == subset and name in each.figures]
    if not matches:
        return ""
    return with_interval(matches[0].figures[name], matches[0].intervals.get(name, (np.nan, np.nan)), digits_of(name))


def _difference_text(difference: Difference, name: str) -> str:
    if not difference.num_shared:
        return "no shared sample"
    text = with_interval(difference.figures[name], difference.intervals[name], digits_of(name), sign=True)
    return f"{text} (n = {difference.num_shared:,})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = PrettyTable([column.replace("|", "\\|") for column in columns])
    table.set_style(TableStyle.MARKDOWN)
    table.align = "l"
    table.add_rows([[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows])
    return str(table)


def write_comparison(output: Path, comparisons: Sequence[Comparison]) -> None:
    """Writes compare.md, compare.json and the plots into the directory `output`."""
    output.mkdir(parents=True, exist_ok=True)
    for each in comparisons:
        runs = {**each.runs, **{f"{model} (published)": estimates for model, estimates in each.references.items()}}
        headline = next(iter(next(iter(each.runs.values()))[-1].figures))
        with atomic_write(output / f"{each.benchmark}.png") as partial:
            partial.write_bytes(plot_runs(each.benchmark, headline, runs))
    contents = {
        "compare.json": f"{to_json({each.benchmark: dataclasses.asdict(each) for each in comparisons})}\n",
        "compare.md": "\n".join(markdown(each) for each in comparisons),
    }
    for name, text in contents.items():
        with atomic_write(output / name) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def name_runs(paths: Sequence[str]) -> list[str]:
    """Returns the names of the directories, or their paths if two have the same name.

    Raises:
        InputError: a directory is named twice.
    """
    places = [path.rstrip("/") if is_remote(path) else os.path.realpath(path) for path in paths]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise InputError(f"{paths[i]} is named twice. Pass different runs.")
    names = [os.path.basename(place) for place in places]
    return names if len(set(names)) == len(names) else list(paths)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=source_text, metavar="RUN", help="output of eval.run or eval.score")
    parser.add_argument("--reference", action="store_true", help="add the published figures of the original's models")
    parser.add_argument("--output", type=source_text, default="comparison", help="default: %(default)s")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if len(args.runs) == 1 and not args.reference:
        raise InputError("There is one run. Pass a second one, or --reference.")
    names = name_runs(args.runs)
    runs = {name: read_scores(Path(local_source(path))) for name, path in zip(names, args.runs, strict=True)}
    metrics = {benchmark.name: benchmark.metric for benchmark in BENCHMARKS}
    comparisons = compare_runs(runs, metrics, args.reference)
    with output_directory(args.output) as output:
        write_comparison(output, comparisons)
    print("\n".join(markdown(each) for each in comparisons))
    print(f"{args.output} contains compare.md, compare.json and a plot per benchmark.")


if __name__ == "__main__":
    sys.exit(run(lambda: main(parse())))
