"""The engines of the models compile for TPU slices, on a machine without one."""

import json
import os
import re

import pytest

from tests import tpu

pytestmark = pytest.mark.slow


def compile_programs(*flags: str) -> str:
    """Returns the output of `benchmarks.tpu_memory`."""
    done = tpu.run("benchmarks.tpu_memory", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def memory(output: str) -> dict[str, tuple[float, float, int]]:
    """Returns temporaries and total in GiB per chip, and the number of splash kernels, of each program. All fit."""
    sizes = re.findall(
        r"^(\w+) .*temporaries +([\d.]+) .*total +([\d.]+) GiB per chip, FITS +\((\d+) splash", output, re.M
    )
    assert [name for name, *_ in sizes] == ["encode_frames", "prefill_into_slots", "decode_slots", "extend_slots"]
    return {name: (float(temporaries), float(total), int(kernels)) for name, temporaries, total, kernels in sizes}


def test_the_engines_programs_of_the_7b_fit_eight_v5e_chips() -> None:
    """data=2 x tensor=4, splash attention: 32 slots of 12,288 tokens a data-parallel part, below 15 GiB a chip."""
    output = compile_programs()
    programs = memory(output)
    for temporaries, total, _ in programs.values():
        assert 8.5 < total < 15  # a quarter of the weights is 3.5 GiB, of the slots' cache 5.25
        assert temporaries < 0.5  # so nothing copies or gathers the cache
    for name in ("encode_frames", "prefill_into_slots"):
        assert programs[name][2] == 1  # the scanned layer of each tower
    (moved,) = re.findall(r"a step moves \S+ GB, (\S+) times the weights and the cache", output)
    assert 1 <= float(moved) < 1.2
    collectives = dict(re.findall(r"^(\w+) .*\n  collectives: (.*)", output, re.M))
    # Devices exchange the parameters of the tower, 0.88 GiB, and the features; neither activations nor all patches.
    vision = re.fullmatch(r"all-gather \d+ \((\S+) GiB\)", collectives["encode_frames"])
    assert vision is not None and float(vision[1]) < 1, collectives
    # Two sums of 11,776 tokens in each layer except the last, which computes only keys and values: 27 x 0.118 GiB, as
    # each device receives its part of the tokens. Only embeddings are summed on all devices.
    sent = {
        kind: float(size) for kind, size in re.findall(r"(\S+) \d+ \((\S+) GiB\)", collectives["prefill_into_slots"])
    }
    assert sent["all-reduce"] < 0.1 and sent["reduce-scatter"] + sent["collective-permute"] < 3.6, sent


def test_no_program_copies_the_cache_or_the_activations_of_a_row() -> None:
    """Where a chip has several key-value heads, and with weights in int8.

    With heads as a dimension of the cache, the decoding step of chips with two of them moved six times as many bytes.
    With the keys and values of all layers of a row, prefill on one v6e had 0.8 GiB of temporaries.
    """
    done = tpu.run("tests.tpu_programs")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert len(figures) == 3
    for case in figures.values():
        assert 0.99 < case["moved"] < 1.05, figures
        assert len(case["temporaries"]) == 4 and max(case["temporaries"].values()) < 0.5, figures
        assert case["temporaries"]["decode_slots"] < 0.1, figures
    # Chips exchange the parameters of the tower, and no activations.
    assert [case["vision"] for case in figures.values()] == [[], ["all-gather"], []]


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
    output = compile_programs(*(f"--{name}={value}" for name, value in flags.items()))
    for temporaries, total, _ in memory(output).values():
        assert arrays < total and temporaries < 2.5
