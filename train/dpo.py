"""Direct preference optimisation.

    python -m train.dpo --config configs/dpo_7b.py --config.data.train=FILE --workdir DIR

A line is a conversation whose last answer has "chosen" and "rejected" texts. Started again with the same flags, it goes
on from the workdir's last checkpoint. See docs/training.md.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tarsier_jax.cli import run
from tarsier_jax.errors import InputError
from tarsier_jax.files import locked
from tarsier_jax.processing.processor import Processor
from train.config import TrainConfig
from train.data import Loaded
from train.launch import launch
from train.losses import dpo_loss
from train.reference import ReferenceFile, sample_key, write_reference
from train.setup import Job, Run
from train.tasks import prepare, split_preference


def dpo_job(config: TrainConfig) -> Job:
    """Trains the chosen answers' log-probabilities up, and the rejected ones' down, against the reference's."""
    n_frames, pairs = config.processor.n_frames, max(config.data.samples // 2, 1)
    loss = functools.partial(dpo_loss, beta=config.dpo.beta, pairs=pairs)

    def chosen(sample: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return prepare(split_preference(sample)[0], rng, n_frames)

    def load(processor: Processor, sample: Mapping[str, Any], rng: np.random.Generator) -> Loaded:
        seed = int(rng.integers(2**63))
        unit = []
        for half in split_preference(sample):
            rng = np.random.default_rng(seed)  # both answers are about the same frames
            unit.append(processor(prepare(half, rng, n_frames), training=True, rng=rng))
        return Loaded(unit, {}, sample_key(sample))

    if config.dpo.reference == "weights":
        return Job("dpo", loss, chosen, load, with_reference=True)
    if config.processor.video_sampler == "v2":
        raise InputError(
            "dpo.reference is a file, but processor.video_sampler v2 shows other frames at every turn. Choose sampler "
            "v1, or --config.dpo.reference=weights."
        )
    stored = ReferenceFile(config.dpo.reference)

    def load_with_reference(processor: Processor, sample: Mapping[str, Any], rng: np.random.Generator) -> Loaded:
        return dataclasses.replace(load(processor, sample, rng), extra={"reference": stored.of(sample)})

    def before(run: Run) -> None:
        # Process 0 has the lock for all, as in train.launch; runs with other workdirs may share the file.
        with locked(stored.path) if jax.process_index() == 0 else contextlib.nullcontext():
            write_reference(dataclasses.replace(run, job=Job("reference", loss, chosen, load)), pairs)

    return Job("dpo", loss, chosen, load_with_reference, {"reference": (pairs, 2)}, before=before)


if __name__ == "__main__":
    sys.exit(run(lambda: launch(dpo_job)))
