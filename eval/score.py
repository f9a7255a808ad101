"""Scores predictions: `python -m eval.score --predictions DIR --benchmarks NAME ... [--output DIR] [--judge URL]`.

DIR is a directory of .jsonl files or one file, written by eval.run, infer.caption or either version of the original.
Tables are printed. OUTPUT/eval_records receives the original's record files, and NAME.json, NAME_samples.jsonl and
NAME.png per benchmark; OUTPUT/report.html is the score sheet.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.benchmarks import Benchmark, add_benchmarks_flag
from eval.benchmarks.annotations import read_annotations
from eval.judges import add_judge_flags, judge_of
from eval.judges.judge import Judge
from eval.predictions import Prediction, PredictionFiles
from eval.report import screen_text, write_report
from eval.scoring import BenchmarkScores, score
from tarsier_jax.errors import InputError
from tarsier_jax.files import local_path, locked
from tarsier_jax.programs import run


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--predictions", required=True, type=local_path, help="directory of .jsonl files, or one file")
    add_benchmarks_flag(parser)
    parser.add_argument(
        "--annotations", type=local_path, help="directory of annotation files, which show missing samples"
    )
    parser.add_argument("--output", type=local_path, help="directory (default: that of the predictions)")
    add_judge_flags(parser)
    return parser.parse_args(argv)
