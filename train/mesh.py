"""The mesh of a run, and how the rows of a step are split over it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tarsier_jax.errors import InputError
from tarsier_jax.processing.packing import stack_rows
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


def row_share(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count): this process loads share `index` of `count` equal shares of a step's rows.

    Processes that the tensor axis spans load the same rows.
    """
    sharding = NamedSharding(mesh, P(BATCH))
    across = mesh.shape["data"] * mesh.shape["fsdp"]
    indices = sharding.addressable_devices_indices_map((across,)).values()
    starts = sorted({index[0].start or 0 for index in indices if index is not None})
    return starts[0] // len(starts), across // len(starts)


def global_batch(rows: Sequence[PackedRow], parts: int, mesh: Mesh) -> StepBatch:
    """Returns one step's arrays on the devices, from the rows of all processes."""
    n = len(rows) // parts
    stacked = [
        StepBatch(
            stack_rows([row.batch for row in rows[i * n : (i + 1) * n]]),
            {name: np.concatenate([row.extra[name] for row in rows[i * n : (i + 1) * n]]) for name in rows[0].extra},
        )
        for i in range(parts)
    ]
    local = jax.tree.map(lambda *x: x[0][None] if parts == 1 else np.stack(x), *stacked)
    shardings = batch_shardings(local, mesh)
    return jax.tree.map(lambda s, x: jax.make_array_from_process_local_data(s, x), shardings, local)
