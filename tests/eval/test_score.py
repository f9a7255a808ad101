"""`python -m eval.score`: the goldens of the original, and inputs that stop the original."""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.report import read_scores
from eval.score import main, parse
from tarsier_jax.programs import run
from tests.eval.rows import row
from tests.eval.scripted import GOLDENS, load_module, scripted_judge
from tests.eval.test_predictions import write

CHECK = load_module("check")
CASES = sorted(path.parent for path in GOLDENS.glob("*/case.json"))
REFUSALS = json.loads((GOLDENS / "refusals.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def score(predictions: Path, *flags: str) -> int:
    """Runs the program; returns its exit status."""
    args = parse(["--predictions", str(predictions), *flags])
    return run(functools.partial(main, args))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_records_and_samples_equal_the_original(case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = json.loads((case / "case.json").read_text(encoding="utf-8"))
    predictions = shutil.copytree(case / "predictions", tmp_path / "predictions")
    target, output = predictions / meta.get("single", ""), tmp_path / "output"
    with contextlib.ExitStack() as stack:
        flags = ["--benchmarks", *meta["benchmarks"], "--output", str(output)]
        if "judge" in meta:
            table = json.loads((case / meta["judge"]).read_text(encoding="utf-8"))
            judge = stack.enter_context(scripted_judge(table))
            flags += ["--judge", judge.url]
        assert score(target, *flags) == 0
        assert "judge" not in meta or judge.table.unmatched == 0
    out, err = capsys.readouterr()
    assert CHECK.compare(case, output, predictions, out) == [] and "Traceback" not in err
    check_samples(case, output)


def check_samples(case: Path, output: Path) -> None:
    """Checks every sample's figures against those of the original."""
    records = [record for stored in read_scores(output).values() for record in stored.samples]
    samples = {record["idx"]: record for record in records if record["prediction"] is not None}
    lines = (case / "expected" / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    for expected in map(json.loads, lines):
        record = samples.pop(expected["idx"])
        values = record["values"]
        if "correct" in expected:
            assert (record["details"]["letter"] is not None) == expected["success"]
            assert bool(record["strict"]["accuracy"]) == expected["correct"]
        elif "pred" in expected or "recall" in expected or not expected.get("success", True):
            assert bool(values) == expected["success"]
        if values and "recall" in expected:
            assert values == {name: expected[name] for name in ("recall", "precision")}
            assert record["details"]["hit_num_recall"] == expected["hits_recall"]
            assert record["details"]["hit_num_precision"] == expected["hits_precision"]
        elif values and "pred" in expected:
            assert values == {"accuracy": float(expected["pred"] == "yes"), "score": expected["score"]}
        elif values and "score" in expected:
            assert values["cider"] == pytest.approx(expected["score"], abs=1e-12)
    assert not samples


@pytest.mark.slow
def test_the_check_of_the_goldens(tmp_path: Path) -> None:
    """The check that comes with the goldens, over the program as users start it."""
    command = (
        f"{sys.executable} -m eval.score --predictions {{predictions}} --benchmarks {{benchmarks}} "
        f"--output {{output}} --judge {{judge}} --judge_cache {tmp_path}/replies.sqlite"
    )
    root = Path(__file__).parents[2]
    line = [sys.executable, str(GOLDENS / "check.py"), str(GOLDENS), "--cwd", str(root), "--command", command]
    process = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.splitlines()[-1] == f"{len(CASES)} cases, 0 fall short"


QUESTIONS = {"rows": [{"needs": ["a dog", "dog", "Q"], "replies": [{"text": "{'pred': 'yes', 'score': 5}"}]}]}
# Inputs that stop the original, or make it print a wrong figure: the exit status, and a text on the screen.
OUTCOMES = {
    "no reference": (1, "p.jsonl line 2 (TVBench/One, idx 2) has no reference"),
    "every answer invalid": (0, "No answer is valid in TVBench/One, TVBench/Two"),
    "a blank line": (0, "|   One   |  100.0   |    2    |   0    |"),
    "a cut last line": (1, "p.jsonl line 2 is not JSON"),
    "rows of v1 under the Tarsier2 code": (0, "| Next-QA-val-multi_choice |  100.0   |    1    |   0    |"),
    "rows of Tarsier2 under the v1 code": (0, "| Next-QA-val-multi_choice |  100.0   |    1    |   0    |"),
    "no rows of the benchmark": (1, "contains no row of MVBench. Its rows are of TVBench (1 rows)"),
    "open question under the Tarsier2 code": (0, "Rows have no question: the judge receives the prompt"),
    "several references under the Tarsier2 code": (0, "1 scored"),
    "Video-MME without idx in extra_info, Tarsier2 code": (0, "100.0%"),
    "Video-MME with an unknown task": (0, "100.0%"),
    "v1 subtask of one word": (0, "|    C    |  100.0   |    1    |   0    |"),
    "DREAM without counts for the buckets": (0, "A sample has no n_subjects or n_shots or n_events"),
    "DREAM, every sample fails": (0, "1 judge failed"),
    "no text in the answer": (0, "0 scored"),
    "duplicates with other answers": (0, "Repeated rows with another answer (the first row counts): 2."),
}


@pytest.mark.parametrize("case", REFUSALS["cases"], ids=[case["name"] for case in REFUSALS["cases"]])
def test_inputs_that_stop_the_original(
    case: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, lines in case["files"].items():
        write(tmp_path / "predictions" / name, *lines)
    flags = ["--benchmarks", *case["benchmarks"], "--output", str(tmp_path / "output")]
    if case["name"] == "unknown benchmark":
        with pytest.raises(SystemExit, match="2"):
            score(tmp_path / "predictions", *flags)
        assert "There is no benchmark tvbensh. Use tvbench" in capsys.readouterr().err
        return
    questions = {
        "rows": [{"name": "q", "needs": ["a dog", "dog", "Q"], "replies": [{"text": "{'pred': 'yes', 'score': 5}"}]}]
    }
    with scripted_judge(questions if case["benchmarks"] == ["msvd-qa"] else REFUSALS["judge"]) as judge:
        status, text = OUTCOMES[case["name"]]
        assert score(tmp_path / "predictions", *flags, "--judge", judge.url, "--judge_retries", "1") == status
    out, err = capsys.readouterr()
    assert text in (out if status == 0 else err) and "Traceback" not in err


def test_half_of_the_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("EgoSchema", i, "A", "A") for i in range(250)]
    assert score(write(tmp_path / "p.jsonl", *rows), "--benchmarks", "egoschema") == 0
    out = capsys.readouterr().out
    assert "500 samples: 250 scored, 0 unreadable, 0 judge failed, 250 missing" in out
    summary = read_scores(tmp_path)["egoschema"].summary
    assert summary["figures"] == {"Accuracy": 100} and summary["strict_figures"] == {"Accuracy": 50}


def test_a_benchmark_that_cannot_be_scored_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row("EgoSchema", 1, "A", ""), row("TVBench/One", 1, "A", "A"), row("DREAM/youtube", 1, "a", "b")]
    path = write(tmp_path / "p.jsonl", *rows)
    assert score(path, "--benchmarks", "egoschema", "dream", "tvbench") == 1
    out, err = capsys.readouterr()
    assert "error: egoschema: " in err and "error: dream: the metric needs a judge. Pass --judge URL" in err
    assert "The score sheet is" in out and list(read_scores(tmp_path)) == ["tvbench"]


def test_annotations_show_missing_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("TVBench/Three", i, "A", "A") for i in range(3)]
    path = write(tmp_path / "predictions" / "p.jsonl", *rows[:2])
    write(tmp_path / "annotations" / "TVBench.jsonl", *rows)
    assert score(path, "--benchmarks", "tvbench", "--annotations", str(tmp_path / "annotations")) == 0
    assert "3 samples: 2 scored, 0 unreadable, 0 judge failed, 1 missing" in capsys.readouterr().out


def test_scoring_again_needs_no_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = json.loads((GOLDENS / "dream-v1" / "judge.json").read_text(encoding="utf-8"))
    flags = ["--benchmarks", "dream", "--judge_model", "m", "--output"]
    with scripted_judge(table) as judge:
        flags = ["--judge", judge.url, *flags]
        assert score(GOLDENS / "dream-v1" / "predictions", *flags, str(tmp_path / "first")) == 0
    assert score(GOLDENS / "dream-v1" / "predictions", *flags, str(tmp_path / "second")) == 0
    assert "The judge: 0 replies (0 + 0 tokens), 21 cached replies." in capsys.readouterr().out
    first, second = (read_scores(tmp_path / name)["dream"] for name in ("first", "second"))
    assert first.samples == second.samples
    other = ["--judge_cache", str(tmp_path / "other.sqlite")]
    assert score(GOLDENS / "dream-v1" / "predictions", *flags, str(tmp_path / "third"), *other) == 1
    assert "cannot be reached" in capsys.readouterr().err
