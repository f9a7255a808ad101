"""Two processes end together, with the reason of the one that failed, and agree on their settings."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.programs import free_port

pytestmark = pytest.mark.slow


def both(what: str, workdir: Path) -> list[tuple[int, str]]:
    """Exit status and output of each."""
    port = str(free_port())
    command = [sys.executable, "-m", "tests.train.processes"]
    processes = [
        subprocess.Popen(
            [*command, str(i), port, what, str(workdir)],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def test_unlike_settings_end_both(tmp_path: Path) -> None:
    first, second = both("unlike_settings", tmp_path)
    message = "config.num_train_steps is 6 in process 1 and 4 in process 0. Start all processes with the same flags"
    assert first[0] == second[0] == 1
    assert f"error: process 1: {message}" in first[1] and f"error: {message}" in second[1]


@pytest.mark.parametrize(
    ("what", "failing", "status", "reason"),
    [
        ("first_fails", 0, 1, "The annotations a.jsonl cannot be read."),
        ("second_is_interrupted", 1, 130, "It was interrupted."),
        ("mistake", 1, 1, "'x'"),
    ],
)
def test_the_reason_of_one_ends_both(tmp_path: Path, what: str, failing: int, status: int, reason: str) -> None:
    start = time.monotonic()
    results = both(what, tmp_path)
    assert results[failing][0] == status and results[1 - failing][0] == 1
    assert f"error: process {failing}: {reason}" in results[1 - failing][1]
    assert not any("Fatal" in output or "JaxRuntimeError" in output for _, output in results)
    assert ("KeyError" in results[failing][1]) == (what == "mistake")
    assert time.monotonic() - start < 40  # JAX notices the end of a process after 100 s


def test_both_go_back_to_the_checkpoint_before(tmp_path: Path) -> None:
    for i, (status, output) in enumerate(both("damage_seen_by_one", tmp_path)):
        assert status == 0, output
        assert f"restored 3 3.0 3 {6 + i} 3" in output  # process i has row i of two
        assert ("6 is damaged (" in output) == (i == 0)  # one of them prints it
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "6.damaged"]
