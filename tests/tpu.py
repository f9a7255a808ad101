"""Programs that compile for TPU slices, started as a user starts them."""

import os
import subprocess
import sys


def run(module: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Runs a program with the compiler's least effort for speed, which halves its time.

    The effort also changes the memory: the 7B's training step has 0.24 GiB more temporaries at the default.
    """
    command = [sys.executable, "-m", module, *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
