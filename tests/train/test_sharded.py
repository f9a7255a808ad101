"""Twenty steps are the same on one device, on eight, and on eight that two processes share."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.train.programs import curve, finish, free_port, start

pytestmark = pytest.mark.slow

MESH = ("--config.mesh.fsdp=4", "--config.mesh.tensor=2")


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    workdir = tmp_path_factory.mktemp("one")
    finish(start(workdir))
    losses = np.array(curve(workdir))
    assert losses.shape == (20, 3) and losses[-1, 1] < losses[0, 1] - 0.1
    return losses


def test_eight_devices(tmp_path: Path, on_one_device: np.ndarray) -> None:
    finish(start(tmp_path, *MESH, devices=8))
    np.testing.assert_allclose(curve(tmp_path), on_one_device, rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run on two processes of four devices."""
    workdir = tmp_path_factory.mktemp("two")
    epochs = "--config.num_epochs=20"  # of 8 lines: 20 steps of 4 rows of 2 samples, which process 0 estimates
    checkpoints = ("--config.save_every=6", "--config.max_to_keep=9")
    flags = (*MESH, epochs, *checkpoints, f"--coordinator=localhost:{free_port()}", "--num_processes=2")
    other = start(workdir, *flags, "--process_id=1", devices=4)
    printed = finish(start(workdir, *flags, "--process_id=0", devices=4))
    assert "20 epochs of 8 lines are 20 steps" in printed
    assert "step 20/20" in printed and "step 1/20" not in finish(other)  # only one of them speaks
    return workdir


def test_two_processes_of_four_devices(on_two_processes: Path, on_one_device: np.ndarray) -> None:
    np.testing.assert_allclose(curve(on_two_processes), on_one_device, rtol=1e-5, atol=0)


def test_a_run_resumes_on_other_hardware(tmp_path: Path, on_two_processes: Path, on_one_device: np.ndarray) -> None:
    """Twelve steps on two processes of four devices, and eight on one device."""
    shutil.copytree(on_two_processes, tmp_path, dirs_exist_ok=True)
    for step in ("18", "20"):
        shutil.rmtree(tmp_path / "checkpoints" / step)
    assert "resumed from step 12" in finish(start(tmp_path))
    np.testing.assert_allclose(curve(tmp_path), on_one_device, rtol=1e-5, atol=0)
