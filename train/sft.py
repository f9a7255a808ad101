"""Supervised fine-tuning: `python -m train.sft --config configs/recap_7b.py --config.data.train=FILE --workdir DIR`.

The same command resumes from the last checkpoint of the workdir. See docs/training.md.
"""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from tarsier_jax.processing.processor import Processor
from tarsier_jax.programs import run
from train.config import TrainConfig
from train.data.packing import PackUnit
from train.data.samples import Prepare, prepare
from train.debug_data import write_debug_data
from train.loop import train
from train.losses import sft_loss
from train.main import define_run_flags, read_run
from train.run import Objective
from train.workdir import open_workdir


def sft_objective(config: TrainConfig, prepare: Prepare = prepare) -> Objective:
    """Trains on the assistant's turns.

    Args:
        prepare: Returns the chat of a line of annotations, as `train.data.samples.prepare` does.
    """

    def plain(sample: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return prepare(sample, rng, config.processor.n_frames)

    def load(processor: Processor, sample: Mapping[str, Any], rng: np.random.Generator) -> PackUnit:
        return PackUnit([processor(plain(sample, rng), training=True, rng=rng)], {})

    return Objective("sft", sft_loss, plain, load)


def main() -> int:
    config, path = read_run(define_run_flags())
    with open_workdir(path) as (workdir, store):
        config = write_debug_data(config, workdir, is_shared=store is None)
        return train(config, workdir, sft_objective(config), store).exit_status


if __name__ == "__main__":
    sys.exit(run(main))
