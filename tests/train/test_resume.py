"""A run that is killed or terminated resumes with the same numbers as an uninterrupted one."""

import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.programs import curve, finish, start, weights
from tests.train.test_checkpoints import flip, largest_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted")
    printed = finish(start(workdir))
    assert "0 compilations after step 2" in printed
    return workdir


def interrupt(process: Any, workdir: Path, after: int, how: signal.Signals) -> None:
    """Sends the signal once the run has logged `after` steps."""
    deadline = time.monotonic() + 600
    while len(curve(workdir)) < after:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)


def assert_same_run(workdir: Path, other: Path) -> None:
    assert curve(workdir) == curve(other)  # bit for bit: JSON holds every digit
    ours, theirs = weights(workdir), weights(other)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_killed_twice(tmp_path: Path, uninterrupted: Path) -> None:
    for after in (5, 13):
        process = start(tmp_path)
        interrupt(process, tmp_path, after, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    printed = finish(start(tmp_path))
    assert re.search(r"resumed from step \d+", printed)
    assert_same_run(tmp_path, uninterrupted)


def test_signals_lose_no_step(tmp_path: Path, uninterrupted: Path) -> None:
    """Each start decodes with another number of threads."""
    last = "0"
    for number, after, status, workers in ((signal.SIGTERM, 4, 143, 1), (signal.SIGINT, 11, 130, 3)):
        process = start(tmp_path, "--config.save_every=0", f"--config.data.num_workers={workers}")
        interrupt(process, tmp_path, after, number)
        printed = finish(process, status)
        stopped = re.search(r"stopped at step (\d+)", printed)
        assert stopped is not None and int(stopped[1]) >= after
        assert (tmp_path / "checkpoints" / stopped[1]).is_dir()
        assert last == "0" or f"resumed from step {last}" in printed
        last = stopped[1]
    printed = finish(start(tmp_path))
    assert f"resumed from step {last}" in printed and "config.data.num_workers was 3 and is now 2" in printed
    assert_same_run(tmp_path, uninterrupted)


def test_a_checkpoint_cut_short_or_damaged_is_not_loaded(tmp_path: Path, uninterrupted: Path) -> None:
    """Orbax renames a checkpoint when it is complete; an interrupted save has another name."""
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    whole, damaged = (tmp_path / "checkpoints" / step for step in ("18", "20"))
    shutil.copytree(whole, tmp_path / "checkpoints" / "19.orbax-checkpoint-tmp")
    flip(largest_file(damaged / "state"), size=100)
    printed = finish(start(tmp_path))
    assert "20 is damaged" in printed and printed.count("is damaged") == 1 and "resumed from step 18" in printed
    assert (tmp_path / "checkpoints" / "20.damaged").is_dir()
    assert_same_run(tmp_path, uninterrupted)


def test_a_workdir_of_another_model(tmp_path: Path, uninterrupted: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run.json"
    run.write_text(run.read_text().replace('"num_layers": 2', '"num_layers": 4'))
    printed = finish(start(tmp_path), status=1)
    assert "belongs to another run: text was" in printed and "another --workdir" in printed
