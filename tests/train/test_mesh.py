"""The mesh of a run, and the rows that each process loads."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tarsier_jax.errors import InputError
from train.config import MeshConfig, TrainConfig
from train.data.packing import DataConfig
from train.mesh import build_mesh, check_rows, row_share


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


@pytest.mark.parametrize(
    ("config", "processes", "shares"),
    [
        (MeshConfig(), 1, [(0, 1)]),
        (MeshConfig(), 2, [(0, 2), (1, 2)]),
        (MeshConfig(data=2, fsdp=2, tensor=2), 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (MeshConfig(fsdp=2, tensor=4), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # the tensor axis spans two processes
        (MeshConfig(fsdp=1, tensor=8), 2, [(0, 1), (0, 1)]),
    ],
)
def test_processes_share_rows(
    monkeypatch: pytest.MonkeyPatch, config: MeshConfig, processes: int, shares: list[tuple[int, int]]
) -> None:
    mesh = build_mesh(config, devices(8))
    for process, share in enumerate(shares):
        own = np.arange(8) // (8 // processes) == process

        class Sharding:
            """A process's view of a `NamedSharding` of rows over data and fsdp."""

            def __init__(self, mesh: Mesh, *_: Any) -> None:
                self.rows = np.arange(8).reshape(-1, mesh.shape["tensor"])

            def addressable_devices_indices_map(self, shape: tuple[int], own: np.ndarray = own) -> dict:
                assert shape == (len(self.rows),)
                return {i: (slice(r, r + 1),) for r, row in enumerate(self.rows) for i in row.tolist() if own[i]}

        monkeypatch.setattr("train.mesh.NamedSharding", Sharding)
        assert row_share(mesh) == share
