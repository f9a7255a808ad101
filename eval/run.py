"""Evaluates a model: `python -m eval.run --model MODEL --benchmarks NAME ... --output DIR`.

Benchmarks with files also need --annotations, the directory of the original's annotation files, and --data_root, the
directory of the videos (docs/evaluation.md lists the paths). Nothing is downloaded. DIR receives the predictions in
the original's format, the scores (see eval.score) and report.html, the score sheet. The same command resumes an
interrupted run and tries failed samples again. The exit status is 1 if a sample has no answer because it failed, or if
a benchmark cannot be scored.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import tarsier_jax
from eval.answers import SLOTS, Engines
from eval.benchmarks import Benchmark, add_benchmarks_flag, select
from eval.evaluation import BenchmarkInput, evaluate
from eval.judges.flags import add_judge_flags, judge_of
from eval.judges.judge import Judge
from eval.predictions import Prediction, read_rows
from eval.report import screen_text, write_report
from eval.settings import benchmark_settings, merge_settings, model_digest, settings_for
from infer.bulk.config import local_mesh
from tarsier_jax.errors import InputError
from tarsier_jax.families import family_of, load_config
from tarsier_jax.files import atomic_write, locked, source_text
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.mirror import destination, output_directory
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.processor import Processor, ProcessorOptions
from tarsier_jax.programs import add_model_flag, prepare_process, resolve_dtype, run
from tarsier_jax.weights import resolve

_MAX_LISTED = 10


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flag(parser)
    add_benchmarks_flag(parser)
    parser.add_argument("--annotations", type=source_text, help="directory of the annotation files")
    parser.add_argument("--data_root", type=source_text, help="directory of the videos")
    parser.add_argument("--output", required=True, type=source_text, help="directory for predictions and scores")
    parser.add_argument("--limit", type=int, help="samples of the first LIMIT videos per benchmark (default: all)")
    parser.add_argument("--allow_missing", action="store_true", help="answer only the samples whose videos exist")
    parser.add_argument(
        "--baselines", action="store_true", help="also answer with one frame, with shuffled frames, and without a video"
    )
    parser.add_argument("--n_frames", type=int, help="frames per video (default: the model's, 8 or 16)")
    parser.add_argument("--max_new_tokens", type=int, help="limit of an answer (default: that of the benchmark)")
    parser.add_argument(
        "--max_pixels", type=int, default=ProcessorOptions.max_pixels, help="limit of a frame (default %(default)s)"
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--slots", type=int, default=SLOTS, help="answers in progress at once (default %(default)s)")
    parser.add_argument("--mesh", default="", help="such as data=2,tensor=4 (default: all devices on the data axis)")
    add_judge_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    benchmarks = [_with_flags(benchmark, args) for benchmark in select(args.benchmarks)]
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit {args.limit} must be at least 1.")
    judge = find_judge(args, benchmarks)
    sources = [BenchmarkInput.load(each, args.annotations, args.data_root, args.limit) for each in benchmarks]
    check_videos(sources, args.allow_missing)
    prepare_process()
    with output_directory(args.output) as output, locked(output, inside=True):
        return evaluate_all(argparse.Namespace(**{**vars(args), "output": output}), sources, judge)


def evaluate_all(args: argparse.Namespace, sources: Sequence[BenchmarkInput], judge: Judge | None) -> int:
    """Evaluates benchmarks, prints their tables and writes the files of the run. Returns the exit status."""
    n_frames = args.n_frames or default_frames(args.model)
    sources = [source.with_frames(n_frames) for source in sources]
    path = args.output / "settings.json"
    settings = merge_settings(path, run_settings(args, sources))

    def load() -> tuple[Tarsier, Processor]:
        model, processor = tarsier_jax.load(args.model, settings["dtype"], local_mesh(args.mesh), adapter=args.adapter)
        with atomic_write(path) as partial:  # after the model is loaded: another run may name another model
            partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return model, processor.replace(max_pixels=args.max_pixels)

    # Batches and shards change rounding alone: an interrupted run may continue with others.
    run_only = {"slots": args.slots, "mesh": args.mesh or "default", "limit": args.limit or "none"}
    engines, results, num_failed = Engines(load, args.slots), [], 0
    for source in sources:
        own_settings = {**settings_for(settings, source.benchmark.name), **run_only}
        try:
            results.append(evaluate(engines, source, args.output, judge, own_settings, args.baselines))
        except InputError as error:  # the other benchmarks can be scored
            print(f"error: {source.benchmark.name}: {error}", file=sys.stderr)
            num_failed += 1
            continue
        print(screen_text(results[-1]), flush=True)
    num_failed += report_failures(args.output, sources)
    if results:
        write_report(args.output, results)
        print(f"The score sheet is {destination(args.output / 'report.html')}.")
    return 1 if num_failed else 0


def default_frames(model: str) -> int:
    """Returns the number of frames per video that a checkpoint's processor selects by default."""
    directory = resolve(model)
    config = load_config(directory)
    return family_of(config).load_processor(directory, config).options.n_frames


