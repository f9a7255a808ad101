"""Predictions: stored, resumed, and complete before anything is scored."""

import dataclasses
import json
from pathlib import Path

import pytest

from eval.evaluation import first_videos, predict
from eval.predictions import Prediction, read_predictions
from tarsier_jax.errors import InputError
from tests.eval.benchmarks import Oracle, reference_of, shapes, shapes_qa


def test_a_run_continues(tmp_path: Path) -> None:
    path, benchmark = tmp_path / "qa.jsonl", shapes_qa(4)
    engine = Oracle(reference_of)
    whole = predict(engine, benchmark, path)
    assert [prediction.text for prediction in whole] == [prediction.reference for prediction in whole]
    assert len(engine.samples) == len(path.read_text().splitlines()) == 4
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:50])  # killed while it wrote the third line
    engine = Oracle(reference_of)
    assert predict(engine, benchmark, path) == whole
    assert len(engine.samples) == 2 and path.read_bytes().startswith(b"".join(lines[:2]))
    assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)  # the others in any order


def test_lines_have_the_format_of_the_original(tmp_path: Path) -> None:
    predict(Oracle(lambda sample: "A red ring jumps."), shapes(1), tmp_path / "shapes.jsonl")
    line = json.loads((tmp_path / "shapes.jsonl").read_text().splitlines()[0])
    user, assistant = line["messages"]
    assert user["content"][0]["video"] == {"video_file": "<placeholder>"}
    assert assistant["content"][0]["text"] == "A red ring jumps." and assistant["content"][0]["reference"]
    assert line["dataset"] == "Shapes/held_out" and line["extra_info"]["events"]


def test_nothing_is_scored_if_a_sample_has_no_answer(tmp_path: Path) -> None:
    def no_second_clip(sample: dict, media: Path) -> dict:
        if sample["vid"] == 6:
            raise InputError("6.mp4 is missing.")
        return {"frames": []}

    path, benchmark = tmp_path / "qa.jsonl", shapes_qa(3)
    broken = dataclasses.replace(benchmark, video_source=no_second_clip)
    with pytest.raises(InputError, match=r"1 of 3 samples have no answer.*6\.mp4 is missing"):
        predict(Oracle(reference_of), broken, path)
    engine = Oracle(reference_of)
    assert len(predict(engine, benchmark, path)) == 3 and len(engine.samples) == 1


def test_limit_counts_videos() -> None:
    samples = [{"vid": vid} for vid in ("a", "b", "a", "c", "b")]
    assert first_videos(samples, 2) == [{"vid": vid} for vid in ("a", "b", "a", "b")]
    assert first_videos(samples, None) == first_videos(samples, 9) == samples


def test_prefill_is_no_part_of_the_prediction() -> None:
    answer = [{"type": "text", "text": " Answer: ("}, {"type": "text", "text": "B)", "reference": "B"}]
    user = [{"type": "video", "video": {}}, {"type": "text", "text": "Question: "}, {"type": "text", "text": "Why?"}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    prediction = Prediction.of({"messages": messages, "dataset": "TVBench/Action Count", "idx": 1})
    assert prediction == Prediction("TVBench/Action Count", 1, "Question: Why?", "B)", "B", {})


@pytest.mark.parametrize("line", ["nothing", "[]", '{"dataset": "ShapesQA/Event Order", "idx": 1}'])
def test_a_line_that_is_not_a_prediction(tmp_path: Path, line: str) -> None:
    messages = '{"dataset": "ShapesQA/Event Order", "idx": 1, "messages": []}'
    (tmp_path / "qa.jsonl").write_text(f"{messages}\n{line}\n")
    with pytest.raises(InputError, match=r"qa\.jsonl line 2 is "):
        read_predictions(tmp_path / "qa.jsonl")
