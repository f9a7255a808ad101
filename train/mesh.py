"""The mesh of a run, and how the rows of a step are split over it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tarsier_jax.errors import InputError
from tarsier_jax.sharding import BATCH, make_mesh
from train.config import MeshConfig, TrainConfig
from train.data.packing import PackedRow
from train.state import StepBatch, batch_shardings


def build_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh, with -1 replaced by the devices that remain.

    Raises:
        InputError: the axes do not match the devices.
    """
    count = len(devices) if devices is not None else jax.device_count()
    sizes = dataclasses.asdict(config)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    product = int(np.prod([size for size in sizes.values() if size != -1]))
    negative = min(sizes.values()) < -1
    if negative or len(open_axes) > 1 or product < 1 or count % product or (not open_axes and product != count):
        text = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise InputError(
            f"config.mesh {text} does not match {count} devices: the sizes multiply to {product}. Their product must "
            f"be {count}; one of them may be -1 for the devices that remain."
        )
    return make_mesh(
        **{axis: count // product if size == -1 else size for axis, size in sizes.items()}, devices=devices
    )


def check_rows(config: TrainConfig, mesh: Mesh) -> None:
    """Raises InputError when a step's rows cannot be split into accumulation steps and over the mesh."""
    across = mesh.shape["data"] * mesh.shape["fsdp"]
    rows, steps = config.data.global_batch_size, config.grad_accum_steps
    if min(steps, rows) < 1 or rows % (steps * across):
        raise InputError(
            f"config.data.global_batch_size={rows} is not a multiple of config.grad_accum_steps={steps} times the "
            f"{across} devices along data and fsdp. Choose a multiple of {max(steps, 1) * across}."
        )


def find_local_rows(mesh: Mesh, num_rows: int, parts: int) -> list[int]:
    """Returns the rows of a step that this process loads, in the order of `global_batch`.

    The rows are split into parts, and each part over data and fsdp, on any number of processes. Processes that the
    tensor axis spans load the same rows.
    """
    size = num_rows // parts
    slices = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((size,)).values()
    positions = sorted({i for index in slices if index is not None for i in range(*index[0].indices(size))})
    return [part * size + i for part in range(parts) for i in positions]


def global_batch(rows: Sequence[PackedRow], parts: int, mesh: Mesh) -> StepBatch:
    """Returns one step's arrays on the devices, from the `find_local_rows` of all processes."""

    def stack(*arrays: np.ndarray) -> np.ndarray:  # of one row each
        return np.concatenate(arrays).reshape(parts, len(arrays) // parts, *arrays[0].shape[1:])

    local = jax.tree.map(stack, *(StepBatch(row.batch, row.extra) for row in rows))
    shardings = batch_shardings(local, mesh)
    return jax.tree.map(lambda s, x: jax.make_array_from_process_local_data(s, x), shardings, local)
