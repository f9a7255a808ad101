"""A model laid out over eight devices answers as it does on one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tarsier_jax.generation.decode import generate_batch
from tarsier_jax.generation.sampling import SamplingOptions
from tests import reference
from tests.devices import simulated_devices

pytestmark = pytest.mark.slow


def test_generation_over_eight_devices(tmp_path: Path) -> None:
    """With stacked layers, and with unstacked ones."""
    reference.make_reference(tmp_path, reference.TINY)
    command = [sys.executable, "-m", "tests.mesh", str(tmp_path)]
    done = subprocess.run(command, env=simulated_devices(8), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model = reference.load_ours(tmp_path)
    _, batch = reference.make_case("unlike samples", model.config)
    answers = generate_batch(model, batch, SamplingOptions(max_new_tokens=24), eos_ids=())
    expected = [answer.tokens for answer in answers]
    assert json.loads(done.stdout.splitlines()[-1]) == {"stacked": expected, "unstacked": expected}
