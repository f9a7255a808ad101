"""Direct preference optimisation.

    python -m train.dpo --config configs/dpo_7b.py --config.data.train=FILE --workdir DIR

A line is a conversation whose last answer has "chosen" and "rejected" texts. Started again with the same flags, it goes
on from the workdir's last checkpoint. See docs/training.md.
"""

import functools
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from tarsier_jax.cli import run
from tarsier_jax.processing.processor import Processor
from train.config import TrainConfig
from train.data import Loaded
from train.launch import launch
from train.losses import dpo_loss
from train.reference import ReferenceFile
from train.setup import Job
from train.tasks import prepare, split_preference


def dpo_job(config: TrainConfig) -> Job:
    """Trains the chosen answers' log-probabilities up, and the rejected ones' down, against the reference's."""
    n_frames, pairs = config.processor.n_frames, max(config.data.samples // 2, 1)
    stored = None if config.dpo.reference == "weights" else ReferenceFile(config.dpo.reference)

    def chosen(sample: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return prepare(split_preference(sample)[0], rng, n_frames)

    def load(processor: Processor, sample: Mapping[str, Any], rng: np.random.Generator) -> Loaded:
        seed = int(rng.integers(2**63))
        unit = []
        for half in split_preference(sample):
            rng = np.random.default_rng(seed)  # both answers are about the same frames
            unit.append(processor(prepare(half, rng, n_frames), training=True, rng=rng))
        return Loaded(unit, {} if stored is None else {"reference": stored.of(sample)})

    loss = functools.partial(dpo_loss, beta=config.dpo.beta, pairs=pairs)
    extra = {} if stored is None else {"reference": (pairs, 2)}
    return Job("dpo", loss, chosen, load, extra, with_reference=stored is None)


if __name__ == "__main__":
    sys.exit(run(lambda: launch(dpo_job)))
