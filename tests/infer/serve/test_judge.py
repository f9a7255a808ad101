"""The server as the judge of eval.score."""

import functools
from pathlib import Path

import pytest

from eval.score import main, parse
from tarsier_jax.programs import run
from tests.eval.rows import row
from tests.eval.test_predictions import write
from tests.infer.serve.stub import RunningServer, StubEngine

VERDICT = "{'pred': 'yes', 'score': 4}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def score(server: RunningServer, directory: Path) -> None:
    """Scores two answers to open questions."""
    rows = [row("MSVD-QA-val", i, "a dog", "a cat", prompt="Who barks?", question="Who barks?") for i in range(2)]
    predictions = write(directory / "predictions" / "p.jsonl", *rows)
    flags = ["--predictions", str(predictions), "--benchmarks", "msvd-qa", "--judge", f"{server.url}/v1"]
    assert run(functools.partial(main, parse(flags))) == 0


def test_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunningServer(StubEngine(text=VERDICT, once=True)) as server:
        score(server, tmp_path)
    assert "100.0" in capsys.readouterr().out


def test_answers_that_are_no_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The requests are accepted; the samples count as failed."""
    with RunningServer(StubEngine()) as server:
        score(server, tmp_path)
        assert server.service.error is None
    assert "2 judge failed" in capsys.readouterr().out
