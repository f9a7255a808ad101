"""Captions many clips: `python -m infer.caption --model CHECKPOINT --input DIR|GLOB|LIST --output OUT.jsonl`.

LIST is a .jsonl or .parquet file of paths or annotations. OUT gets one line a clip, written as it ends: its caption, or
why there is none; annotations come back with the caption in the assistant's turn, ready for evaluation. Started again,
a run goes on where it was. Exit status 1 if a clip could not be captioned. OUT.parquet is made of OUT.parquet.jsonl at
the end.

Several machines: give each --num_shards N --shard_index I, or start each with --distributed. Each writes a file of its
own, OUT.00000-of-00004.jsonl and so on. Or start one with --ray ADDRESS. See docs/captioning.md.
"""

import argparse
import collections
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from infer.bulk.config import CaptionConfig
from infer.bulk.inputs import Item, find_items, is_list
from infer.bulk.journal import Journal
from infer.bulk.loading import LoadStats
from infer.bulk.outputs import finished_lines, lines_of, write_lines, write_parquet
from infer.bulk.ray_cluster import lines_from_ray
from infer.engine import EngineStats
from tarsier_jax.errors import InputError
from tarsier_jax.files import local_path, locked, path_text
from tarsier_jax.processing.clip import MEDIA_SUFFIXES
from tarsier_jax.programs import Compilations, add_model_flag, add_precision_flags, prepare_process, run


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infer.caption", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flag(parser)
    parser.add_argument(
        "--input", type=path_text, required=True, help="directory, glob, media file, or list (.jsonl, .parquet)"
    )
    parser.add_argument("--output", required=True, type=local_path, help="file to write (.jsonl, .parquet)")
    parser.add_argument("--prompt", default="Describe the video in detail.", help="where the list has none")
    parser.add_argument("--n_frames", type=int, default=16, help="frames sampled from each video (default 16)")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="clip i is sampled with seed + i")
    parser.add_argument("--slots", type=int, default=32, help="captions under way at once, over all devices")
    parser.add_argument("--prompt_tokens", type=int, help="room for the longest prompt, if not for --n_frames and text")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode videos (default 2)")
    parser.add_argument("--mesh", default="", help="such as data=2,tensor=4; data takes all devices if not given")
    parser.add_argument("--num_shards", type=int, default=1, help="parts that the list is dealt out in")
    parser.add_argument("--shard_index", type=int, default=0, help="which part is captioned here, from 0 on")
    parser.add_argument("--distributed", action="store_true", help="find the other processes (TPU pod, Slurm, MPI)")
    parser.add_argument("--ray", metavar="ADDRESS", help='caption on a Ray cluster: HOST:PORT, "auto" or "local"')
    parser.add_argument("--ray_actors", type=int, help="engines on it (default: as there are accelerators, or nodes)")
    parser.add_argument("--limit", type=int, help="caption no more clips than this")
    parser.add_argument("--overwrite", action="store_true", help="begin anew")
    add_precision_flags(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    config = CaptionConfig.of(args)
    prepare_process()
    if args.ray:
        _check_ray_flags(args)
    output, items = share_of(args, *(_find_processes() if args.distributed else (1, 0)))
    lines = lines_of(output)
    with locked(lines):
        failed = caption_missing(items, config, output, args)
        if output != lines:
            write_parquet(lines, output)
    return 1 if failed else 0


def caption_missing(items: Sequence[Item], config: CaptionConfig, output: Path, args: argparse.Namespace) -> int:
    """Captions the items that have no line yet; returns how many have no caption in the end."""
    lines = lines_of(output)
    # Files are known by their names, as others may have come; lines of a list by their index too.
    fields = ("idx", "input") if is_list(args.input) else ("input",)
    former = [] if args.overwrite else list(finished_lines(lines))
    failed = sum("error" in line for line in former)
    todo = missing_items(items, former, fields, args.prompt)
    _log(f"{len(items)} clips, {len(items) - len(todo)} of them done before, into {output}")
    if todo:
        caption = caption_on_ray if args.ray else caption_here
        failed += caption(todo, config, lines, args)
    return failed


def missing_items(
    items: Sequence[Item], former: Sequence[Mapping[str, Any]], fields: Sequence[str], prompt: str
) -> list[Item]:
    """The items that have no line among `former`, where lines are known by `fields`.

    Items may share these, such as questions about one video. Their prompts distinguish them then, and each line counts
    for one of them; a line without a prompt, such as an error, counts for any of them.
    """

    def known_by(content: Mapping[str, Any]) -> str:
        return json.dumps([content.get(field) for field in fields])

    lines = collections.Counter((known_by(line), json.dumps(line.get("prompt"))) for line in former)
    names, repeated = {name for name, _ in lines}, collections.Counter(known_by(vars(item)) for item in items)
    missing = []
    for item in items:
        name = known_by(vars(item))
        choices = [(name, json.dumps(item.line.get("prompt") or prompt)), (name, "null")]
        line = next((choice for choice in choices if lines[choice] > 0), None)
        if repeated[name] > 1 and line is not None:
            lines[line] -= 1
        elif repeated[name] > 1 or name not in names:
            missing.append(item)
    return missing


def caption_here(todo: Sequence[Item], config: CaptionConfig, lines: Path, args: argparse.Namespace) -> int:
    """Writes a line for each item, with an engine over this process's devices; gives how many have no caption."""
    engine, loading = config.start(), LoadStats()
    with signals_end(), Compilations() as compilations, Journal(lines, args.overwrite) as journal:
        tally = write_lines(config.lines(engine, todo, loading, journal), len(todo), lines, args.overwrite)
    _log(f"{tally}\n{summary(engine.stats, loading, compilations.count)}")
    return tally.errors


def caption_on_ray(todo: Sequence[Item], config: CaptionConfig, lines: Path, args: argparse.Namespace) -> int:
    """As `caption_here`, with engines on a Ray cluster."""
    tally = write_lines(lines_from_ray(todo, config, args.ray, args.ray_actors), len(todo), lines, args.overwrite)
    _log(f"{tally}, the actors' start among them")
    return tally.errors


@contextlib.contextmanager
def signals_end() -> Iterator[None]:
    """Has SIGTERM and SIGHUP end the block by an exception, as Ctrl-C does, so that the journal sees no crash."""

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


def summary(stats: EngineStats, loading: LoadStats, compilations: int) -> str:
    return (
        f"device busy {stats.busy_share:.0%}, {compilations} compilations after warm-up\n"
        f"padding: {stats.patch_padding:.1%} of patches, {stats.token_padding:.1%} of prompt tokens\n"
        f"loading: {loading.frames / max(loading.seconds, 1e-9):.0f} frames/s a thread"
    )


def _check_ray_flags(args: argparse.Namespace) -> None:
    if args.distributed:
        raise InputError("--ray and --distributed both spread clips over machines. Give one of them.")
    if args.ray_actors is not None and args.ray_actors < 1:
        raise InputError(f"--ray_actors {args.ray_actors} has to be at least 1.")


def _find_processes() -> tuple[int, int]:
    """How many processes there are, and which this one is. Raises InputError.

    They part again at once, as none needs another's devices: so no shard waits for another, or ends because one died.
    """
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as e:
        raise InputError(
            f"The processes did not find each other ({str(e).splitlines()[0]}). --distributed works on TPU pods, under "
            "Slurm and under MPI; elsewhere give each process --num_shards and its own --shard_index."
        ) from None
    jax.devices()  # while they are together: devices are numbered over all of them
    jax.distributed.shutdown()
    return jax.process_count(), jax.process_index()


def share_of(args: argparse.Namespace, processes: int, process: int) -> tuple[Path, list[Item]]:
    """The file to write, and this process's clips. Raises InputError."""
    if args.num_shards < 1 or (args.limit or 0) < 0:
        raise InputError(f"--num_shards {args.num_shards} has to be at least 1, and --limit {args.limit} at least 0.")
    if not 0 <= args.shard_index < args.num_shards:
        raise InputError(f"--shard_index {args.shard_index} has to be from 0 to {args.num_shards - 1}.")
    if args.output.exists() and os.path.exists(args.input) and args.output.samefile(args.input):
        raise InputError(f"--output {args.output} is the --input. Choose another file.")
    if args.output.suffix.lower() in MEDIA_SUFFIXES:
        raise InputError(f"--output {args.output} is named as a media file. Choose a name such as captions.jsonl.")
    shards = args.num_shards * processes
    shard = args.shard_index * processes + process
    items = find_items(args.input)[: args.limit][shard::shards]
    if shards == 1:
        return args.output, items
    return args.output.with_suffix(f".{shard:05d}-of-{shards:05d}{args.output.suffix}"), items


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    args = parse()
    sys.exit(run(lambda: main(args), args.traceback))
