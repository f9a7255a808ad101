"""Supervised fine-tuning: `python -m train.sft --config configs/recap_7b.py --config.data.train=FILE --workdir DIR`.

Started again with the same flags, it goes on from the workdir's last checkpoint. See docs/training.md.
"""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from tarsier_jax.processing.processor import Processor
from tarsier_jax.programs import run
from train.config import TrainConfig
from train.data.packing import PackUnit
from train.data.samples import prepare
from train.losses import sft_loss
from train.main import launch
from train.run import Objective


def sft_objective(config: TrainConfig) -> Objective:
    """Trains on the assistant's turns."""

    def plain(sample: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return prepare(sample, rng, config.processor.n_frames)

    def load(processor: Processor, sample: Mapping[str, Any], rng: np.random.Generator) -> PackUnit:
        return PackUnit([processor(plain(sample, rng), training=True, rng=rng)], {})

    return Objective("sft", sft_loss, plain, load)


if __name__ == "__main__":
    sys.exit(run(lambda: launch(sft_objective)))
