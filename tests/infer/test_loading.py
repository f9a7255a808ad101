"""Worker processes end with their program, however that ends; a program whose worker is killed says so."""

import json
import os
import signal
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


def test_a_killed_worker(gif: Path, tmp_path: Path) -> None:
    """By the system, for lack of memory: the program says so and ends, where it would wait for it for ever."""
    source, output = tmp_path / "list.jsonl", tmp_path / "out.jsonl"
    source.write_text(f"{json.dumps(str(gif))}\n" * 5000)
    flags = ["--input", str(source), "--output", str(output), "--max_new_tokens", "4", "--slots", "4", "--workers", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "infer.caption", *flags], stderr=subprocess.PIPE, text=True
    ) as program:
        while not (output.exists() and output.stat().st_size):
            assert program.poll() is None
            time.sleep(0.1)
        (worker,) = workers_of(program.pid)
        os.kill(worker, signal.SIGKILL)
        _, err = program.communicate(timeout=120)
    assert program.returncode == 1
    assert "A process that decodes clips was killed (exit code -9" in err and "Traceback" not in err


def workers_of(pid: int) -> list[int]:
    """Linux: the processes that it spawned to decode, without Python's tracker of resources."""
    children = [child for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
