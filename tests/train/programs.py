"""Runs of `python -m train.sft` as a user starts them, on simulated devices."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from tests.devices import simulated_devices

# A learning rate that moves the loss, both optimizers, a checkpoint every third step, rows of half the debug size's.
MUON = "--config.optimizer.muon_params=('decoder/layers/mlp/.*',)"
SETTINGS = (
    "--config.optimizer.peak_lr=1e-3",
    MUON,
    "--config.save_every=3",
    "--config.eval_every=0",
    "--config.data.seq_len=224",
)


def start(
    workdir: Path | str,
    *flags: str,
    devices: int = 1,
    program: str = "sft",
    recipe: str = "recap_7b",
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Starts the debug size of a recipe; returns the process."""
    command = [sys.executable, "-m", f"train.{program}", f"--config=configs/{recipe}.py:debug", f"--workdir={workdir}"]
    env = {**(simulated_devices(devices) if devices > 1 else os.environ), **(environment or {})}
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *SETTINGS, *flags], env=env, stdout=pipe, stderr=pipe, text=True)


def free_port() -> int:
    """A port for the first of several processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def finish(process: Any, status: int = 0) -> str:
    """Returns its output."""
    out, err = process.communicate(timeout=900)
    assert process.returncode == status, f"{out}\n{err}"
    return out + err


def curve(workdir: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm, of every step."""
    if not (workdir / "metrics.jsonl").exists():
        return []
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def weights(workdir: Path) -> dict[str, np.ndarray]:
    """Returns the trained model's parameters as stored on disk."""
    arrays = {}
    for path in sorted((workdir / "model" / "params").iterdir()):
        if (path / "zarr.json").exists():
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
            arrays[path.name] = ts.open(spec, read=True).result().read().result()
    assert len(arrays) > 20
    return arrays
