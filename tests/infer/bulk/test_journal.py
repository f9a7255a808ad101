"""A clip that was being decoded at two crashes is not decoded again; others are."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from infer import caption
from infer.bulk.journal import Journal
from tarsier_jax.errors import InputError

_BLOCKS: list[Any] = []  # a block that is collected would end


def begin(journal: Journal, *names: str) -> None:
    for name in names:
        _BLOCKS.append(journal.note(name))
        _BLOCKS[-1].__enter__()


def crash(output: Path, *names: str) -> None:
    """A run that ends while the clips are decoded: what it wrote stays, and nothing else is done."""
    begin(Journal(output), *names)


def captioned(names: Sequence[str], tmp_path: Path, times: int) -> tuple[list[int], dict[str, dict]]:
    """The exit statuses of runs of `tests.infer.crashing` one after another, and the lines by clip."""
    source, output = tmp_path / "list.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f'"{name}.mp4"\n' for name in names))
    command = [sys.executable, "-m", "tests.infer.crashing", str(times), str(source), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == len({line["input"] for line in lines})
    return json.loads(done.stdout), {line["input"].removesuffix(".mp4"): line for line in lines}


@pytest.mark.slow
def test_a_clip_that_crashes_the_decoder_gets_an_error_line(tmp_path: Path) -> None:
    """All others get captions, also those that were in progress at both crashes in other threads."""
    names = ["a", "slow-1", "crash", "slow-2", "b"]
    statuses, lines = captioned(names, tmp_path, 3)
    assert statuses == [-signal.SIGSEGV, -signal.SIGSEGV, 1]
    assert lines.keys() == set(names)
    for name in names:
        if name.startswith("crash"):
            assert f"{name}.mp4: decoding it ended the program 2 times. Convert the file" in lines[name]["error"]
        else:
            assert lines[name]["caption"] == f"{name}.mp4"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_run_is_no_crash(tmp_path: Path, number: int) -> None:
    former = signal.signal(number, signal.SIG_DFL)  # nohup starts the tests with SIGHUP ignored
    with pytest.raises(SystemExit) as ended, caption.signals_end(), Journal(tmp_path / "out.jsonl") as journal:
        begin(journal, "a")
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert ended.value.code == 128 + number and not list(tmp_path.iterdir())
    assert signal.signal(number, former) is signal.SIG_DFL


def test_suspects(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    crash(output, "a", "b", "c")
    journal = Journal(output)
    assert journal.suspects == {"a", "b", "c"}
    with journal.note("b"):
        pass
    assert journal.suspects == {"a", "c"}  # b is decoded
    begin(journal, "c")  # and c crashes again
    journal = Journal(output)
    assert journal.suspects == {"a"}
    with pytest.raises(InputError, match="c: decoding it ended the program 2 times"), journal.note("c"):
        raise AssertionError("is not decoded")
    assert Journal(output, overwrite=True).suspects == frozenset()


def test_ends_that_are_no_crashes(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    crash(output, "a")
    with pytest.raises(KeyboardInterrupt), Journal(output) as journal:
        begin(journal, "b")
        raise KeyboardInterrupt
    _BLOCKS.pop().__exit__(None, None, None)  # a thread ends later
    with Journal(output) as journal:
        assert journal.suspects == {"a"}  # is still to be tried
    assert Journal(output).suspects == frozenset()


def test_an_error_of_a_clip_is_no_crash(tmp_path: Path) -> None:
    with Journal(tmp_path / "out.jsonl") as journal:
        with pytest.raises(ValueError, match="damaged"), journal.note("a"):
            raise ValueError("damaged")
        assert json.loads((tmp_path / ".out.jsonl.journal").read_bytes()) == {"crashes": {}, "begun": []}


@pytest.mark.parametrize("content", [b"", b"\x00" * 9, b"[]", b'{"begun": 3}', b'{"crashes": {"a": "b"}, "begun": []}'])
def test_a_damaged_journal_is_empty(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".out.jsonl.journal").write_bytes(content)
    assert Journal(tmp_path / "out.jsonl").suspects == frozenset()


def test_a_shorter_line_over_a_longer_one(tmp_path: Path) -> None:
    """As a crash leaves it between the write and the cut."""
    (tmp_path / ".out.jsonl.journal").write_bytes(b'{"crashes": {}, "begun": ["a"]}\nbegun": ["a", "b"]}\n')
    assert Journal(tmp_path / "out.jsonl").suspects == {"a"}


def test_where_no_journal_can_be_written(tmp_path: Path) -> None:
    (tmp_path / ".out.jsonl.journal").mkdir()
    for output in (tmp_path / "out.jsonl", Path("/dev/null")):
        with Journal(output) as journal, journal.note("a"):
            pass
    assert not Path("/dev/.null.journal").exists()
