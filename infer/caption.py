"""Captions many clips: `python -m infer.caption --model CHECKPOINT --input DIR|GLOB|LIST --output OUT.jsonl`.

LIST is a .jsonl or .parquet file of paths or annotations. Tar files (WebDataset), Parquet files and saved datasets that
contain the media are read in place. OUT receives one line per clip, in the order in which captions end: the caption, or
the error. The line of an annotation is the annotation with the caption in the assistant's turn, ready for evaluation.
The same command resumes an interrupted run; OUT.manifest.json contains the options, which must stay the same. The exit
status is 1 if a clip has no caption. OUT.parquet is converted from OUT.parquet.jsonl at the end.

Several machines: start each with --num_shards N --shard_index I, or with --distributed. Each writes its own file,
OUT.00000-of-00004.jsonl and so on. Or start one program with --ray ADDRESS. See docs/captioning.md.
"""

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from infer.bulk.config import CaptionConfig, add_config_flags
from infer.bulk.inputs import Items, find_items, is_list
from infer.bulk.journal import Journal
from infer.bulk.loading import ItemLoader
from infer.bulk.manifest import Manifest, identify_model, identify_remote_model, local_devices
from infer.bulk.outputs import Tally, finished_lines, lines_of, remove_errors, write_lines, write_parquet
from infer.bulk.ray_cluster import lines_from_ray
from infer.bulk.resume import missing_items
from infer.bulk.windows import windows_of
from infer.engine import EngineStats, Frontend
from tarsier_jax.errors import InputError
from tarsier_jax.files import locked, source_text
from tarsier_jax.mirror import destination, output_file
from tarsier_jax.processing.media_types import MEDIA_SUFFIXES
from tarsier_jax.programs import Compilations, prepare_process, run
from tarsier_jax.weights.digest import digest_adapter


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infer.caption", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        type=source_text,
        required=True,
        help="directory, glob, media file, archive, or list (.jsonl, .parquet)",
    )
    parser.add_argument("--output", required=True, type=source_text, help="file to write (.jsonl, .parquet)")
    add_config_flags(parser, seed_help="clip i is sampled with seed + i")
    parser.add_argument("--num_shards", type=int, default=1, help="number of shards to split the input into")
    parser.add_argument("--shard_index", type=int, default=0, help="shard to caption, from 0")
    parser.add_argument("--distributed", action="store_true", help="find the other processes (TPU pod, Slurm, MPI)")
    parser.add_argument("--ray", metavar="ADDRESS", help='caption on a Ray cluster: HOST:PORT, "auto" or "local"')
    parser.add_argument(
        "--ray_actors", type=int, help="number of engines on it (default: one per accelerator, or one per node)"
    )
    parser.add_argument("--limit", type=int, help="maximum number of clips")
    parser.add_argument(
        "--every", metavar="SECONDS", type=float, help="caption long videos in windows that start so often"
    )
    parser.add_argument("--window", metavar="SECONDS", type=float, help="length of each window (default: --every)")
    parser.add_argument("--retry_errors", action="store_true", help="caption the clips with an error line again")
    parser.add_argument("--overwrite", action="store_true", help="discard the output of an earlier run")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    config = CaptionConfig.of(args)
    prepare_process()
    if args.ray:
        _check_ray_flags(args)
    path, items = share_of(args, *(_find_processes() if args.distributed else (1, 0)))
    with output_file(path) as output, locked(lines_of(output)):
        failed = caption_missing(items, config, output, args)
        if output != lines_of(output):
            write_parquet(lines_of(output), output)
    return 1 if failed else 0


def caption_missing(items: Items, config: CaptionConfig, output: Path, args: argparse.Namespace) -> int:
    """Captions the items without a line; returns the number of items without a caption."""
    lines = lines_of(output)
    model = identify_remote_model(config.model) if args.ray else identify_model(config.model)
    windows = windows_of(args.every, args.window)
    options = {
        **config.caption_options,
        "adapter": None if config.adapter is None else digest_adapter(config.adapter).hex(),
        "windows": windows and dataclasses.asdict(windows),
    }
    manifest = Manifest(output, model, options, args.overwrite)
    if args.retry_errors and not args.overwrite:
        _log(f"{remove_errors(lines)} clips with an error are tried again")
    # The name identifies a file, because other files may have been added; the index also identifies a line of a list.
    fields = ("idx", "input", "start") if is_list(args.input) else ("input", "start")
    earlier = Tally()
    todo = missing_items(items, [] if args.overwrite else earlier.counted(finished_lines(lines)), fields, args.prompt)
    if items.total is not None and todo.total is not None:
        _log(f"{items.total} clips, {items.total - todo.total} of them captioned before, into {destination(output)}")
    else:
        _log(f"clips into {destination(output)}, which has {earlier.captions + earlier.errors} lines")
    failed = earlier.errors
    if next(iter(todo), None) is not None:
        manifest.start(args.input, f"Ray cluster {args.ray}" if args.ray else local_devices(), earlier)
        tally = (caption_on_ray if args.ray else caption_here)(todo, config, lines, args)
        manifest.end(tally)
        failed += tally.errors
    return failed


