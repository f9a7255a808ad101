"""The mesh of a run, and the rows that each process loads."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tarsier_jax.errors import InputError
from train.config import MeshConfig, TrainConfig
from train.data.packing import DataConfig
from train.mesh import build_mesh, check_rows, find_local_rows


def devices(count: int) -> list[jax.Device]:
    """As many as a mesh needs in order to be described; it could not compute."""
    return jax.devices()[:1] * count


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 8, 1)),
        (MeshConfig(fsdp=-1, tensor=2), (1, 4, 2)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=8, fsdp=1, tensor=-1), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
    ],
)
def test_one_axis_takes_what_the_others_leave(config: MeshConfig, sizes: tuple[int, int, int]) -> None:
    assert dict(build_mesh(config, devices(8)).shape) == dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=1, fsdp=4, tensor=1),
        MeshConfig(data=1, fsdp=3, tensor=-1),
        MeshConfig(data=2, fsdp=-1, tensor=-1),
        MeshConfig(data=0, fsdp=-1, tensor=1),
        MeshConfig(data=-2, fsdp=-4, tensor=1),
    ],
)
def test_a_mesh_that_does_not_match_the_devices(config: MeshConfig) -> None:
    sizes = f"data={config.data}, fsdp={config.fsdp}, tensor={config.tensor}"
    with pytest.raises(InputError, match=f"{sizes} does not match 8 devices.* must be 8"):
        build_mesh(config, devices(8))


def with_rows(rows: int, parts: int) -> TrainConfig:
    return TrainConfig(grad_accum_steps=parts, data=DataConfig(global_batch_size=rows))


def test_rows_are_split_into_parts_and_over_data_and_fsdp() -> None:
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices(8))
    check_rows(with_rows(rows=12, parts=3), mesh)
    with pytest.raises(
        InputError, match=r"global_batch_size=12 .*grad_accum_steps=2 times the 4 devices .* a multiple of 8"
    ):
        check_rows(with_rows(rows=12, parts=2), mesh)
    for rows, parts in ((0, 1), (12, 0)):
        with pytest.raises(
            InputError, match=rf"global_batch_size={rows} .*grad_accum_steps={parts} times .* a multiple of 4"
        ):
            check_rows(with_rows(rows, parts), mesh)


def rows_of_processes(
    monkeypatch: pytest.MonkeyPatch, mesh: Mesh, processes: np.ndarray, num_rows: int, parts: int
) -> list[list[int]]:
    """The rows that each process loads; `processes` has the process of every device, in the order of the mesh."""

    def rows(process: int) -> list[int]:
        class Sharding:
            """A process's view of a `NamedSharding` of rows over data and fsdp."""

            def __init__(self, mesh: Mesh, *_: Any) -> None:
                self.owners = processes.reshape(-1, mesh.shape["tensor"])

            def addressable_devices_indices_map(self, shape: tuple[int]) -> dict:
                n = shape[0] // len(self.owners)
                own = np.argwhere(self.owners == process).tolist()
                return {(i, j): (slice(i * n, (i + 1) * n),) for i, j in own}

        monkeypatch.setattr("train.mesh.NamedSharding", Sharding)
        return find_local_rows(mesh, num_rows, parts)

    return [rows(process) for process in range(max(processes) + 1)]


@pytest.mark.parametrize(
    ("config", "processes", "parts", "expected"),
    [
        (MeshConfig(), [0] * 8, 1, [list(range(16))]),
        (MeshConfig(), [0] * 8, 2, [list(range(16))]),
        (MeshConfig(), [0] * 4 + [1] * 4, 1, [list(range(8)), list(range(8, 16))]),
        (MeshConfig(), [0] * 4 + [1] * 4, 2, [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]),
        # The order of a pod's chips: a process has no neighbours.
        (MeshConfig(), [0, 0, 1, 1, 0, 0, 1, 1], 2, [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]),
        # The tensor axis spans two processes, which load the same rows.
        (MeshConfig(fsdp=2, tensor=4), [0, 0, 1, 1, 2, 2, 3, 3], 4, 2 * [[0, 1, 4, 5, 8, 9, 12, 13]]),
        (MeshConfig(fsdp=1, tensor=8), [0] * 4 + [1] * 4, 1, 2 * [list(range(16))]),
    ],
)
def test_processes_share_rows(
    monkeypatch: pytest.MonkeyPatch,
    config: MeshConfig,
    processes: list[int],
    parts: int,
    expected: list[list[int]],
) -> None:
    mesh = build_mesh(config, devices(8))
    shares = rows_of_processes(monkeypatch, mesh, np.array(processes), 16, parts)
    assert shares[: len(expected)] == expected
    assert set().union(*shares) == set(range(16))
