"""Merges a LoRA adapter into its base model: `python -m convert.merge_lora MODEL ADAPTER OUT`.

OUT is a converted directory in the base model's dtype, which all programs load and `convert.orbax_to_hf` exports. It
appears only when it is complete. Memory contains the whole model. The adapter is in PEFT's format, such as
WORKDIR/adapter of a training run with config.lora.rank.
"""

import argparse
import dataclasses
import logging
import sys

from tarsier_jax.families import load_config
from tarsier_jax.files import source_text
from tarsier_jax.mirror import new_output
from tarsier_jax.processing.chat import load_chat_template
from tarsier_jax.programs import run
from tarsier_jax.weights import load_weights, resolve, stored_dtype
from tarsier_jax.weights.orbax import write_converted


def merge(model: str, adapter: str, out: str) -> None:
    """Writes the merged model. Raises CheckpointError."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns about intended settings
    directory = resolve(model)
    config = load_config(directory)
    config = dataclasses.replace(config, param_dtype=stored_dtype(directory, config))
    merged = load_weights(directory, config, adapter=adapter)
    with new_output(out) as target:
        write_converted(target, merged, directory, load_chat_template(directory))
    print(f"{out}: {model} with {adapter}, {config.param_dtype}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convert.merge_lora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=source_text, metavar="MODEL", help="directory or hub id of the base model")
    parser.add_argument("adapter", type=source_text, metavar="ADAPTER", help="directory of the adapter")
    parser.add_argument("out", type=source_text, metavar="OUT", help="directory to write; it must not exist yet")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    return run(lambda: merge(args.model, args.adapter, args.out), args.traceback)


if __name__ == "__main__":
    sys.exit(main())
