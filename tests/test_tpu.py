"""The 7B model compiles for a TPU slice, on a machine without one."""

import os
import re
import subprocess
import sys


def test_prefill_and_decoding_of_the_7b_fit_eight_v5e_chips() -> None:
    """data=2 x tensor=4, splash attention in the prefill: 8 prompts of 16 frames and 10,240 tokens, below 15 GiB."""
    command = [sys.executable, "-m", "benchmarks.tpu_memory", "--topology", "v5e:2x4", "--data", "2", "--tensor", "4"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False
    )
    assert done.returncode == 0, done.stderr
    totals = {line.split()[0]: line for line in done.stdout.splitlines() if " total " in line}
    assert set(totals) == {"prefill", "decode"}
    for line in totals.values():
        found = re.search(r"total +([\d.]+) GiB", line)
        assert found is not None
        assert 3.5 < float(found[1]) < 15  # a quarter of the weights alone is 3.5 GiB
    assert "(2 splash kernels" in totals["prefill"]  # the scanned layer of each tower
