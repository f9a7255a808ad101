"""Examples packed into rows, and the state of a tiny model, for the tests of this package."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tarsier_jax.config import ModelConfig
from tarsier_jax.families import load_config
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.packing import Row, RowShape, Unit
from tarsier_jax.sharding import make_mesh
from tests import reference
from train.data.packing import PackedRow
from train.mesh import global_batch
from train.optimizer import OptimizerConfig
from train.state import StateSpec, StepBatch, TrainState, init_state, make_state_spec

SHAPE = RowShape(tokens=128, bins=6, patches=64, frames=4, samples=8)

# Videos of several frames, two of different sizes in one sample, images, text; answers of different lengths.
SAMPLES: list[list[Any]] = [
    [4, (3, 4, 6), 11],
    [3, (2, 4, 4), 5, (3, 6, 4), 7],
    [17],
    [2, (1, 8, 4), 9],
    [6, (4, 4, 4), 3],
    [2, (2, 2, 6), 13],
    [5, (1, 4, 4), 2, (2, 4, 8), 6],
    [9, (3, 2, 4), 21],
]


def make_examples(config: ModelConfig, samples: Sequence[Sequence[Any]] = SAMPLES, seed: int = 0) -> list[Example]:
    """Examples whose last run of text is the answer."""
    examples = []
    for i, sample in enumerate(samples):
        example = reference.make_example(sample, config, seed=seed + i)
        labels = np.full_like(example.input_ids, -100)
        labels[-sample[-1] + 1 :] = example.input_ids[-sample[-1] + 1 :]
        examples.append(dataclasses.replace(example, labels=labels))
    return examples


def pack(units: Sequence[Unit], config: ModelConfig, shape: RowShape = SHAPE, **extra: np.ndarray) -> PackedRow:
    """One row that holds all the units."""
    row = Row(shape, config)
    assert all(row.add(unit) for unit in units)
    return PackedRow(row.build(0), {name: value[None] for name, value in extra.items()}, 0, 0, (), ())


def step_batch(rows: Sequence[Sequence[Example]], config: ModelConfig, mesh: Mesh, parts: int = 1) -> StepBatch:
    """Returns the batch of one step from rows of examples."""
    return global_batch([pack([[e] for e in row], config) for row in rows], parts, mesh)


def make_run(
    directory: Path, optimizer: OptimizerConfig, mesh: Mesh | None = None, with_reference: bool = False, **over: Any
) -> tuple[StateSpec, TrainState]:
    """A spec and its first state for the model in `directory`; `over` replaces fields of its configuration."""
    config = dataclasses.replace(load_config(directory), **over)
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    spec = make_state_spec(config, optimizer, 10, mesh, with_reference)
    return spec, init_state(spec, directory)
