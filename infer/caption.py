"""Captions many clips: `python -m infer.caption --model CHECKPOINT --input DIR|GLOB|LIST --output OUT.jsonl`.

LIST is a .jsonl or .parquet file of paths or annotations. OUT gets one line a clip, written as it ends: its caption, or
why there is none; annotations come back with the caption in the assistant's turn, ready for evaluation. Started again,
a run goes on where it was. Exit status 1 if a clip could not be captioned. OUT.parquet is made of OUT.parquet.jsonl at
the end.

Several machines: give each --num_shards N --shard_index I, or start each with --distributed. Each writes a file of its
own, OUT.00000-of-00004.jsonl and so on. See docs/captioning.md.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

import tarsier_jax
from infer.engine import Answer, Engine, Refusal, Request, fit_shape
from infer.inputs import Item, find_items, is_list, with_prediction
from infer.loading import LoadReport, load_requests
from infer.outputs import LineWriter, finished_lines, lines_of, write_parquet
from infer.runtime import Compilations, add_model_flag, add_precision_flags, prepare_process, resolve_dtype
from tarsier_jax.cli import run
from tarsier_jax.errors import InputError
from tarsier_jax.generation.sampling import check_sampling
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.processor import ProcessorOptions
from tarsier_jax.sharding import make_mesh


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infer.caption", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flag(parser)
    parser.add_argument("--input", required=True, help="directory, glob, media file, or list (.jsonl, .parquet)")
    parser.add_argument("--output", required=True, type=Path, help="file to write (.jsonl, .parquet)")
    parser.add_argument("--prompt", default="Describe the video in detail.", help="where the list has none")
    parser.add_argument("--n_frames", type=int, default=16, help="frames sampled from each video (default 16)")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="clip i is sampled with seed + i")
    parser.add_argument("--slots", type=int, default=32, help="captions under way at once, over all devices")
    parser.add_argument("--prompt_tokens", type=int, help="room for the longest prompt, if not for --n_frames and text")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode videos (default 2)")
    parser.add_argument("--mesh", default="", help="such as data=2,tensor=4; data takes all devices if not given")
    parser.add_argument("--num_shards", type=int, default=1, help="parts that the list is dealt out in")
    parser.add_argument("--shard_index", type=int, default=0, help="which part is captioned here, from 0 on")
    parser.add_argument("--distributed", action="store_true", help="find the other processes (TPU pod, Slurm, MPI)")
    parser.add_argument("--limit", type=int, help="caption no more clips than this")
    parser.add_argument("--overwrite", action="store_true", help="begin anew")
    add_precision_flags(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    check_sampling(args.temperature, 0, args.top_p)
    options = ProcessorOptions(n_frames=args.n_frames)
    prepare_process()
    if args.distributed:
        _find_processes()
    output, items = share_of(args)
    lines = lines_of(output)
    # Files are known by their names, as others may have come; lines of a list by their index too.
    fields = ("idx", "input") if is_list(args.input) else ("input",)
    former = [] if args.overwrite else list(finished_lines(lines))
    done = {json.dumps([line.get(field) for field in fields]) for line in former}
    failed = sum("error" in line for line in former)
    todo = [item for item in items if json.dumps([getattr(item, field) for field in fields]) not in done]
    _log(f"{len(items)} clips, {len(items) - len(todo)} of them done before, into {output}")
    if todo:
        failed += caption_all(todo, lines, options, args)
    if output != lines:
        write_parquet(lines, output)
    return 1 if failed else 0


def caption_all(todo: Sequence[Item], lines: Path, options: ProcessorOptions, args: argparse.Namespace) -> int:
    """Loads the model and writes a line for each item; gives how many could not be captioned."""
    mesh = local_mesh(args.mesh)
    model, processor = tarsier_jax.load(args.model, resolve_dtype(args.dtype), mesh, args.int8)
    processor = dataclasses.replace(processor, options=options)
    groups = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    shape = fit_shape(processor, args.slots, args.max_new_tokens, groups, args.prompt_tokens)
    engine = Engine(model, processor, shape)
    return caption(engine, todo, args, LineWriter(lines, args.overwrite))


def _find_processes() -> None:
    """Has JAX know how many processes there are, and which this one is. Raises InputError.

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


