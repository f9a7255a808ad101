"""`benchmarks.accelerator` at its small size, and its exit status when attention is wrong."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import accelerator, attention_parity
from benchmarks.accelerator import Bench, Result, main


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity of packed samples alone, without gradients."""
    case = attention_parity.Case("packed", 1, 32, 32, 2, 1, 8, causal=True, segments=((20, 8),))
    monkeypatch.setattr(accelerator, "cases", lambda *_: [case])


@pytest.mark.slow
def test_every_row_has_a_figure(tmp_path: Path) -> None:
    """The parts that share a model run one after the other, and the file contains the table."""
    parts = ["ceilings", "prefill", "decode"]
    assert main(["--size", "small", "--parts", *parts, "--json", str(tmp_path / "results.json")]) == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert {row["part"] for row in results} == set(parts)
    assert all(row["value"] > 0 for row in results)
    assert all(row["of_measured"] > 0 for row in results if row["goal"])


@pytest.mark.usefixtures("one_case")
def test_right_attention_passes() -> None:
    assert main(["--size", "small", "--parts", "parity"]) == 0


@pytest.mark.usefixtures("one_case")
def test_attention_across_segments_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def without_segments(*args: Any, segment_ids: Any, **options: Any) -> Any:
        return right(*args, **options)

    right = attention_parity.attend
    monkeypatch.setattr(attention_parity, "attend", without_segments)
    assert main(["--size", "small", "--parts", "parity"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_part_that_raises_is_recorded_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bench: Bench) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(accelerator.PARTS, "vision", broken)
    monkeypatch.setitem(accelerator.PARTS, "clips", functools.partial(lambda bench: iter([Result("clips", "x", 1.0)])))
    assert main(["--size", "small", "--parts", "vision", "clips"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("FAILED" in line and "no such kernel" in line for line in lines)
    assert lines[-1].startswith("clips")
