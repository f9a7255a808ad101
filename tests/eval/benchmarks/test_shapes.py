"""The benchmarks of moving shapes: their subsets, their videos, and the scores of right and wrong answers."""

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.benchmarks.annotations import load_annotations
from eval.benchmarks.shapes import SHAPES, VARIANTS, video_source
from eval.evaluation import BenchmarkInput, evaluate
from eval.predictions import AnnotatedSample
from eval.scoring import BenchmarkScores
from eval.shapes.clips import HELD_OUT, ShapeClip, draw_clips
from eval.shapes.describe import describe
from eval.shapes.questions import questions
from eval.shapes.world import reverse
from tests.eval.oracle import FIRST_SEED, OracleEngines, reference_of, shapes, shapes_qa
from train.micro.curriculum import STAGES

CLIPS = 25


@pytest.fixture(scope="module")
def clips() -> list[ShapeClip]:
    return list(draw_clips(FIRST_SEED, CLIPS))


def describe_all(text_of: Callable[[AnnotatedSample], str], directory: Path) -> dict[str, list[str]]:
    """Returns F1, recall and precision by subset."""
    scores = evaluate(OracleEngines(text_of), BenchmarkInput.load(shapes(CLIPS)), directory)
    return {row[0]: list(row[1:4]) for row in scores.tables[0].rows}


def source(subset: str, directory: Path = Path()) -> dict[str, Any]:
    return dict(video_source({"dataset": subset, "vid": FIRST_SEED}, directory))


def test_full_marks(tmp_path: Path) -> None:
    assert describe_all(reference_of, tmp_path) == {name: ["1.0"] * 3 for name in (*VARIANTS, "OVERALL")}


def test_references_describe_the_clip(tmp_path: Path, clips: list[ShapeClip]) -> None:
    references: dict[str, list[str]] = {name: [] for name in VARIANTS}
    for sample in load_annotations(shapes(CLIPS), None):
        references[sample["dataset"]].append(reference_of(sample))
    forward = [describe(clip.scene) for clip in clips]
    for subset in ("held_out", "mp4_files", "one_frame", "random_order"):
        assert references[f"Shapes/{subset}"] == forward
    assert references["Shapes/backwards"] == [describe(reverse(clip.scene)) for clip in clips]
    other = [describe(clip.scene) for clip in draw_clips(FIRST_SEED, CLIPS, other=True)]
    assert references["Shapes/other_sizes"] == other


def test_backwards_is_another_story(tmp_path: Path, clips: list[ShapeClip]) -> None:
    backward = source("Shapes/backwards")["frames"]
    np.testing.assert_array_equal(backward, clips[0].video["frames"][::-1])
    scores = describe_all(lambda row: describe(clips[row["vid"] - FIRST_SEED].scene), tmp_path)
    assert float(scores["Shapes/backwards"][0]) < 0.5


def test_videos(clips: list[ShapeClip], tmp_path: Path) -> None:
    frames = clips[0].video["frames"]
    np.testing.assert_array_equal(source("Shapes/held_out")["frames"], frames)
    middle = source("Shapes/one_frame")["frames"]
    np.testing.assert_array_equal(middle, frames[len(frames) // 2][None])
    mixed = source("Shapes/random_order")["frames"]
    assert mixed.shape == frames.shape and not np.array_equal(mixed, frames)
    assert sorted(f.tobytes() for f in mixed) == sorted(f.tobytes() for f in frames)
    assert Path(source("Shapes/mp4_files", tmp_path)["video_file"]).stat().st_size > 1000
    other = next(draw_clips(FIRST_SEED, 1, other=True)).video["frames"]
    np.testing.assert_array_equal(source("Shapes/other_sizes")["frames"], other)
    sizes = {clip.video["frames"].shape[1:3] for clip in draw_clips(FIRST_SEED, CLIPS, other=True)}
    assert not sizes & {clip.video["frames"].shape[1:3] for clip in clips}


def answer_questions(letters: list[str], directory: Path) -> BenchmarkScores:
    engines = OracleEngines(lambda row: letters[row["vid"] - FIRST_SEED])
    return evaluate(engines, BenchmarkInput.load(shapes_qa(CLIPS)), directory)


def test_questions(clips: list[ShapeClip], tmp_path: Path) -> None:
    letters = []
    for seed, clip in enumerate(clips, FIRST_SEED):
        rng = np.random.default_rng(seed)
        all_questions = questions(clip.scene, rng)
        letters.append(all_questions[rng.integers(len(all_questions))].answer)
    right = answer_questions(letters, tmp_path / "right")
    assert all(row[1:] == ["100.0", row[2], "0"] for row in right.tables[0].rows)
    *subsets, overall = (int(row[2]) for row in right.tables[0].rows)
    assert overall == CLIPS == sum(subsets)
    wrong = answer_questions(["ABCD"[("ABCD".index(letter) + 1) % 4] for letter in letters], tmp_path / "wrong")
    assert wrong.figures == {"Accuracy": 0} and wrong.counts["scored"] == CLIPS


def test_the_letter_stands_behind_the_option(tmp_path: Path) -> None:
    """The original's rule would read the first letter of the option."""
    source = BenchmarkInput.load(shapes_qa(CLIPS))
    assert evaluate(OracleEngines(reference_of), source, tmp_path).figures == {"Accuracy": 100}


def test_an_answer_without_a_letter_is_wrong_and_counted(tmp_path: Path) -> None:
    scores = answer_questions(["I do not know."] * CLIPS, tmp_path)
    assert scores.counts["unreadable"] == CLIPS and scores.strict_figures == {"Accuracy": 0}


def test_training_never_sees_these_seeds() -> None:
    seeds = {sample["vid"] for sample in load_annotations(SHAPES, None)}
    assert seeds == set(range(HELD_OUT, HELD_OUT + 300)) and sum(count for count, _ in STAGES) < HELD_OUT
    counts = collections.Counter(sample["dataset"] for sample in load_annotations(SHAPES, None))
    assert counts == SHAPES.subsets
