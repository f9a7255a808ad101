"""An engine laid out over eight devices answers as it does on one, and compiles nothing after its start."""

import json
import subprocess
import sys

import pytest

import tarsier_jax
from infer.engine import Engine
from tarsier_jax.weights import EMBEDDED
from tests.devices import simulated_devices
from tests.infer.engine import mesh

pytestmark = pytest.mark.slow


def test_over_eight_devices() -> None:
    command = [sys.executable, "-m", "tests.infer.engine.mesh"]
    done = subprocess.run(command, env=simulated_devices(8), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    model, processor = tarsier_jax.load(EMBEDDED, dtype="float32")
    assert told["answers"] == mesh.answers(Engine(model, processor, mesh.config(processor)))
    assert told["again"] == told["answers"] and told["reused"] > 0  # the same prompts, in the slots of the first run
    assert told["compilations"] == 0
