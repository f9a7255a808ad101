"""Conversion of a checkpoint against a copy of its files: seconds and peak memory, in one run.

    python -m benchmarks.convert

The checkpoint is random bfloat16 of Qwen2-VL-2B's geometry (4.4 GB, tied embeddings). Memory is the peak of a fresh
process minus its memory after the imports. The goals are at most 1 GB plus three times the largest tensor, and at most
twice the seconds of a copy. Both flush their files to the disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from tarsier_jax.config import ModelConfig, Qwen2VisionConfig, TextConfig
from tarsier_jax.families.qwen2_vl import config_json
from tarsier_jax.weights.export import Entry, write_shards
from tarsier_jax.weights.names import parameters

CONFIG = ModelConfig(
    text=TextConfig(151_936, 1536, 8960, num_heads=12, num_kv_heads=2, tie_embeddings=True),
    vision=Qwen2VisionConfig(out_dim=1536),
)

# The program of a separate process, for the measurement of its memory.
CHILD = """
import logging, re, sys, time
from pathlib import Path
from tarsier_jax.weights.streaming import convert_hf
logging.getLogger("absl").setLevel(logging.ERROR)
# The kernel's peak of this program; getrusage would include the parent's.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])
before, start = peak(), time.perf_counter()
convert_hf(Path(sys.argv[1]), Path(sys.argv[2]))
print(time.perf_counter() - start, before, peak())
"""


def write_checkpoint(directory: Path) -> tuple[int, int]:
    """Writes random weights. Returns their bytes and those of the largest tensor."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_json(CONFIG, "qwen2_vl")), encoding="utf-8")
    rng, dtype = np.random.default_rng(0), np.dtype(jnp.bfloat16)
    entries = []
    for parameter in parameters(CONFIG, "qwen2_vl"):
        shape = parameter.tensor_shape

        def random(shape: tuple[int, ...] = shape) -> np.ndarray:
            return rng.integers(0, 2**15, int(np.prod(shape)), np.uint16).view(dtype).reshape(shape)

        entries += [Entry(name, shape, dtype, random) for name in parameter.names]
    write_shards(directory, entries)
    return sum(entry.nbytes for entry in entries), max(entry.nbytes for entry in entries)


def time_copy(source: Path, out: Path) -> float:
    start = time.perf_counter()
    shutil.copytree(source, out)
    os.sync()
    return time.perf_counter() - start


def time_conversion(source: Path, out: Path) -> tuple[float, int, int]:
    """Returns seconds, and bytes of memory before the conversion and at the peak."""
    command = [sys.executable, "-c", CHILD, str(source), str(out)]
    process = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, check=True)
    seconds, before, peak = process.stdout.split()[-3:]
    return float(seconds), int(before), int(peak)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workdir", help="directory for 13 GB of temporary files (default: the system's)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.workdir) as name:
        work = Path(name)
        total, largest = write_checkpoint(work / "hf")
        limit = 1e9 + 3 * largest
        print(f"{total / 1e9:.2f} GB, the largest tensor {largest / 1e9:.2f} GB")
        ratios = []
        for number in range(1, args.rounds + 1):
            copied = time_copy(work / "hf", work / "copy")
            seconds, before, peak = time_conversion(work / "hf", work / "orbax")
            ratios.append(seconds / copied)
            print(
                f"round {number}: copy {copied:5.1f} s   convert {seconds:5.1f} s   ratio {ratios[-1]:4.2f}   "
                f"memory {before / 1e9:.2f} GB after imports, {(peak - before) / 1e9:.2f} GB above that at the peak "
                f"(limit {limit / 1e9:.2f})",
                flush=True,
            )
            for path in (work / "copy", work / "orbax"):
                shutil.rmtree(path)
        print(f"median ratio {np.median(ratios):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
