"""Paths of videos, and missing ones."""

from pathlib import Path

import pytest

from eval.benchmarks import select
from eval.benchmarks.annotations import video_files_of
from eval.benchmarks.videos import find_videos
from tarsier_jax.errors import InputError
from tests.eval.benchmarks.rows import caption_row, question_row, text_row

(DREAM, TVBENCH, VIDEO_MME, SHAPES) = select(["dream", "tvbench", "video-mme", "shapes"])


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_paths_follow_from_the_clip(tmp_path: Path) -> None:
    touch(tmp_path / "DREAM/1.mp4", tmp_path / "TVBench/a/1.avi", tmp_path / "Video-MME/001.mkv")
    for benchmark, row, path in (
        (DREAM, caption_row(1), "DREAM/1.mp4"),
        (TVBENCH, question_row(5), "TVBench/a/1.avi"),
        (VIDEO_MME, text_row(1, "<video> Why?"), "Video-MME/001.mkv"),
    ):
        complete, missing = find_videos(benchmark, [row], tmp_path)
        assert [video_files_of(row) for row in complete] == [[str(tmp_path / path)]] and not missing


def test_another_ending(tmp_path: Path) -> None:
    touch(tmp_path / "DREAM/1.webm", tmp_path / "DREAM/1.txt")
    (row,), _ = find_videos(DREAM, [caption_row(1)], tmp_path)
    assert video_files_of(row) == [str(tmp_path / "DREAM/1.webm")]
    touch(tmp_path / "DREAM/1.avi")
    with pytest.raises(InputError, match=r"1\.mp4 does not exist, and 1\.avi, 1\.webm could replace it"):
        find_videos(DREAM, [caption_row(1)], tmp_path)


def test_a_row_names_its_file(tmp_path: Path) -> None:
    touch(tmp_path / "mine/1.mp4", tmp_path / "f0.jpg", tmp_path / "f1.jpg")
    rows = [
        question_row(1, video_file="mine/1.mp4"),
        text_row(2, "<video> Why?", video_file=str(tmp_path / "mine/1.mp4")),
        text_row(3, "<video> Why?", video_file=["f0.jpg", "f1.jpg"]),
    ]
    complete, missing = find_videos(TVBENCH, rows, tmp_path)
    path, frames = str(tmp_path / "mine/1.mp4"), [str(tmp_path / "f0.jpg"), str(tmp_path / "f1.jpg")]
    assert [video_files_of(row) for row in complete] == [[path], [path], [frames]] and not missing


def test_missing_videos(tmp_path: Path) -> None:
    touch(tmp_path / "TVBench/a/1.avi")
    rows = [question_row(1), question_row(2, "a/2.avi"), question_row(3, "a/2.avi"), question_row(4, "b/2.avi")]
    complete, missing = find_videos(TVBENCH, rows, tmp_path)
    assert [row["idx"] for row in complete] == [1]
    assert missing == [str(tmp_path / "TVBench/a/2.avi"), str(tmp_path / "TVBench/b/2.avi")]
    with pytest.raises(InputError, match=r"tvbench needs video files.*--data_root"):
        find_videos(TVBENCH, rows, None)


def test_generated_videos_are_never_missing() -> None:
    assert find_videos(SHAPES, [{"vid": 1}], None) == ([{"vid": 1}], [])
