"""Measures how far two judges agree: `python -m eval.judges A B --predictions DIR [--benchmarks NAME ...]`.

A and B are "rules" (of the moving shapes), or the URL of an endpoint, or URL#MODEL. Both judge the same predictions.
For each benchmark, the verdicts on the same events or answers are compared: the share of equal verdicts and Cohen's
kappa, with 95% bootstrap intervals over videos. The figures by each judge and their difference follow. Replies are
stored as in eval.score, so predictions that a judge has scored cost little. With --output, DIR/agreement.json contains
the same.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.agreement import PAIRS, Agreement, measure_agreement
from eval.benchmarks import BENCHMARKS, Benchmark, add_benchmarks_flag, select
from eval.bootstrap import Difference, Estimate
from eval.judges.flags import add_endpoint_flags, make_judge
from eval.judges.judge import Judge
from eval.judges.usage import MeteredJudge, estimate_usage
from eval.metrics.scores import Table
from eval.predictions import Prediction, PredictionFiles
from eval.texts import digits_of, flatten_settings, with_interval
from tarsier_jax.errors import InputError
from tarsier_jax.files import atomic_write, source_text
from tarsier_jax.mirror import output_directory
from tarsier_jax.processing.jsonl import to_json
from tarsier_jax.programs import run
from tarsier_jax.storage import local_source

_NAMES = ("A", "B")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.judges", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("judges", nargs=2, metavar="JUDGE", help='"rules", URL or URL#MODEL')
    parser.add_argument("--predictions", required=True, type=source_text, help="directory of .jsonl files, or one file")
    add_benchmarks_flag(parser, required=False)
    parser.add_argument("--output", type=source_text, metavar="DIR")
    add_endpoint_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    files = PredictionFiles(Path(local_source(args.predictions)))
    benchmarks = chosen_benchmarks(args.benchmarks, files)
    judges = [make_judge(name, args) for name in args.judges]
    if judges[0].settings == judges[1].settings:
        raise InputError(f"A and B are the same judge, {args.judges[0]}. Pass two judges, such as URL#MODEL.")
    for name, judge in zip(_NAMES, judges, strict=True):
        print(f"{name}: {', '.join(f'{key} {value}' for key, value in flatten_settings(judge.settings).items())}")
    results = []
    for benchmark in benchmarks:
        results.append(compare_judges(benchmark, files.of(benchmark.dataset).rows, judges))
        print(report(results[-1]), flush=True)
    if args.output:
        with output_directory(args.output) as output:
            write_agreement(output, judges, results)


def chosen_benchmarks(names: Sequence[str] | None, files: PredictionFiles) -> list[Benchmark]:
    """Returns the benchmarks with these names that have rows; without names, all that need a judge.

    Raises:
        InputError: there is none, or one is scored without a judge.
    """
    candidates = select(names) if names else [each for each in BENCHMARKS if each.metric.needs_judge]
    if others := [each.name for each in candidates if not each.metric.needs_judge]:
        raise InputError(f"--benchmarks: {', '.join(others)} is scored without a judge. Choose other benchmarks.")
    benchmarks = [each for each in candidates if each.dataset in files.num_rows]
    if not benchmarks:
        expected, present = ", ".join(each.dataset for each in candidates), ", ".join(files.num_rows) or "nothing"
        raise InputError(f"{files.path} lacks rows of {expected}. It contains rows of {present}.")
    return benchmarks


def compare_judges(benchmark: Benchmark, rows: Sequence[Prediction], judges: Sequence[Judge]) -> Agreement:
    """Measures the agreement in a benchmark; prints an estimate of the tokens before, and their number after."""
    answers = [row for row in rows if not row.is_missing]
    meters = [(name, judge) for name, judge in zip(_NAMES, judges, strict=True) if isinstance(judge, MeteredJudge)]
    for name, judge in meters:
        usage = estimate_usage(lambda estimator: benchmark.metric.score(answers, estimator), judge)
        print(f"{benchmark.name}: {name} needs about {usage.summary(judge.prices)} to score.", flush=True)
    agreement = measure_agreement(benchmark.name, benchmark.metric, answers, judges)
    for name, judge in meters:
        print(f"{benchmark.name}: {name} used {judge.pop_usage().summary(judge.prices)}.")
    return agreement


def report(agreement: Agreement) -> str:
    """Returns the tables of a benchmark."""
    first, second = agreement.scores
    verdicts = [
        [kind, *(f"{agreement.counts[kind][name]:,}" for name in PAIRS), *_figure_texts(each)]
        for kind, each in agreement.verdicts.items()
    ]
    figures = zip(first.figures, _figure_texts(first), _figure_texts(second), _difference_texts(agreement), strict=True)
    return "\n".join(
        (
            f"\n{agreement.benchmark}: {agreement.num_samples:,} samples, {agreement.num_failed:,} of them without "
            "verdicts of both judges",
            str(Table("", ["Verdicts on", *PAIRS, "Agreement", "Cohen's kappa"], verdicts)),
            str(Table("", ["Figure", *_NAMES, f"B - A, {agreement.difference.num_shared:,} samples"], list(figures))),
        )
    )


def _figure_texts(each: Estimate) -> list[str]:
    return [with_interval(value, each.intervals[name], digits_of(name)) for name, value in each.figures.items()]


def _difference_texts(agreement: Agreement) -> list[str]:
    each: Difference = agreement.difference
    return [
        with_interval(value, each.intervals[name], digits_of(name), sign=True) for name, value in each.figures.items()
    ]


def write_agreement(directory: Path, judges: Sequence[Judge], results: Sequence[Agreement]) -> None:
    """Writes agreement.json."""
    content = {
        "judges": {name: judge.settings for name, judge in zip(_NAMES, judges, strict=True)},
        "benchmarks": {each.benchmark: dataclasses.asdict(each) for each in results},
    }
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_write(directory / "agreement.json") as path:
        path.write_text(to_json(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run(lambda: main(parse())))
