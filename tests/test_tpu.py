"""The 7B model compiles for a TPU slice, on a machine without one."""

import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def test_the_engines_programs_of_the_7b_fit_eight_v5e_chips() -> None:
    """data=2 x tensor=4, splash attention: 32 slots of 12,288 tokens a data-parallel part, below 15 GiB a chip."""
    command = [sys.executable, "-m", "benchmarks.tpu_memory"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if " total " in line}
    assert set(lines) == {"encode_frames", "prefill_into_slots", "decode_slots"}
    for line in lines.values():
        sizes = re.search(r"temporaries +([\d.]+) .*total +([\d.]+) GiB", line)
        assert sizes is not None
        assert 8.5 < float(sizes[2]) < 15  # a quarter of the weights is 3.5 GiB, of the slots' cache 5.25
        assert float(sizes[1]) < 1  # so nothing copies or gathers the cache
    assert all(
        "(1 splash kernels" in lines[name] for name in ("encode_frames", "prefill_into_slots")
    )  # the scanned layer of each tower
