"""The engines of the models compile for TPU slices, on a machine without one."""

import os
import re

import pytest

from tests import tpu

pytestmark = pytest.mark.slow


def memory(*flags: str) -> dict[str, tuple[float, float, int]]:
    """Returns temporaries and total in GiB per chip, and the number of splash kernels, of each program. All fit."""
    done = tpu.run("benchmarks.tpu_memory", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    sizes = re.findall(
        r"^(\w+) .*temporaries +([\d.]+) .*total +([\d.]+) GiB per chip, FITS +\((\d+) splash", done.stdout, re.M
    )
    assert [name for name, *_ in sizes] == ["encode_frames", "prefill_into_slots", "decode_slots", "extend_slots"]
    return {name: (float(temporaries), float(total), int(kernels)) for name, temporaries, total, kernels in sizes}


def test_the_engines_programs_of_the_7b_fit_eight_v5e_chips() -> None:
    """data=2 x tensor=4, splash attention: 32 slots of 12,288 tokens a data-parallel part, below 15 GiB a chip."""
    programs = memory()
    for temporaries, total, _ in programs.values():
        assert 8.5 < total < 15  # a quarter of the weights is 3.5 GiB, of the slots' cache 5.25
        assert temporaries < 1  # so nothing copies or gathers the cache
    for name in ("encode_frames", "prefill_into_slots"):
        assert programs[name][2] == 1  # the scanned layer of each tower


# Each case takes a minute of CPU time.
OPTIONAL = pytest.mark.skipif("TARSIER_TPU_MEMORY" not in os.environ, reason="TARSIER_TPU_MEMORY is not set")
# Model, slice, tensor-parallel devices, slots per data-parallel part; GiB per chip of the weights and the slots' cache.
FIRST_TARSIER = [
    ("tarsier-34b", "v5e:4x4", 8, 24, 8.1 + 3.8),
    pytest.param("tarsier-34b", "v5p:2x2x2", 8, 64, 8.1 + 10.3, marks=OPTIONAL),
    pytest.param("tarsier-7b", "v5e:2x2", 4, 8, 3.2 + 5.5, marks=OPTIONAL),
]


@pytest.mark.parametrize(("model", "topology", "tensor", "slots", "arrays"), FIRST_TARSIER)
def test_the_first_tarsier_fits(model: str, topology: str, tensor: int, slots: int, arrays: float) -> None:
    """Prompts of 8 frames of 601 tokens."""
    flags = {"model": model, "topology": topology, "tensor": tensor, "slots": slots, "tokens": 5632}
    for temporaries, total, _ in memory(*(f"--{name}={value}" for name, value in flags.items())).values():
        assert arrays < total and temporaries < 2.5
