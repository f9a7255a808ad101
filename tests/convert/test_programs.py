"""The three conversion programs as processes: their output and their failures."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from convert import verify
from tarsier_jax.weights.quantize import Int8
from tests.weights.conftest import bits
from train.debug_data import TINY
from train.untrained import write_untrained

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained(tmp_path_factory.mktemp("convert") / "random", TINY)


def call(program: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"convert.{program}", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False
    )


def test_there_and_back(checkpoint: Path, tmp_path: Path) -> None:
    there = call("hf_to_orbax", checkpoint, tmp_path / "orbax")
    assert there.returncode == 0, there.stderr
    assert re.search(r"orbax: 58 tensors, \d+\.\d+ GB in .* s, peak memory .* GiB\n$", there.stdout)
    assert "GB/s" in there.stderr
    back = call("orbax_to_hf", tmp_path / "orbax", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    assert bits(tmp_path / "back") == bits(checkpoint)


def test_verify_against_transformers(checkpoint: Path) -> None:
    done = call("verify", checkpoint, "--max_new_tokens", 12)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.startswith((" ", "\t"))}
    for probe in ("image", "video", "text"):
        name, tokens, *differences, kl, agreement = rows[probe]
        assert int(tokens) > 100
        assert all(float(x) < 1e-4 for x in differences if x != "-")
        assert abs(float(kl)) < 1e-6
        assert agreement == "100.0%"
        assert f"{name}: equal" in done.stdout


def test_verify_between_two_directories(checkpoint: Path, tmp_path: Path) -> None:
    call("hf_to_orbax", checkpoint, tmp_path / "orbax")
    same = call("verify", checkpoint, tmp_path / "orbax", "--max_new_tokens", 4)
    assert same.returncode == 0, same.stderr
    assert same.stdout.count("0.0e+00") >= 8


@pytest.fixture
def short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """One short text in place of the probes."""
    text = {"messages": [{"role": "user", "content": "Which comes first?"}]}
    monkeypatch.setattr(verify, "probes", lambda processor: [("text", processor(text))])


@pytest.mark.usefixtures("short_probe")
def test_verify_finds_other_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_untrained(tmp_path / "other", TINY, seed=1)
    monkeypatch.setattr(sys, "argv", ["verify", str(checkpoint), str(other), "--max_new_tokens", "12"])
    assert verify.main() == 1
    assert "DIFFERENT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("int8", "label"), [(True, "weights in int8"), ("w8a8", "weights and the inputs of products in int8")]
)
@pytest.mark.usefixtures("short_probe")
def test_verify_int8(checkpoint: Path, int8: Int8, label: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The divergence from the same weights in bfloat16."""
    assert verify.verify(str(checkpoint), None, "bfloat16", int8=int8, max_new_tokens=2) == 0
    stdout = capsys.readouterr().out
    assert f"({label}, bfloat16)" in stdout
    (row,) = (line.split() for line in stdout.splitlines() if line.split()[:1] == ["text"])
    assert 0 < float(row[-2]) < 1e-2


@pytest.mark.parametrize("program", ["hf_to_orbax", "orbax_to_hf"])
def test_errors_are_short(program: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = call(program, tmp_path / "empty", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert call(program, tmp_path / "empty").returncode == 2
