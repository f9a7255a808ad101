"""Describes videos: `python -m infer.describe --model CHECKPOINT --input clip.mp4`.

Prints each path and its caption, or with --json one object per line. Progress goes to stderr. A file that cannot be
used is reported and the others are described; the exit status is then 1.
"""

import argparse
import dataclasses
import sys
import time

import tarsier_jax
from infer.bulk.inputs import find_media
from tarsier_jax.api import answer
from tarsier_jax.files import source_text
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.jsonl import to_json
from tarsier_jax.processing.processor import Processor, ProcessorOptions, media_sample
from tarsier_jax.programs import (
    add_model_flag,
    add_precision_flags,
    add_sampling_flags,
    prepare_process,
    read_sampling_flags,
    resolve_dtype,
    run,
)


@dataclasses.dataclass(frozen=True)
class Caption:
    """One described file; the fields of a line that `infer.describe --json` prints."""

    input: str
    prompt: str
    caption: str
    n_frames: int
    prompt_tokens: int
    new_tokens: int
    finish_reason: str


def describe_file(model: Tarsier, processor: Processor, path: str, prompt: str, options: SamplingOptions) -> Caption:
    """Answers `prompt` about one video, GIF or image.

    Raises:
        InputError: the file cannot be used.
    """
    example = processor(media_sample(path, prompt))
    (generation,) = answer(model, processor, [example], options)
    return Caption(
        input=path,
        prompt=prompt,
        caption=generation.text,
        n_frames=example.frames,
        prompt_tokens=len(example.input_ids),
        new_tokens=len(generation.tokens),
        finish_reason=generation.finish_reason,
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infer.describe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flag(parser)
    parser.add_argument(
        "--input", type=source_text, required=True, nargs="+", help="videos, GIFs, images, or directories of them"
    )
    parser.add_argument("--prompt", default="Describe the video in detail.")
    parser.add_argument("--n_frames", type=int, help="frames sampled from each video (default: the model's, 8 or 16)")
    add_precision_flags(parser)
    add_sampling_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    prepare_process()
    settings = {} if args.n_frames is None else {"n_frames": args.n_frames}
    ProcessorOptions(**settings)  # checked before the model is loaded, as all that can be
    options = read_sampling_flags(args)
    paths, failed = [], 0
    for source in args.input:
        try:
            paths += find_media([source])
        except tarsier_jax.InputError as error:
            failed += report(error, args.traceback)
    if not paths:
        return 1
    _log(f"loading {args.model}")
    model, processor = tarsier_jax.load(args.model, resolve_dtype(args.dtype), int8=args.int8, adapter=args.adapter)
    processor = processor.replace(**settings)
    begin = time.perf_counter()
    for number, path in enumerate(paths, 1):
        start = time.perf_counter()
        try:
            caption = describe_file(model, processor, str(path), args.prompt, options)
        except tarsier_jax.InputError as error:
            failed += report(error, args.traceback)
            continue
        seconds = time.perf_counter() - start
        seconds_left = (time.perf_counter() - begin) / number * (len(paths) - number)
        _log(
            f"[{number}/{len(paths)}] {path}: {caption.new_tokens} tokens in {seconds:.1f} s, {seconds_left:.0f} s left"
        )
        line = to_json(dataclasses.asdict(caption), sys.stdout.encoding or "utf-8")
        print(line if args.json else f"{path}\n{caption.caption}\n", flush=True)
    if failed:
        _log(f"{failed} of the inputs could not be described; see the errors above")
    return 1 if failed else 0


def report(error: tarsier_jax.InputError, traceback: bool) -> int:
    """Prints the error of one input and returns 1; with `traceback` raises it."""
    if traceback:
        raise error
    _log(f"error: {error}")
    return 1


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    args = parse()
    sys.exit(run(lambda: main(args), args.traceback))
