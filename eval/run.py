"""Evaluates a model: `python -m eval.run --benchmarks shapes shapes-qa --output DIR [--model CHECKPOINT] [--limit N]`.

DIR gets the predictions, one JSON line per sample in NAME.jsonl, and scores.json. A run that is started again with the
same --output continues with the samples that have no prediction. Tables of the scores are printed.
"""

import argparse
import json
import sys
from pathlib import Path

import tarsier_jax
from eval.benchmarks import BENCHMARKS
from eval.evaluation import evaluate
from tarsier_jax.errors import InputError
from tarsier_jax.files import atomic_write, local_path, locked
from tarsier_jax.processing.jsonl import parse_json
from tarsier_jax.programs import add_model_flag, prepare_process, resolve_dtype, run


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flag(parser)
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("--benchmarks", nargs="+", required=True, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--output", required=True, type=local_path, help="directory for predictions and scores.json")
    parser.add_argument("--limit", type=int, help="samples of the first LIMIT videos per benchmark (default: all)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit {args.limit} must be at least 1.")
    prepare_process()
    with locked(args.output, inside=True):
        write_scores(args)
    return 0


def write_scores(args: argparse.Namespace) -> None:
    """Evaluates, prints one table per benchmark and writes scores.json."""
    settings = {"model": args.model, "dtype": resolve_dtype(args.dtype)}
    check_settings(args.output / "settings.json", settings)
    model, processor = tarsier_jax.load(settings["model"], dtype=settings["dtype"])
    _write_json(args.output / "settings.json", settings)
    benchmarks = [benchmark for benchmark in BENCHMARKS if benchmark.name in args.benchmarks]
    report = {**settings, "limit": args.limit, "scores": {}}
    for benchmark, scores in evaluate(model, processor, benchmarks, args.output, args.limit):
        print(scores.table(benchmark.name), end="\n\n", flush=True)
        report["scores"][benchmark.name] = scores.rows
    _write_json(args.output / "scores.json", report)


def check_settings(path: Path, settings: dict[str, str]) -> None:
    """Checks that the predictions of an earlier run, if `path` exists, have these settings.

    Raises:
        InputError: `path` contains other settings.
    """
    if path.exists() and (earlier := parse_json(path.read_text(encoding="utf-8"), str(path))) != settings:
        raise InputError(
            f"{path.parent} contains predictions with {earlier}, not {settings}. Choose another --output, or remove it."
        )


def _write_json(path: Path, content: object) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run(lambda: main(parse())))
