"""Benchmarks with the first Tarsier: rows with `text` have the prompts of the original."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.answers import answer_rows
from eval.benchmarks import select
from eval.run import default_frames, main, parse
from tarsier_jax.families import family_of, load_config
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.processor import Processor
from tarsier_jax.weights import EMBEDDED
from tests.eval.benchmarks.rows import question_row, text_row, write_rows
from tests.eval.oracle import OracleEngines, SampleProcessor
from tests.tarsier1 import GOLDENS, make_example, read_cases, write_checkpoint

(TVBENCH, VIDEO_MME, MSVD_QA, DREAM) = select(["tvbench", "video-mme", "msvd-qa", "dream"])
MEDIA = GOLDENS / "media"
GIF = str(MEDIA / "long.gif")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tarsier1"), "t56-gqa")


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Processor:
    config = load_config(checkpoint)
    return family_of(config).load_processor(checkpoint, config)


class ExampleProcessor(SampleProcessor):
    """Also remembers the examples of a real processor.

    Attributes:
        examples: The examples.
    """

    def __init__(self, processor: Processor):
        super().__init__()
        self._processor, self.keeps_complete_prompts = processor, processor.keeps_complete_prompts
        self.examples: list[Example] = []

    def __call__(self, sample: Any) -> Any:
        self.examples.append(self._processor(sample))
        return super().__call__(sample)


def example_of(processor: Processor, benchmark: Any, row: dict[str, Any], directory: Path) -> Example:
    """Returns the example that a run of a benchmark prepares for a row."""
    recorder = ExampleProcessor(processor)
    answer_rows(OracleEngines(lambda _: "B", recorder), benchmark, [row], directory / "predictions.jsonl")
    (example,) = recorder.examples
    return example


@pytest.mark.parametrize(
    ("case", "benchmark"),
    [
        ("multiple_choice", VIDEO_MME),
        ("annotation_frame_list", VIDEO_MME),
        ("video_more_than_max", MSVD_QA),
        ("annotation_times", DREAM),
    ],
)
def test_prompts_are_the_originals(processor: Processor, case: str, benchmark: Any, tmp_path: Path) -> None:
    """Multiple choice, open answers and captions. A GIF of as many frames is in place of the clips of the cases."""
    golden = read_cases("t56-gqa")[case]
    file = [str(MEDIA / name) for name in golden["file"]] if isinstance(golden["file"], list) else GIF
    row = text_row(1, golden["instruction"], benchmark.dataset, video_file=file)
    (ids,) = np.array(golden["input_ids"])
    expected = make_example(ids, ids, np.zeros((0, 3, 56, 56), np.float32), processor.config)
    np.testing.assert_array_equal(example_of(processor, benchmark, row, tmp_path).input_ids, expected.input_ids)


def test_a_prefill_of_messages_follows_one_space(processor: Processor, tmp_path: Path) -> None:
    """A row with `messages` has the prefill " Answer: ("."""
    example = example_of(processor, TVBENCH, question_row(1, video_file=GIF), tmp_path)
    text = str(processor.tokenizer.decode(example.input_ids[-30:]))
    assert text.endswith("(A) A ring.\n(B) A star. ASSISTANT: Answer: (")


def test_the_default_number_of_frames_is_the_models(checkpoint: Path) -> None:
    assert default_frames(str(checkpoint)) == 8 and default_frames(EMBEDDED) == 16


@pytest.mark.slow
def test_a_run(checkpoint: Path, tmp_path: Path) -> None:
    """The prediction is the original's greedy answer."""
    golden = read_cases("t56-gqa")["annotation_frame_list"]
    (tmp_path / "videos" / "Video-MME" / "001").mkdir(parents=True)
    row = text_row(1, golden["instruction"], video_file=[str(MEDIA / name) for name in golden["file"]])
    write_rows(tmp_path / "annotations" / "Video-MME.jsonl", [row])
    directories = [f"--annotations={tmp_path / 'annotations'}", f"--data_root={tmp_path / 'videos'}"]
    flags = [f"--model={checkpoint}", f"--output={tmp_path / 'output'}", "--slots=4", "--max_new_tokens=32"]
    assert main(parse(["--benchmarks", "video-mme", *directories, *flags])) == 0
    (line,) = map(json.loads, (tmp_path / "output" / "predictions" / "video-mme.jsonl").read_text().splitlines())
    assert line["text"]["prediction"] == golden["greedy_text"][0]
    assert json.loads((tmp_path / "output" / "settings.json").read_text())["benchmarks"]["video-mme"]["n_frames"] == 8
