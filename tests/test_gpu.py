"""The engine's programs compile for an H100, on a machine without one.

Needs jax-cuda12-plugin and jax-cuda12-pjrt of jaxlib's version, installed with `pip install --no-deps`.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs jax-cuda12-plugin"),
]


def test_no_program_copies_the_cache() -> None:
    """Of four layers of the 7B, each with 336 MiB of keys and as many of values.

    With a stacked cache, `decode_slots` had 2.7 GiB of temporaries, since it transposed the keys and values.
    """
    command = [sys.executable, "-m", "tests.h100"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures) == {"encode_frames", "prefill_into_slots", "decode_slots", "extend_slots"}
    assert all(program["largest_copy"] < 100 * 2**20 for program in figures.values()), figures
    assert figures["decode_slots"]["temporaries"] < 0.1
    assert 1 < figures["decode_slots"]["moved"] < 1.1  # once, and the parts of split sums
    assert figures["extend_slots"]["temporaries"] < 0.5
    assert figures["encode_frames"]["temporaries"] < 0.5
    assert figures["prefill_into_slots"]["temporaries"] < 0.8  # of the MLP for 2,560 tokens, and the keys of the row
