"""Worker processes end with their program, however that ends."""

import subprocess
import sys
import time
from pathlib import Path


def lives(pid: int) -> bool:
    """Linux: there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_end_with_a_killed_program(gif: Path) -> None:
    """Else each `kill -9` of a long run would leave some behind, with what they hold in memory."""
    command = [sys.executable, "-m", "tests.infer.orphan", str(gif)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        workers = [int(pid) for pid in program.stdout.readline().split()]
        assert workers and all(map(lives, workers))
        program.kill()
    end = time.monotonic() + 20
    while any(map(lives, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(lives, workers))
