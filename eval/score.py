"""Scores predictions: `python -m eval.score --predictions DIR --benchmarks NAME ... [--output DIR] [--judge URL]`.

DIR is a directory of .jsonl files, or one file, written by eval.run, infer.caption or either version of the original.
Tables are printed. OUTPUT/eval_records receives the original's record files, and NAME.json, NAME_samples.jsonl and
NAME.png per benchmark; OUTPUT/report.html is the score sheet. The exit status is 1 if a benchmark cannot be scored.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.benchmarks import Benchmark, add_benchmarks_flag, select
from eval.benchmarks.annotations import load_annotations
from eval.judges.flags import add_judge_flags, judge_of
from eval.judges.judge import Judge
from eval.predictions import Prediction, PredictionFiles
from eval.report import screen_text, write_report
from eval.scoring import BenchmarkScores, score
from eval.settings import settings_for
from tarsier_jax.errors import InputError
from tarsier_jax.files import is_remote, locked, source_text
from tarsier_jax.mirror import destination, output_directory
from tarsier_jax.processing.jsonl import parse_json
from tarsier_jax.programs import run
from tarsier_jax.storage import list_files, local_copy, local_source

_NO_SETTINGS = {"model": "unknown (no settings.json beside the predictions)"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--predictions", required=True, type=source_text, help="directory of .jsonl files, or one file")
    add_benchmarks_flag(parser)
    parser.add_argument(
        "--annotations", type=source_text, help="directory of annotation files, which show the missing samples"
    )
    parser.add_argument("--output", type=source_text, help="directory (default: that of the predictions)")
    add_judge_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    path = Path(local_source(args.predictions))
    files, directory = PredictionFiles(path), args.predictions if path.is_dir() else os.path.dirname(args.predictions)
    benchmarks = with_rows(select(args.benchmarks), files)
    judge = judge_of(args) if any(benchmark.needs_judge for benchmark in benchmarks) else None
    settings, results, num_failed = settings_of(directory), [], 0
    with output_directory(args.output or directory) as output, locked(output, inside=True):
        for benchmark in benchmarks:
            try:
                own_settings = settings_for(settings, benchmark.name)
                results.append(score_files(benchmark, files, judge, own_settings, args.annotations))
            except InputError as error:  # the other benchmarks can be scored
                print(f"error: {benchmark.name}: {error}", file=sys.stderr)
                num_failed += 1
                continue
            print(screen_text(results[-1]), flush=True)
        if results:
            write_report(output, results)
            print(f"The score sheet is {destination(output / 'report.html')}.")
    return 1 if num_failed else 0


def with_rows(benchmarks: list[Benchmark], files: PredictionFiles) -> list[Benchmark]:
    """Returns the benchmarks that have rows, and prints the names of the others and of other datasets.

    Raises:
        InputError: no benchmark has a row.
    """
    selection = [benchmark for benchmark in benchmarks if benchmark.dataset in files.num_rows]
    datasets = {benchmark.dataset for benchmark in selection}
    others = ", ".join(f"{name} ({count} rows)" for name, count in files.num_rows.items() if name not in datasets)
    if not selection:
        names = ", ".join(benchmark.dataset for benchmark in benchmarks)
        raise InputError(f"{files.path} contains no row of {names}. Its rows are of {others or 'no dataset'}.")
    for benchmark in benchmarks:
        if benchmark not in selection:
            print(f"{benchmark.name}: {files.path} contains no row of {benchmark.dataset}.")
    if files.num_failed:
        print(f"Lines of infer.caption without an answer: {files.num_failed}. Their samples count as missing.")
    if others:
        print(f"Rows of other datasets are ignored: {others}.")
    return selection


def score_files(
    benchmark: Benchmark,
    files: PredictionFiles,
    judge: Judge | None,
    settings: Mapping[str, Any],
    annotations: str | None,
) -> BenchmarkScores:
    """Scores the rows of a benchmark.

    Raises:
        InputError: a row cannot be scored, or the metric needs a judge and there is none.
    """
    if benchmark.needs_judge and judge is None:
        raise InputError("the metric needs a judge. Pass --judge URL, the base URL of an OpenAI-compatible server.")
    expected = None
    if annotations is not None or callable(benchmark.annotations):
        expected = [Prediction.of(row) for row in load_annotations(benchmark, annotations)]
    return score(benchmark, files.of(benchmark.dataset), benchmark.judge or judge, settings, expected)


def settings_of(predictions: str) -> dict[str, Any]:
    """Returns the settings that eval.run stored beside the directory of its predictions."""
    if is_remote(predictions):
        url = f"{predictions.rstrip('/').rpartition('/')[0]}/settings.json"
        path = local_copy(url) if list_files(url) else None
    else:
        path = Path(predictions).resolve().parent / "settings.json"
    if path is None or not path.exists():
        return _NO_SETTINGS
    return parse_json(path.read_text(encoding="utf-8"), str(path))


if __name__ == "__main__":
    sys.exit(run(lambda: main(parse())))
