"""Evaluations: everything that has no answer counts, and baselines."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.benchmarks import Benchmark, select
from eval.benchmarks.annotations import videos_of
from eval.evaluation import BASELINES, BenchmarkInput, evaluate
from eval.predictions import ERROR, Prediction
from tarsier_jax.errors import InputError
from tests.eval.benchmarks.rows import question_row, write_rows
from tests.eval.oracle import INDICES, OracleEngines, lines_of, reference_of, shapes_qa

TVBENCH = dataclasses.replace(select(["tvbench"])[0], subsets={})


def load(benchmark: Benchmark, directory: Path, rows: list[dict[str, Any]]) -> BenchmarkInput:
    """Returns the input of rows whose videos, but for those with a vid that begins with "no", exist."""
    write_rows(directory / str(benchmark.annotations), rows)
    for row in rows:
        path = directory / str(benchmark.video).format(vid=row["vid"])
        path.parent.mkdir(parents=True, exist_ok=True)
        if not row["vid"].startswith("no"):
            path.touch()
    return BenchmarkInput.load(benchmark, directory, directory)


def test_failed_samples_are_tried_again(tmp_path: Path) -> None:
    def no_second_clip(sample: dict, media: Path) -> dict:
        if sample["vid"] == 6:
            raise InputError("6.mp4 is damaged.")
        return {"frames": []}

    path, benchmark = tmp_path / "predictions" / "shapes-qa.jsonl", shapes_qa(3)
    source = BenchmarkInput.load(dataclasses.replace(benchmark, video=no_second_clip))
    scores = evaluate(OracleEngines(reference_of), source, tmp_path)
    assert scores.counts["scored"] == 2 and scores.counts["missing"] == 1
    assert scores.strict_figures["Accuracy"] == pytest.approx(200 / 3)
    (failure,) = (line for line in lines_of(path) if "error" in line)
    assert failure["error"] == "6.mp4 is damaged." and Prediction.of(failure).text == ERROR
    engines = OracleEngines(reference_of)
    scores = evaluate(engines, BenchmarkInput.load(benchmark), tmp_path)
    assert [row["vid"] for row in engines.rows] == [6] and scores.counts["scored"] == 3
    assert len(lines_of(path)) == 3 and not any("error" in line for line in lines_of(path))


def test_missing_videos_count(tmp_path: Path) -> None:
    source = load(TVBENCH, tmp_path, [question_row(1), question_row(2, "no.mp4"), question_row(3, "b.mp4")])
    scores = evaluate(OracleEngines(lambda _: "B"), source, tmp_path / "out")
    assert scores.counts["scored"] == 2 and scores.counts["missing"] == 1
    assert scores.figures["Accuracy"] == 100 and scores.strict_figures["Accuracy"] == pytest.approx(200 / 3)


def test_no_video_at_all(tmp_path: Path) -> None:
    source = load(TVBENCH, tmp_path, [question_row(1, "no.mp4")])
    scores = evaluate(OracleEngines(lambda _: "B"), source, tmp_path / "out")
    assert scores.counts["missing"] == 1 and np.isnan(scores.figures["Accuracy"])


def test_a_smaller_limit_scores_fewer_answers(tmp_path: Path) -> None:
    evaluate(OracleEngines(reference_of), BenchmarkInput.load(shapes_qa(4)), tmp_path)
    scores = evaluate(OracleEngines(reference_of), BenchmarkInput.load(shapes_qa(4), limit=2), tmp_path)
    assert scores.counts["scored"] == len(scores.scores) == 2


def test_baselines(tmp_path: Path) -> None:
    """They differ from the answer in the frames alone."""
    source = load(TVBENCH, tmp_path, [question_row(1, start_time=1.0), question_row(2, "no.mp4")])
    engines = OracleEngines(lambda _: "B")
    scores = evaluate(engines, source, tmp_path / "out", baselines=True)
    video = {"video_file": str(tmp_path / "TVBench" / "a" / "1.avi")}
    original, *others = engines.processor.samples
    assert videos_of(original["messages"]) == [{**video, "start_time": 1.0}]
    one_frame, shuffled, no_video = (videos_of(sample["messages"]) for sample in others)
    assert one_frame == [{**video, "frame_indices": [6]}] and no_video == []
    assert shuffled[0]["frame_indices"] != list(INDICES) and sorted(shuffled[0]["frame_indices"]) == list(INDICES)
    assert all(sample["messages"][1] == original["messages"][1] for sample in others)
    assert BASELINES.keys() <= scores.baselines.keys() and scores.baselines["no_video"] == {"Accuracy": 100.0}
    for name in BASELINES:
        (line,) = lines_of(tmp_path / "out" / "baselines" / name / "tvbench.jsonl")
        assert Prediction.of(line).text == "B"
