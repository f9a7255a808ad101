"""Writes a converted checkpoint back as a Hugging Face directory: `python -m convert.orbax_to_hf DIR OUT`.

Every tensor is restored bit for bit. --layout writes the names and the config.json of the other layout; the first
Tarsier has one layout. --dtype rounds the values to that dtype, for example after training in float32.
"""

import argparse
import sys
from pathlib import Path

from convert.progress import Progress
from tarsier_jax.files import source_text
from tarsier_jax.mirror import new_output
from tarsier_jax.programs import run
from tarsier_jax.storage import local_source
from tarsier_jax.weights import convert_to_hf


def _convert(source: str, out: str, layout: str | None, dtype: str | None) -> None:
    progress = Progress()
    with new_output(out) as directory:
        names = convert_to_hf(Path(local_source(source)), directory, layout, dtype, progress)
    print(progress.summary(len(names), out))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convert.orbax_to_hf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=source_text, metavar="DIR", help="directory written by convert.hf_to_orbax")
    parser.add_argument("out", type=source_text, metavar="OUT", help="directory to write; it must not exist yet")
    parser.add_argument("--layout", choices=("tarsier2", "qwen2_vl"), help="default: the source's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the source's")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    return run(lambda: _convert(args.source, args.out, args.layout, args.dtype), args.traceback)


if __name__ == "__main__":
    sys.exit(main())