def find_judge(args: argparse.Namespace, benchmarks: Sequence[Benchmark]) -> Judge | None:
    """Returns the judge of the flags if a benchmark needs one.

    Raises:
        InputError: there is no --judge, or it cannot be reached.
    """
    names = [benchmark.name for benchmark in benchmarks if benchmark.needs_judge]
    judge = judge_of(args) if names else None
    if names and judge is None:
        raise InputError(f"The metric of {', '.join(names)} needs a judge. Pass --judge URL; see docs/evaluation.md.")
    return judge


def check_videos(sources: Sequence[BenchmarkInput], allow_missing: bool) -> None:
    """Prints missing videos to stderr.

    Raises:
        InputError: videos are missing, and `allow_missing` is false.
    """
    num_missing = sum(len(source.missing) for source in sources)
    for source in sources:
        if source.missing:
            num_samples = len(source.samples) - len(source.rows)
            text = f"{source.benchmark.name}: {len(source.missing)} videos of {num_samples} samples are missing:"
            print(text + _listed(source.missing), file=sys.stderr)
    if num_missing and not allow_missing:
        raise InputError(
            f"{num_missing} videos are missing. Copy them to --data_root, or pass --allow_missing: their samples then "
            "count as missing in the scores."
        )


def run_settings(args: argparse.Namespace, sources: Sequence[BenchmarkInput]) -> dict[str, Any]:
    """Returns the settings that the predictions of a run depend on."""
    return {
        "model": args.model,
        # One entry: predictions without the adapter are not continued with it.
        "weights": model_digest(resolve(args.model), args.adapter),
        "dtype": resolve_dtype(args.dtype),
        "max_pixels": args.max_pixels,
        "platform": jax.default_backend(),
        "package_version": tarsier_jax.__version__,
        "jax_version": jax.__version__,
        "benchmarks": {each.benchmark.name: benchmark_settings(each.benchmark, each.annotations) for each in sources},
    }


def report_failures(output: Path, sources: Sequence[BenchmarkInput]) -> int:
    """Prints the samples that could not be answered to stderr, and returns their number."""
    failures = []
    for source in sources:
        path = output / "predictions" / f"{source.benchmark.name}.jsonl"
        failures += [row for _, row in read_rows(path) if "error" in row] if path.exists() else []
    if failures:
        text = f"{len(failures)} samples have no answer and count as missing. The same command tries them again:"
        print(text + _listed([f"{Prediction.of(row).key}: {row['error']}" for row in failures]), file=sys.stderr)
    return len(failures)


def _listed(entries: Sequence[object]) -> str:
    """Returns the first entries, one per line."""
    more = ["..."] if len(entries) > _MAX_LISTED else []
    return "".join(f"\n  {entry}" for entry in [*entries[:_MAX_LISTED], *more])


def _with_flags(benchmark: Benchmark, args: argparse.Namespace) -> Benchmark:
    """Returns a benchmark with the frames and tokens of the flags. Raises InputError."""
    changes = {name: getattr(args, name) for name in ("n_frames", "max_new_tokens") if getattr(args, name) is not None}
    benchmark = dataclasses.replace(benchmark, **changes)
    ProcessorOptions(n_frames=benchmark.n_frames, max_pixels=args.max_pixels)  # checks their ranges
    SamplingOptions(benchmark.max_new_tokens)
    return benchmark


if __name__ == "__main__":
    sys.exit(run(lambda: main(parse())))
