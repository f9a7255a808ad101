"""A model laid out over eight devices answers as it does on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tarsier_jax.generation.decode import generate_batch
from tarsier_jax.generation.sampling import SamplingOptions
from tests import reference

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("form", ["stacked", "unstacked"])
def test_generation_over_eight_devices(tmp_path: Path, form: str) -> None:
    reference.make_reference(tmp_path, reference.TINY)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.mesh", str(tmp_path), form]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model = reference.load_ours(tmp_path)
    _, batch = reference.make_case("unlike samples", model.config)
    answers = generate_batch(model, batch, SamplingOptions(max_new_tokens=24), eos_ids=())
    assert json.loads(done.stdout.splitlines()[-1]) == [answer.tokens for answer in answers]
