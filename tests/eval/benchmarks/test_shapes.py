"""The benchmarks of moving shapes: their subsets, their videos, and the scores of right and wrong answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.benchmarks.shapes import SHAPES, VARIANTS, video_source
from eval.evaluation import predict
from eval.metrics import Scores
from eval.shapes.clips import HELD_OUT, ShapeClip, draw_clips
from eval.shapes.describe import describe
from eval.shapes.questions import questions
from eval.shapes.world import reverse
from tests.eval.benchmarks import FIRST_SEED, Oracle, reference_of, shapes, shapes_qa
from train.micro.curriculum import STAGES

CLIPS = 25


@pytest.fixture(scope="module")
def clips() -> list[ShapeClip]:
    return list(draw_clips(FIRST_SEED, CLIPS))


def describe_all(engine: Oracle, directory: Path) -> Scores:
    benchmark = shapes(CLIPS)
    return benchmark.metric(predict(engine, benchmark, directory / "shapes.jsonl"), benchmark.judge)


def source(subset: str, directory: Path = Path()) -> dict[str, Any]:
    return dict(video_source({"dataset": subset, "vid": FIRST_SEED}, directory))


def test_full_marks(tmp_path: Path) -> None:
    scores = describe_all(Oracle(reference_of), tmp_path)
    assert scores.rows == {name: {"f1": 1, "recall": 1, "precision": 1, "samples": CLIPS} for name in VARIANTS}


def test_references_describe_the_clip(tmp_path: Path, clips: list[ShapeClip]) -> None:
    references: dict[str, list[str]] = {name: [] for name in VARIANTS}
    for sample in shapes(CLIPS).annotations():
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
    forward = Oracle(lambda sample: describe(clips[sample["vid"] - FIRST_SEED].scene))
    assert describe_all(forward, tmp_path).rows["Shapes/backwards"]["f1"] < 0.5


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


def answer_questions(letters: list[str], path: Path) -> Scores:
    benchmark = shapes_qa(CLIPS)
    predictions = predict(Oracle(lambda sample: letters[sample["vid"] - FIRST_SEED]), benchmark, path)
    return benchmark.metric(predictions, benchmark.judge)


def test_questions(clips: list[ShapeClip], tmp_path: Path) -> None:
    letters = []
    for seed, clip in enumerate(clips, FIRST_SEED):
        rng = np.random.default_rng(seed)
        all_questions = questions(clip.scene, rng)
        letters.append(all_questions[rng.integers(len(all_questions))].answer)
    right = answer_questions(letters, tmp_path / "right.jsonl").rows
    assert all(row["accuracy"] == 1 and row["unreadable"] == 0 for row in right.values())
    assert right["OVERALL"]["samples"] == CLIPS == sum(row["samples"] for row in right.values()) / 2
    wrong = ["ABCD"[("ABCD".index(letter) + 1) % 4] for letter in letters]
    assert all(row["accuracy"] == 0 for row in answer_questions(wrong, tmp_path / "wrong.jsonl").rows.values())


def test_an_answer_without_a_letter_is_wrong_and_counted(tmp_path: Path) -> None:
    rows = answer_questions(["I do not know."] * CLIPS, tmp_path / "none.jsonl").rows
    assert rows["OVERALL"] == {"accuracy": 0, "samples": CLIPS, "unreadable": CLIPS}


def test_training_never_sees_these_seeds() -> None:
    seeds = {sample["vid"] for sample in SHAPES.annotations()}
    assert seeds == set(range(HELD_OUT, HELD_OUT + 500)) and sum(count for count, _ in STAGES) < HELD_OUT
