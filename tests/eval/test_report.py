"""Files of a run: complete, valid JSON, and read back without loss."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from eval.bootstrap import point_figures
from eval.metrics.scores import arrays_of
from eval.report import read_scores, screen_text, write_report
from tarsier_jax.errors import InputError
from tests.eval.scores import METRIC, benchmark_scores, random_scores, sample_score


def _valid_json(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not valid JSON")

    return json.loads(text, parse_constant=refuse)


def test_files_of_a_run(tmp_path: Path) -> None:
    write_report(tmp_path, [benchmark_scores(random_scores(30, ["Quiz/A", "Quiz/B"]))])
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "Quiz_eval_result.txt",
        "quiz.json",
        "quiz.png",
        "quiz_samples.jsonl",
        "report.html",
    ]
    assert (tmp_path / "eval_records" / "Quiz_eval_result.txt").read_text() == "=====Evaluation Summary=====\n"
    summary = _valid_json((tmp_path / "eval_records" / "quiz.json").read_text())
    assert sum(summary["counts"].values()) == summary["total"] == 30
    assert [each["subset"] for each in summary["estimates"]] == ["Quiz/A", "Quiz/B", "OVERALL"]
    assert summary["settings"]["judge"] == {"model": "rules", "temperature": None}


def test_scores_are_read_back(tmp_path: Path) -> None:
    scores = random_scores(40, ["Quiz/A", "Quiz/B"])
    write_report(tmp_path, [benchmark_scores(scores)])
    stored = read_scores(tmp_path)["quiz"]
    for strict in (False, True):
        expected, arrays = arrays_of(scores, strict), stored.arrays(strict)
        assert (arrays.keys, arrays.subsets, arrays.videos) == (expected.keys, expected.subsets, expected.videos)
        np.testing.assert_array_equal(arrays.values["accuracy"], expected.values["accuracy"])
        assert point_figures(METRIC, arrays) == point_figures(METRIC, expected)


def test_texts_of_any_kind_survive(tmp_path: Path) -> None:
    text = 'one\u2028two\u0085three\r\n\x0b"four" \u202efive \udcff \x00'
    events = [{"event": text, "relationship": "neutral", "reason": ""}]
    scores = [sample_score(1, 1.0, text=text, references=(text, "b"), details={"events_gt": events, "nan": math.nan})]
    write_report(tmp_path, [benchmark_scores(scores)])
    lines = (tmp_path / "eval_records" / "quiz_samples.jsonl").read_bytes().decode().split("\n")
    assert len(lines) == 2 and _valid_json(lines[0])["details"] == {"events_gt": events, "nan": None}
    (sample,) = read_scores(tmp_path)["quiz"].samples
    assert sample["prediction"] == text and sample["references"] == [text, "b"] and sample["vid"] == "1.mp4"


def test_frames_and_errors_are_recorded(tmp_path: Path) -> None:
    visuals = [{"frame_indices": [0, 8], "times": [0.0, 0.4], "width": 56, "height": 84}]
    scores = [
        sample_score(1, 1.0, visuals=visuals),
        sample_score(2, 0.0, status="missing", text=None, error="2.mp4 is missing."),
    ]
    write_report(tmp_path, [benchmark_scores(scores)])
    first, second = read_scores(tmp_path)["quiz"].samples
    assert first["visuals"] == visuals and first["error"] is None
    assert second["prediction"] is None and second["error"] == "2.mp4 is missing."


def test_a_benchmark_without_a_score(tmp_path: Path) -> None:
    result = benchmark_scores([sample_score(i, 0.0, status="missing", text=None) for i in range(3)], tables=[])
    write_report(tmp_path, [result])
    stored = read_scores(tmp_path)["quiz"]
    assert _valid_json((tmp_path / "eval_records" / "quiz.json").read_text())["figures"] == {"Accuracy": None}
    assert math.isnan(point_figures(METRIC, stored.arrays())["Accuracy"])
    assert point_figures(METRIC, stored.arrays(strict=True)) == {"Accuracy": 0.0}
    assert "nan" in screen_text(
        result
    ) and "3 samples: 0 scored, 0 unreadable, 0 judge failed, 3 missing" in screen_text(result)


def test_a_second_run_replaces_the_files(tmp_path: Path) -> None:
    write_report(tmp_path, [benchmark_scores(random_scores(20, ["Quiz/A"]))])
    write_report(tmp_path, [benchmark_scores(random_scores(10, ["Quiz/A"]))])
    assert len(read_scores(tmp_path)["quiz"].samples) == 10
    assert not [path.name for path in tmp_path.rglob(".*")]


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="is not the output of a run"):
            read_scores(directory)


@pytest.mark.parametrize("damage", ["remove", "cut", "not JSON", "another"])
def test_incomplete_files(tmp_path: Path, damage: str) -> None:
    write_report(tmp_path, [benchmark_scores(random_scores(20, ["Quiz/A"]))])
    summary, samples = (tmp_path / "eval_records" / name for name in ("quiz.json", "quiz_samples.jsonl"))
    if damage == "remove":
        summary.unlink()
    elif damage == "cut":
        samples.write_bytes(samples.read_bytes()[:-20])
    elif damage == "not JSON":
        summary.write_text("{")
    else:
        samples.write_bytes(b"\n".join(samples.read_bytes().split(b"\n")[:5]))
    with pytest.raises(InputError, match=r"quiz"):
        read_scores(tmp_path)


def test_screen_text() -> None:
    text = screen_text(benchmark_scores(random_scores(100, ["Quiz/A"])))
    assert text.startswith("=====Evaluation Summary=====\n+---")
    (row,) = [line for line in text.splitlines() if line.startswith("| Accuracy")]
    comparable, strict, constant = (float(cell) for cell in row.strip("| ").split("|")[1:])
    assert strict < comparable and constant == 27.5
    assert "Two rows are repeated.\nParser audit: readers disagree: 3.\n" in text
    assert "Settings: model=org/describer, dtype=bfloat16, judge.model=rules, judge.temperature=None" in text
