"""Exports a checkpoint of a run: `python -m train.export WORKDIR [--step N|latest|best] [--output DIR]`.

Writes a converted directory, which all programs load and `convert.orbax_to_hf` exports, or with LoRA an adapter. Needs
the starting checkpoint of the run, but neither its data nor its devices: the export uses the CPU, and a run that is
training continues.
"""

import argparse
import contextlib
import sys

import jax

from tarsier_jax.files import path_text, source_text
from tarsier_jax.mirror import new_output
from tarsier_jax.programs import prepare_process, run
from train.model_export import export_checkpoint
from train.workdir import check_workdir


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=_workdir, help="directory of a run of train.sft or train.dpo, local or gs://")
    parser.add_argument("--step", default="latest", help="a number, latest (default), or best (by config.best_metric)")
    parser.add_argument(
        "--output", type=source_text, help="directory to write (default: model-STEP or adapter-STEP in it)"
    )
    return parser.parse_args(argv)


def _workdir(text: str) -> str:
    return path_text(text, check_workdir)


def main(args: argparse.Namespace) -> int:
    prepare_process()
    jax.config.update("jax_platforms", "cpu")  # the accelerator may be that of the run
    with new_output(args.output) if args.output else contextlib.nullcontext() as output:
        exported = export_checkpoint(args.workdir, args.step, output)
    print(args.output or exported)
    return 0


if __name__ == "__main__":
    sys.exit(run(lambda: main(parse())))
