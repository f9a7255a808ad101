"""Direct preference optimisation.

    python -m train.dpo --config configs/dpo_7b.py --config.data.train=FILE --workdir DIR

The last answer of each conversation has the texts "chosen" and "rejected". The same command resumes from the last
checkpoint of the workdir. See docs/training.md.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tarsier_jax.errors import InputError
from tarsier_jax.files import is_remote, locked
from tarsier_jax.mirror import output_file
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.processor import Processor
from tarsier_jax.programs import run
from train.config import TrainConfig
from train.data.packing import PackUnit
from train.data.reference_logprobs import ReferenceFile, write_reference
from train.data.samples import prepare_pair
from train.debug_data import write_debug_data
from train.loop import train
from train.losses import dpo_loss
from train.main import define_run_flags, read_run
from train.run import Objective, TrainRun
from train.workdir import open_workdir


def dpo_objective(config: TrainConfig) -> Objective:
    """Raises the log-probabilities of chosen answers and lowers those of rejected ones, relative to the reference.

    Raises:
        InputError: a row cannot hold a pair, the reference is a file and the frames are random, or the reference is a
            URL and the run has several processes.
    """
    if config.data.max_samples_per_seq < 2:
        raise InputError(
            "config.data.max_samples_per_seq is 1, but a row of DPO must have room for the 2 answers of a pair."
        )
    n_frames, pairs = config.processor.n_frames, config.data.max_samples_per_seq // 2
    loss = functools.partial(dpo_loss, beta=config.dpo.beta, pairs=pairs)

    def chosen(sample: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return prepare_pair(sample, rng, n_frames)[0]

    def load(processor: Processor, sample: Mapping[str, Any], rng: np.random.Generator) -> PackUnit:
        seed = int(rng.integers(2**63))  # both answers get the same frames
        chats = prepare_pair(sample, rng, n_frames)
        pair = [processor(chat, training=True, rng=np.random.default_rng(seed)) for chat in chats]
        return PackUnit(mask_shared(pair), {})

    if config.dpo.reference == "weights":
        return Objective("dpo", loss, chosen, load, with_reference=True, answers=2)
    if config.processor.video_sampler == "v2":
        raise InputError(
            "dpo.reference is a file, but processor.video_sampler v2 draws new frames at every pass. Choose sampler "
            "v1, or --config.dpo.reference=weights."
        )
    reference = ReferenceFile(config.dpo.reference)
    if is_remote(reference.name) and jax.process_count() > 1:
        raise InputError(
            f"config.dpo.reference {reference.name} is in an object store, which a run of several processes cannot "
            "write. Choose a file on a file system that all hosts share, or --config.dpo.reference=weights."
        )

    def load_with_key(processor: Processor, sample: Mapping[str, Any], rng: np.random.Generator) -> PackUnit:
        return dataclasses.replace(load(processor, sample, rng), key=reference.key(sample))

    def load_with_reference(processor: Processor, sample: Mapping[str, Any], rng: np.random.Generator) -> PackUnit:
        return dataclasses.replace(load(processor, sample, rng), extra={"reference": reference.of(sample)})

    def before(run: TrainRun) -> None:
        objective = Objective("reference", loss, chosen, load_with_key)
        with output_file(reference.name) as path:
            reference.open(run, path)
            # Process 0 has the lock for all, as in `train.workdir.open_workdir`; runs with other workdirs may share the
            # file.
            with locked(path) if jax.process_index() == 0 else contextlib.nullcontext():
                write_reference(dataclasses.replace(run, objective=objective), reference, pairs)

    extra = {"reference": (pairs, 2)}
    return Objective("dpo", loss, chosen, load_with_reference, extra, before=before, answers=2, load_plain=load)


def mask_shared(pair: Sequence[Example]) -> list[Example]:
    """Returns the chosen and the rejected example, with labels from the first answer that differs on.

    Earlier answers are equal in both. They cancel in the loss, and are not part of the rewards.

    Raises:
        InputError: the two do not differ within max_seq_len.
    """
    ids, other_ids = (example.input_ids for example in pair)
    n = min(len(ids), len(other_ids))
    if np.array_equal(ids, other_ids):
        raise InputError(f'"chosen" and "rejected" are equal in the {n} tokens within max_seq_len. Raise it.')
    first = int(np.argmax(np.append(ids[:n] != other_ids[:n], True)))
    start = np.flatnonzero(np.append(-100, pair[0].labels[:first]) < 0)[-1]  # of the answer that `first` is in
    masked = (np.where(np.arange(len(e.labels)) < start, np.int32(-100), e.labels) for e in pair)
    return [dataclasses.replace(example, labels=labels) for example, labels in zip(pair, masked, strict=True)]


def main() -> int:
    config, path = read_run(define_run_flags())
    with open_workdir(path) as (workdir, store):
        config = write_debug_data(config, workdir, is_shared=store is None)
        return train(config, workdir, dpo_objective(config), store).exit_status


if __name__ == "__main__":
    sys.exit(run(main))
