"""The engine's programs compile for an H100, on a machine without one.

Needs jax-cuda12-plugin and jax-cuda12-pjrt of jaxlib's version. The Makefile installs them in a directory of their own:
in the environment, each start of JAX would search for a driver.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = Path(sys.prefix) / "cuda"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda12_plugin") is None and not COMPILER.is_dir(),
        reason="needs jax-cuda12-plugin; `make .venv/.cuda-compiler`",
    ),
]


def test_no_program_copies_the_cache() -> None:
    """Of the 7B, each of whose 28 layers has 336 MiB of keys and as many of values.

    With a stacked cache, four layers of `decode_slots` had 2.7 GiB of temporaries, since it transposed the keys and
    values. With the keys and values of all layers of a row, `prefill_into_slots` had 1.2 GiB.
    """
    command, paths = [sys.executable, "-m", "tests.h100"], [str(COMPILER), *filter(None, [os.getenv("PYTHONPATH")])]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    prefill = {"prefill_into_slots", "prefill_into_slots of one prompt"}
    assert set(figures) == {"encode_frames", "decode_slots", "extend_slots", *prefill}
    assert all(program["largest_copy"] < 100 * 2**20 for program in figures.values()), figures
    assert figures["decode_slots"]["temporaries"] < 0.1
    assert 1 < figures["decode_slots"]["moved"] < 1.1  # once, and the parts of split sums
    assert all(program["temporaries"] < 0.5 for program in figures.values()), figures
