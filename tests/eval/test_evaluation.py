"""Predictions: stored row by row, resumed, and scored with everything that has no answer."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from eval import evaluation
from eval.benchmarks import Benchmark, select
from eval.benchmarks.annotations import video_files_of, videos_of
from eval.evaluation import BASELINES, BenchmarkInput, Engines, answer, evaluate, read_answers
from eval.predictions import ERROR, Prediction
from infer.bulk.journal import Journal
from tarsier_jax.errors import InputError
from tarsier_jax.families import family_of, load_config
from tarsier_jax.processing.processor import Processor
from tarsier_jax.weights import EMBEDDED, EMBEDDED_CLIP, resolve
from tests.eval.benchmarks.rows import question_row, text_row, write_rows
from tests.eval.oracle import INDICES, OracleEngines, SampleProcessor, reference_of, shapes, shapes_qa

(TVBENCH, VIDEO_MME) = select(["tvbench", "video-mme"])
TVBENCH = dataclasses.replace(TVBENCH, subsets={})


@pytest.fixture(scope="module")
def processor() -> Processor:
    directory = resolve(EMBEDDED)
    config = load_config(directory)
    return family_of(config).load_processor(directory, config)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def load(benchmark: Benchmark, directory: Path, rows: list[dict[str, Any]]) -> BenchmarkInput:
    """Returns the input of rows whose videos, but for those with a vid that begins with "no", exist."""
    write_rows(directory / str(benchmark.annotations), rows)
    for row in rows:
        path = directory / str(benchmark.video).format(vid=row["vid"])
        path.parent.mkdir(parents=True, exist_ok=True)
        if not row["vid"].startswith("no"):
            path.touch()
    return BenchmarkInput.load(benchmark, directory, directory)


def test_a_run_resumes(tmp_path: Path) -> None:
    path, benchmark = tmp_path / "qa.jsonl", shapes_qa(4)
    rows = BenchmarkInput.load(benchmark).rows
    engines = OracleEngines(reference_of)
    whole = answer(engines, benchmark, rows, path)
    assert [Prediction.of(row).text for row in whole] == [reference_of(row) for row in rows]
    assert len(engines.rows) == len(lines_of(path)) == 4
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:50])  # killed while it wrote the third line
    engines = OracleEngines(reference_of)
    assert answer(engines, benchmark, rows, path) == whole
    assert len(engines.rows) == 2 and path.read_bytes().startswith(b"".join(lines[:2]))
    assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)  # the others in any order
    engines = OracleEngines(reference_of)
    assert answer(engines, benchmark, rows, path) == whole and not engines.rows  # no engine is built


def test_rows_have_the_format_of_the_original(tmp_path: Path) -> None:
    row = {**question_row(1), "extra_info": {"a": "U+2028: \u2028"}}
    source = load(TVBENCH, tmp_path, [row])
    answer(OracleEngines(lambda _: "B) a star"), TVBENCH, source.rows, tmp_path / "out" / "tvbench.jsonl")
    (line,) = lines_of(tmp_path / "out" / "tvbench.jsonl")
    visuals = [{"frame_indices": list(INDICES), "times": [0, 1.5, 3, 4.5], "width": 42, "height": 28}]
    assert line.pop("visuals") == visuals
    row["messages"][0]["content"][0]["video"]["video_file"] = str(tmp_path / "TVBench" / "a" / "1.avi")
    row["messages"][1]["content"][1]["text"] = "B) a star"
    assert line == row


def test_rows_of_generated_videos_keep_the_placeholder(tmp_path: Path) -> None:
    benchmark = shapes(1)
    answer(OracleEngines(reference_of), benchmark, BenchmarkInput.load(benchmark).rows, tmp_path / "shapes.jsonl")
    line = lines_of(tmp_path / "shapes.jsonl")[0]
    assert video_files_of(line) == ["<placeholder>"] and line["extra_info"]["events"]


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


@pytest.mark.parametrize("line", ["nothing", "[]", '{"dataset": "ShapesQA/Event Order", "idx": 1}'])
def test_a_line_that_is_not_a_prediction(tmp_path: Path, line: str) -> None:
    write_rows(tmp_path / "qa.jsonl", [question_row(1)])
    with (tmp_path / "qa.jsonl").open("a") as file:
        file.write(f"{line}\n")
    content = (tmp_path / "qa.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"qa\.jsonl line 2 "):
        read_answers(tmp_path / "qa.jsonl")
    assert (tmp_path / "qa.jsonl").read_bytes() == content


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


def test_a_sample_that_ends_the_program_twice_is_left_out(tmp_path: Path) -> None:
    """Such as a video whose decoder crashes."""
    path, benchmark = tmp_path / "qa.jsonl", shapes_qa(2)
    rows = BenchmarkInput.load(benchmark).rows
    notes = []
    for _ in range(2):
        notes.append(Journal(path).note(Prediction.of(rows[0]).key))
        notes[-1].__enter__()  # and the process dies
    first, second = answer(OracleEngines(reference_of), benchmark, rows, path)
    assert "ended the program 2 times" in first["error"] and Prediction.of(second).text == reference_of(rows[1])
    assert list(tmp_path.iterdir()) == [path]


class RecordingProcessor(SampleProcessor):
    """Also remembers the examples of a real processor.

    Attributes:
        prompts: The decoded tokens, without those of the videos.
    """

    def __init__(self, processor: Processor):
        super().__init__()
        self._processor = processor
        self.prompts: list[str] = []

    def __call__(self, sample: Any) -> Any:
        input_ids = self._processor(sample).input_ids
        self.prompts.append(str(self._processor.tokenizer.decode(input_ids)).replace("<|image_pad|>", ""))
        return super().__call__(sample)


def test_the_prompt_of_both_formats_is_the_same(tmp_path: Path, processor: Processor) -> None:
    recorder = RecordingProcessor(processor)
    prompt = "USER: <video> Question: What jumps?\n(A) A ring.\n(B) A star.\nASSISTANT: Answer: ("
    for benchmark, row in (
        (TVBENCH, question_row(1, video_file=str(EMBEDDED_CLIP))),
        (VIDEO_MME, text_row(1, prompt, video_file=str(EMBEDDED_CLIP))),
    ):
        answer(OracleEngines(lambda _: "B", recorder), benchmark, [row], tmp_path / f"{benchmark.name}.jsonl")
    first, second = recorder.prompts
    assert first == second
    assert first.endswith(
        "Question: What jumps?\n(A) A ring.\n(B) A star.<|im_end|>\n<|im_start|>assistant\n Answer: ("
    )


def test_an_engine_serves_benchmarks_of_one_shape(monkeypatch: pytest.MonkeyPatch, processor: Processor) -> None:
    monkeypatch.setattr(evaluation, "model_mesh", lambda model: None)
    monkeypatch.setattr(evaluation, "Engine", lambda model, processor, config: SimpleNamespace(config=config))
    engines = Engines(lambda: (None, processor), slots=2)  # pyright: ignore[reportArgumentType]
    rows = [question_row(1)]
    first = engines.fit(TVBENCH, rows)
    assert engines.fit(dataclasses.replace(TVBENCH, name="other"), rows) is first
    fewer = engines.fit(dataclasses.replace(TVBENCH, n_frames=4), rows)
    assert fewer.config.prompt_tokens < first.config.prompt_tokens
    longer = engines.fit(TVBENCH, [text_row(1, "Why? " * 300)])
    assert longer.config.prompt_tokens >= first.config.prompt_tokens + 300
    assert engines.fit(TVBENCH, rows) is not first