def caption_here(todo: Items, config: CaptionConfig, lines: Path, args: argparse.Namespace) -> Tally:
    """Writes a line per item, with an engine over this process's devices; returns the counts."""
    engine = config.start()
    with (
        signals_end(),
        Compilations() as compilations,
        Journal(lines, args.overwrite) as journal,
        config.preparer(engine.processor) as prepare,
    ):
        loader = ItemLoader(prepare, config.prompt, None if config.isolate else journal)
        loader.try_suspects(todo)
        with Frontend(engine, config.workers, loader) as frontend:
            tally = write_lines(config.lines(frontend, todo), todo.total, lines, args.overwrite)
    _log(f"{tally}\n{summary(engine.stats, loader, compilations.count)}")
    return tally


def caption_on_ray(todo: Items, config: CaptionConfig, lines: Path, args: argparse.Namespace) -> Tally:
    """Captions as `caption_here` does, with engines on a Ray cluster."""
    tally = write_lines(lines_from_ray(todo, config, args.ray, args.ray_actors), todo.total, lines, args.overwrite)
    _log(f"{tally}, including the start of the actors")
    return tally


@contextlib.contextmanager
def signals_end() -> Iterator[None]:
    """Raises an exception at SIGTERM and SIGHUP, as Ctrl-C does: the journal does not count it as a crash."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]  # nohup ignores one
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def summary(stats: EngineStats, loader: ItemLoader, compilations: int) -> str:
    return (
        f"device busy {stats.busy_share:.0%}, {compilations} compilations after warm-up\n"
        f"padding: {stats.patch_padding:.1%} of patches, {stats.token_padding:.1%} of prompt tokens\n"
        f"loading: {loader.frames / max(loader.seconds, 1e-9):.0f} frames/s per thread"
    )


def _check_ray_flags(args: argparse.Namespace) -> None:
    if args.distributed:
        raise InputError("--ray and --distributed both distribute clips over machines. Use one of them.")
    if args.ray_actors is not None and args.ray_actors < 1:
        raise InputError(f"--ray_actors is {args.ray_actors}; it must be at least 1.")


def _find_processes() -> tuple[int, int]:
    """Returns the number of processes and the index of this one. Raises InputError.

    They disconnect at once, because no process needs the devices of another: no shard waits for another, or ends
    because another died.
    """
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as e:
        raise InputError(
            f"The processes did not find each other ({str(e).splitlines()[0]}). --distributed works on TPU pods, under "
            "Slurm and under MPI; elsewhere start each process with --num_shards and its own --shard_index."
        ) from None
    jax.devices()  # while connected: devices are numbered over all processes
    jax.distributed.shutdown()
    return jax.process_count(), jax.process_index()


def share_of(args: argparse.Namespace, processes: int, process: int) -> tuple[str, Items]:
    """Returns the output file and the clips of this process. Raises InputError."""
    if args.num_shards < 1:
        raise InputError(f"--num_shards is {args.num_shards}; it must be at least 1.")
    if args.limit is not None and args.limit < 0:
        raise InputError(f"--limit is {args.limit}; it must be at least 0.")
    if not 0 <= args.shard_index < args.num_shards:
        raise InputError(f"--shard_index is {args.shard_index}; it must be from 0 to {args.num_shards - 1}.")
    if os.path.exists(args.output) and os.path.exists(args.input) and os.path.samefile(args.output, args.input):
        raise InputError(f"--output {args.output} is the --input. Choose another file.")
    root, suffix = os.path.splitext(args.output)
    if suffix.lower() in MEDIA_SUFFIXES:
        raise InputError(f"--output {args.output} is named as a media file. Choose a name such as captions.jsonl.")
    shards = args.num_shards * processes
    shard = args.shard_index * processes + process
    items = find_items(args.input).part(args.limit, shard, shards)
    if (windows := windows_of(args.every, args.window)) is not None:
        items = windows.split(items)
    if shards == 1:
        return args.output, items
    return f"{root}.{shard:05d}-of-{shards:05d}{suffix}", items


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    args = parse()
    sys.exit(run(lambda: main(args), args.traceback))
