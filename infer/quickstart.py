"""Captions a clip without a download: `python -m infer.quickstart`.

The clip and the model are those in the package: moving shapes, and a small Tarsier2 that has learnt to describe them,
but has never seen this clip. Writes demo.png, the frames that the model saw over its caption.
"""

import argparse
import sys

import tarsier_jax
from infer.contact_sheet import contact_sheet
from infer.describe import describe_file
from tarsier_jax.errors import InputError
from tarsier_jax.files import source_text
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.mirror import output_file
from tarsier_jax.processing.frame_sampling import sample_uniform
from tarsier_jax.processing.video import open_clip
from tarsier_jax.programs import prepare_process, run
from tarsier_jax.weights import EMBEDDED, EMBEDDED_CLIP

_PROMPT = "Describe the video in detail."
_OPTIONS = SamplingOptions(max_new_tokens=96)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infer.quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=source_text, default="demo.png", help="picture to write (default demo.png)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    prepare_process()
    model, processor = tarsier_jax.load(EMBEDDED)
    caption = describe_file(model, processor, str(EMBEDDED_CLIP), _PROMPT, _OPTIONS).caption
    clip = open_clip(EMBEDDED_CLIP)
    frames = list(clip.read(sample_uniform(clip.length, processor.options.n_frames)))
    try:
        with output_file(args.output) as path:
            contact_sheet(frames, caption).save(path, format="PNG")
    except OSError as e:
        raise InputError(f"--output {args.output} cannot be written ({e.strerror}). Choose another file.") from None
    print(f"{caption}\n\nframes and caption: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run(lambda: main(parse())))
