"""`python -m eval.shapes` writes a small benchmark whose lines the processor takes."""

import json
from pathlib import Path

import pytest

from eval.shapes.__main__ import main, parse
from eval.shapes.clips import HELD_OUT, draw_clips
from eval.shapes.judge import score_description
from eval.shapes.questions import letter_in
from tarsier_jax.errors import InputError
from tarsier_jax.files import locked
from tarsier_jax.processing.sample import read_messages
from tarsier_jax.processing.video import open_clip
from tarsier_jax.programs import run


@pytest.mark.parametrize(("flags", "ending"), [([], ".mp4"), (["--gif"], ".gif")])
def test_a_benchmark(tmp_path: Path, flags: list[str], ending: str) -> None:
    assert main(parse(["--output", str(tmp_path), "--clips", "3", *flags])) == 0
    for name in ("descriptions", "questions"):
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [line["idx"] for line in lines] == [0, 1, 2]
        for line, clip in zip(lines, draw_clips(HELD_OUT, 3), strict=True):
            assert [message["role"] for message in read_messages(line)] == ["user", "assistant"]
            video, answer = (message["content"] for message in line["messages"])
            path = tmp_path / video[0]["video"]["video_file"]
            assert path.suffix == ending and open_clip(path).length == clip.scene.frames
            if name == "descriptions":
                assert score_description(answer[0]["reference"], line["extra_info"]["events"]) == (1.0, 1.0)
            else:
                assert letter_in(answer[0]["reference"])


def test_seeds_are_clips(tmp_path: Path) -> None:
    first, second, other = tmp_path / "first", tmp_path / "second", tmp_path / "other"
    for directory, seed in ((first, "7"), (second, "7"), (other, "8")):
        main(parse(["--output", str(directory), "--clips", "2", "--seed", seed]))
    texts = [(directory / "descriptions.jsonl").read_text() for directory in (first, second, other)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("flags", [["--clips", "0"], ["--seed", "-1"]])
def test_bad_flags(tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        main(parse(["--output", str(tmp_path), *flags]))


def test_a_second_run_into_one_directory_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path, inside=True), pytest.raises(InputError, match=f"Another run is writing {tmp_path}"):
        main(parse(["--output", str(tmp_path), "--clips", "1"]))
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").touch()
    assert run(lambda: main(parse(["--output", str(tmp_path / "taken"), "--clips", "1"]))) == 1
    assert "taken: File exists." in capsys.readouterr().err
