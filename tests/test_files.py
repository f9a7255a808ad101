"""Paths, locks of outputs, atomic writes, and the cache directory."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tarsier_jax.errors import InputError
from tarsier_jax.files import atomic_write, cache_directory, check_local, locked, path_text


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("gs://bucket/out.jsonl", "tool of gs://"),
        ("S3://bucket/out.jsonl", "tool of s3://"),
        (" gs://bucket/out.jsonl", "tool of gs://"),
        ("gs:/bucket/out.jsonl", "tool of gs://"),
        ("file:///data/out.jsonl", "without file://"),
        ("hf://org/name", "pass org/name"),
        ("https://huggingface.co/org/name", "pass org/name"),
    ],
)
def test_a_url_is_no_path(text: str, remedy: str) -> None:
    with pytest.raises(InputError, match=f"--output {text} is a URL; only local paths.*{remedy}"):
        check_local("--output", text)
    with pytest.raises(argparse.ArgumentTypeError, match="is a URL"):
        path_text(text)


def test_local_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    for text in ("out.jsonl", "../out#1 b%20c?.jsonl", "org/name", "c:/x", "a:b"):
        assert check_local("--output", text) == text
    assert check_local("--output", "~/out.jsonl") == "/home/ann/out.jsonl"
    with pytest.raises(InputError, match="--output is empty"):
        check_local("--output", "")


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    output, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(output)
    with locked(output):
        for name in (output, tmp_path / "x" / ".." / "out.jsonl", link):
            with pytest.raises(InputError, match=r"Another run is writing .*\.jsonl\. Wait"), locked(name):
                pass
        with locked(tmp_path / "other.jsonl"):
            pass
    with locked(output):
        pass
    assert list(tmp_path.iterdir()) == [link]


def test_a_lock_inside_a_directory(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with locked(out, inside=True), pytest.raises(InputError, match="Another run"), locked(out, inside=True):
        pass
    assert list(out.iterdir()) == []


@pytest.mark.slow
def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    program = (
        "import os, sys, signal, pathlib; from tarsier_jax.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('locked', flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "out")], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"locked\n"
        with pytest.raises(InputError, match="Another run"), locked(tmp_path / "out"):
            pass
        process.kill()
    assert (tmp_path / ".out.lock").exists()
    with locked(tmp_path / "out"):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match=r"out cannot be locked \(Function not implemented\)") as warned:
        for _ in range(2):
            with locked(tmp_path / "out"):
                pass
    assert len(warned) == 1


def test_devices_have_no_lock() -> None:
    with locked(Path("/dev/null")), locked(Path("/dev/null")):
        assert not Path("/dev/.null.lock").exists()


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), locked(tmp_path / "file" / "out"):
        pass


def test_the_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_directory("xla") == tmp_path / "cache" / "tarsier_jax" / "xla"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # not to be used, as the specification says
    assert cache_directory("xla") == tmp_path / "home" / ".cache" / "tarsier_jax" / "xla"
    assert not recwarn
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # neither HOME nor an entry in /etc/passwd
    assert cache_directory("xla") is cache_directory("xla") is None
    (warning,) = recwarn
    assert "the user lacks a home directory" in str(warning.message)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_directory("xla") is None


def test_a_file_is_written_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_linked_file_is_replaced_behind_its_link(tmp_path: Path) -> None:
    link, target = tmp_path / "link.json", tmp_path / "target.json"
    link.symlink_to(target)
    with atomic_write(link) as partial:
        partial.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"


def test_a_full_disk_is_reported_with_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"No space left on device: .*scores\.json"),
        atomic_write(tmp_path / "scores.json"),
    ):
        raise OSError("UNKNOWN: ENOSPC while writing")
