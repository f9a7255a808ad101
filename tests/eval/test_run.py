"""`python -m eval.run`: predictions, tables and scores.json, and errors in one line."""

import functools
import json
from pathlib import Path

import pytest

from eval.run import main, parse
from tarsier_jax.errors import InputError
from tarsier_jax.programs import run
from tests.eval.benchmarks import Oracle, reference_of
from train.micro.checkpoint import MICRO
from train.untrained import write_untrained


def flags(output: Path, *more: str) -> list[str]:
    return ["--benchmarks", "shapes", "shapes-qa", "--output", str(output), *more]


@pytest.mark.slow
def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows nothing scores nothing in descriptions. Started again, the program generates nothing."""
    model = write_untrained(tmp_path / "model", MICRO)
    output = tmp_path / "output"
    args = parse(flags(output, "--model", str(model), "--limit", "2"))
    assert main(args) == 0
    report = json.loads((output / "scores.json").read_text())
    assert [row["f1"] for row in report["scores"]["shapes"].values()] == [0.0] * 6
    assert report["scores"]["shapes-qa"]["OVERALL"]["samples"] == 2 and report["model"] == str(model)
    out, err = capsys.readouterr()
    assert "Shapes/held_out" in out and "OVERALL" in out and "shapes: " in err
    predictions = [(output / f"{name}.jsonl").read_bytes() for name in ("shapes", "shapes-qa")]
    engine = Oracle(reference_of)
    monkeypatch.setattr("eval.evaluation.Engine", lambda *_: engine)
    assert main(args) == 0 and capsys.readouterr().out == out and not engine.samples
    assert [(output / f"{name}.jsonl").read_bytes() for name in ("shapes", "shapes-qa")] == predictions
    with pytest.raises(InputError, match=r"contains predictions with .* Choose another --output"):
        main(parse(flags(output, "--model", str(model), "--dtype", "bfloat16")))


def test_bad_limit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        main(parse(flags(tmp_path, "--limit", "0")))


def test_unknown_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["--benchmarks", "shapes", "shape", "--output", str(tmp_path)])
    assert "invalid choice: 'shape' (choose from " in capsys.readouterr().err


def test_missing_model_and_unwritable_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for output, model, message in (
        (tmp_path / "output", str(tmp_path / "missing"), "missing"),
        (tmp_path / "file", "embedded", "file"),
    ):
        assert run(functools.partial(main, parse(flags(output, "--model", model)))) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
    assert not (tmp_path / "output" / "settings.json").exists()  # the next run may name another model