def share_of(args: argparse.Namespace) -> tuple[Path, list[Item]]:
    """The file to write, and this process's clips. Raises InputError."""
    if not 0 <= args.shard_index < args.num_shards:
        raise InputError(f"--shard_index {args.shard_index} has to be from 0 to {args.num_shards - 1}.")
    shards = args.num_shards * jax.process_count()
    shard = args.shard_index * jax.process_count() + jax.process_index()
    items = find_items(args.input)[: args.limit][shard::shards]
    if shards == 1:
        return args.output, items
    return args.output.with_suffix(f".{shard:05d}-of-{shards:05d}{args.output.suffix}"), items


def local_mesh(flag: str) -> jax.sharding.Mesh | None:
    """The mesh over this process's devices; None for one device. Raises InputError."""
    devices = jax.local_devices()
    try:
        sizes = {name: int(size) for name, size in (part.split("=") for part in flag.split(",") if part)}
        sizes.setdefault("data", len(devices) // max(1, sizes.get("tensor", 1) * sizes.get("fsdp", 1)))
        mesh = make_mesh(**sizes, devices=devices)
    except (ValueError, TypeError):
        raise InputError(
            f"--mesh {flag} does not fit {len(devices)} devices. Give axes (data, fsdp, tensor) whose sizes multiply "
            "to that, such as data=2,tensor=4."
        ) from None
    return mesh if len(devices) > 1 else None


def caption(engine: Engine, items: Sequence[Item], args: argparse.Namespace, out: LineWriter) -> int:
    """Writes a line for each item; gives how many could not be captioned."""

    def make(number: int, example: Example) -> Request:
        sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed + number}
        return Request(number, example, args.max_new_tokens, **sampling)

    loading, failed = LoadReport(), 0
    requests = load_requests(items, engine.processor, args.prompt, make, args.workers, loading)
    with Compilations() as compilations, tqdm(total=len(items), unit="clip", smoothing=0.1) as bar:
        try:
            for result in engine.run(requests):
                number = result.key if isinstance(result, Refusal) else result.request.key
                out.write(output_line(items[number], result, engine, args.prompt))
                failed += isinstance(result, Refusal)
                rate = engine.report.new_tokens / engine.report.seconds
                bar.set_postfix_str(f"{rate:.0f} tokens/s, {failed} errors", refresh=False)
                bar.update()
        finally:
            out.close()
    _log(summary(engine, loading, failed, compilations.count))
    return failed


def output_line(item: Item, result: Answer | Refusal, engine: Engine, prompt: str) -> dict[str, Any]:
    known = {"idx": item.idx, "input": item.input}
    if isinstance(result, Refusal):
        return {**known, "error": result.reason}
    text, example = engine.text(result), result.request.example
    told = {
        "n_frames": int(example.grid_thw[:, 0].sum()),
        "tokens": len(result.tokens),
        "finish_reason": result.finish_reason,
        "seconds": round(result.seconds, 3),
    }
    if item.is_annotation:
        return {**with_prediction(item.line, text), **known, **told}
    return {**known, "caption": text, "prompt": item.line.get("prompt") or prompt, **told}


def summary(engine: Engine, loading: LoadReport, failed: int, compilations: int) -> str:
    report = engine.report
    lines = (
        f"{report.answers} captions and {failed} errors in {report.seconds:.1f} s: "
        f"{report.answers / report.seconds:.2f} clips/s, {report.new_tokens / report.seconds:.0f} tokens/s",
        f"device busy {report.busy_share:.0%}, {compilations} compilations after warm-up",
        f"padding: {report.patch_padding:.1%} of patches, {report.token_padding:.1%} of prompt tokens",
        f"loading: {loading.frames / max(loading.seconds, 1e-9):.0f} frames/s a worker",
    )
    return "\n".join(lines)


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    args = parse()
    sys.exit(run(lambda: main(args), args.traceback))
