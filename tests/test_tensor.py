"""The head, the vision tower and prefill over a tensor axis of two devices equal those of one, with small transfers."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.devices import simulated_devices


@pytest.fixture(scope="module")
def comparisons() -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.tensor"]
    done = subprocess.run(command, env=simulated_devices(8), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_head_is_split_by_vocabulary(comparisons: dict[str, Any]) -> None:
    """Two devices have a half of the 128 rows each, whose halves of the 48 columns are gathered."""
    head = comparisons["head"]
    assert max(head["values"], head["gradients"]) < 1e-6
    gathered = [x for x in head["collectives"] if x.startswith("all-gather")]
    assert len(gathered) == 1 and "f32[64,48]" in gathered[0]


def test_the_vision_tower_is_split_by_bins(comparisons: dict[str, Any]) -> None:
    """Devices exchange parameters and the features of their bins, and no activations."""
    tower = comparisons["tower"]
    assert max(tower["values"], tower["gradients"]) < 1e-6
    assert {x.split()[0] for x in tower["collectives"]} == {"all-gather"}
    features = [x for x in tower["collectives"] if "f32[4,8,48]" in x]
    assert len(features) == 1


def test_prefill_is_split_by_tokens(comparisons: dict[str, Any]) -> None:
    """Before each product, devices gather the tokens of the others: 22 for attention, and 8, 8 and 6 for the MLP."""
    prefill = comparisons["prefill"]
    assert max(prefill["values"], prefill["gradients"]) < 1e-6
    gathered = [x.split()[1] for x in prefill["collectives"] if x.startswith("all-gather f32[1,")]
    sizes = ["f32[1,22,48]", "f32[1,2,4,48]", "f32[1,2,4,48]", "f32[1,2,3,48]", "f32[1,22,48]"]
    assert [x.partition("{")[0] for x in gathered] == sizes
