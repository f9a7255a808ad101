"""Converts a Hugging Face checkpoint for sharded loading: `python -m convert.hf_to_orbax HF_DIR OUT`.

OUT appears only when it is complete. Memory stays small for every size of the model.
"""

import argparse
import logging
import sys

from convert.progress import Progress
from tarsier_jax.files import source_text
from tarsier_jax.mirror import new_output
from tarsier_jax.programs import run
from tarsier_jax.weights import resolve
from tarsier_jax.weights.streaming import convert_hf


def _convert(source: str, out: str) -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns about intended settings
    progress = Progress()
    with new_output(out) as directory:
        checkpoint = convert_hf(resolve(source), directory, progress)
    print(progress.summary(sum(len(tensors) for _, tensors in checkpoint.sources), out))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convert.hf_to_orbax", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=source_text, metavar="HF_DIR", help="Hugging Face directory or hub id")
    parser.add_argument("out", type=source_text, metavar="OUT", help="directory to write; it must not exist yet")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    return run(lambda: _convert(args.source, args.out), args.traceback)


if __name__ == "__main__":
    sys.exit(main())
