"""Predictions: stored row by row in the original's format, and resumed."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eval import answers
from eval.answers import Engines, answer_rows, read_answers
from eval.benchmarks import select
from eval.benchmarks.annotations import video_files_of, with_video_files
from eval.evaluation import BenchmarkInput
from eval.predictions import Prediction
from infer.bulk.journal import Journal
from tarsier_jax.errors import InputError
from tarsier_jax.families import family_of, load_config
from tarsier_jax.processing.processor import Processor
from tarsier_jax.weights import EMBEDDED, EMBEDDED_CLIP, resolve
from tests.eval.benchmarks.rows import question_row, text_row, write_rows
from tests.eval.oracle import INDICES, OracleEngines, SampleProcessor, lines_of, reference_of, shapes, shapes_qa

(TVBENCH, VIDEO_MME) = select(["tvbench", "video-mme"])


@pytest.fixture(scope="module")
def processor() -> Processor:
    directory = resolve(EMBEDDED)
    config = load_config(directory)
    return family_of(config).load_processor(directory, config)


def test_a_run_resumes(tmp_path: Path) -> None:
    path, benchmark = tmp_path / "qa.jsonl", shapes_qa(4)
    rows = BenchmarkInput.load(benchmark).rows
    engines = OracleEngines(reference_of)
    whole = answer_rows(engines, benchmark, rows, path)
    assert [Prediction.of(row).text for row in whole] == [reference_of(row) for row in rows]
    assert len(engines.rows) == len(lines_of(path)) == 4
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:50])  # killed while it wrote the third line
    engines = OracleEngines(reference_of)
    assert answer_rows(engines, benchmark, rows, path) == whole
    assert len(engines.rows) == 2 and path.read_bytes().startswith(b"".join(lines[:2]))
    assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)  # the others in any order
    engines = OracleEngines(reference_of)
    assert answer_rows(engines, benchmark, rows, path) == whole and not engines.rows  # no engine is built


def test_rows_have_the_format_of_the_original(tmp_path: Path) -> None:
    row = with_video_files({**question_row(1), "extra_info": {"a": "U+2028: \u2028"}}, ["a/1.avi"])
    answer_rows(OracleEngines(lambda _: "B) a star"), TVBENCH, [row], tmp_path / "out" / "tvbench.jsonl")
    (line,) = lines_of(tmp_path / "out" / "tvbench.jsonl")
    visuals = [{"frame_indices": list(INDICES), "times": [0, 1.5, 3, 4.5], "width": 42, "height": 28}]
    assert line.pop("visuals") == visuals
    row["messages"][1]["content"][1]["text"] = "B) a star"
    assert line == row


def test_rows_of_generated_videos_keep_the_placeholder(tmp_path: Path) -> None:
    benchmark = shapes(1)
    answer_rows(OracleEngines(reference_of), benchmark, BenchmarkInput.load(benchmark).rows, tmp_path / "shapes.jsonl")
    line = lines_of(tmp_path / "shapes.jsonl")[0]
    assert video_files_of(line) == ["<placeholder>"] and line["extra_info"]["events"]


@pytest.mark.parametrize("line", ["nothing", "[]", '{"dataset": "ShapesQA/Event Order", "idx": 1}'])
def test_a_line_that_is_not_a_prediction(tmp_path: Path, line: str) -> None:
    write_rows(tmp_path / "qa.jsonl", [question_row(1)])
    with (tmp_path / "qa.jsonl").open("a") as file:
        file.write(f"{line}\n")
    content = (tmp_path / "qa.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"qa\.jsonl line 2 "):
        read_answers(tmp_path / "qa.jsonl")
    assert (tmp_path / "qa.jsonl").read_bytes() == content


def test_a_sample_that_ends_the_program_twice_is_left_out(tmp_path: Path) -> None:
    """Such as a video whose decoder crashes."""
    path, benchmark = tmp_path / "qa.jsonl", shapes_qa(2)
    rows = BenchmarkInput.load(benchmark).rows
    notes = []
    for _ in range(2):
        notes.append(Journal(path).note(Prediction.of(rows[0]).key))
        notes[-1].__enter__()  # and the process dies
    first, second = answer_rows(OracleEngines(reference_of), benchmark, rows, path)
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
        answer_rows(OracleEngines(lambda _: "B", recorder), benchmark, [row], tmp_path / f"{benchmark.name}.jsonl")
    first, second = recorder.prompts
    assert first == second
    assert first.endswith(
        "Question: What jumps?\n(A) A ring.\n(B) A star.<|im_end|>\n<|im_start|>assistant\n Answer: ("
    )


def test_an_engine_serves_benchmarks_of_one_shape(monkeypatch: pytest.MonkeyPatch, processor: Processor) -> None:
    monkeypatch.setattr(answers, "model_mesh", lambda model: None)
    monkeypatch.setattr(answers, "Engine", lambda model, processor, config: SimpleNamespace(config=config))
    engines = Engines(lambda: (None, processor), slots=2)  # pyright: ignore[reportArgumentType]
    rows = [question_row(1)]
    first = engines.fit(TVBENCH, rows)
    assert engines.fit(dataclasses.replace(TVBENCH, name="other"), rows) is first
    fewer = engines.fit(dataclasses.replace(TVBENCH, n_frames=4), rows)
    assert fewer.config.prompt_tokens < first.config.prompt_tokens
    longer = engines.fit(TVBENCH, [text_row(1, "Why? " * 300)])
    assert longer.config.prompt_tokens >= first.config.prompt_tokens + 300
    assert engines.fit(TVBENCH, rows) is not first
    assert not first.config.reuse_prefixes
    assert engines.fit(TVBENCH, [question_row(1), question_row(1)]).config.reuse_prefixes  # about one video
