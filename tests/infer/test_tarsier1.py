"""`infer.describe` and `infer.caption` with the first Tarsier: their captions are the original's."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infer import caption, describe
from tests.devices import simulated_devices
from tests.tarsier1 import GOLDENS, read_cases, write_checkpoint

MEDIA = GOLDENS / "media"
SIZES = ("--slots", 4, "--max_new_tokens", 32)  # as in other tests: test processes share compiled programs
FRAMES = [str(MEDIA / name) for name in ("wide.png", "tall.png", "gray.png", "wide.png")]
PROMPT = "USER: <video> Which is the key frame?\nASSISTANT: Answer: ("


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tarsier1"), "t56-gqa")


@pytest.fixture
def list_file(tmp_path: Path) -> Path:
    """A list of a file, an annotation with messages and one with a prompt, with the names of their golden cases."""
    gif = {"type": "video", "video": {"video_file": str(MEDIA / "short.gif")}}
    question = {"type": "text", "text": "Describe the video in detail."}
    lines = [
        {"idx": "image", "input": str(MEDIA / "wide.png"), "prompt": "Describe the image in detail."},
        {"idx": "gif_short", "messages": [{"role": "user", "content": [gif, question]}]},
        {"idx": "annotation_frame_list", "text": {"prompt": PROMPT, "response": "A"}, "video_file": FRAMES},
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "list.jsonl"


def golden_text(case: str) -> str:
    (text,) = read_cases("t56-gqa")[case]["greedy_text"]
    return text


def check_lines(output: Path) -> None:
    lines: dict[str, dict[str, Any]] = {line["idx"]: line for line in map(json.loads, output.read_text().splitlines())}
    captions = {
        "image": lines["image"]["caption"],
        "gif_short": lines["gif_short"]["messages"][1]["content"][0]["text"],
        "annotation_frame_list": lines["annotation_frame_list"]["text"]["prediction"],
    }
    assert captions == {case: golden_text(case) for case in captions}
    assert lines["annotation_frame_list"]["text"] == {
        "prompt": PROMPT,
        "response": "A",
        "prediction": captions["annotation_frame_list"],
    }
    assert [lines[case]["n_frames"] for case in captions] == [1, 5, 4]


def test_describe(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default is 8 frames."""
    flags = ["--model", str(checkpoint), "--input", str(MEDIA / "long.gif"), "--max_new_tokens", "32", "--json"]
    assert describe.main(describe.parse(flags)) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["caption"], line["n_frames"], line["prompt_tokens"]) == (golden_text("gif"), 8, 186)


def test_caption_a_list(checkpoint: Path, list_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", checkpoint, "--input", list_file, "--output", tmp_path / "out.jsonl", *SIZES]
    assert caption.main(caption.parse([str(flag) for flag in flags])) == 0
    assert "0 compilations after warm-up" in capsys.readouterr().err
    check_lines(tmp_path / "out.jsonl")
    assert caption.main(caption.parse([str(flag) for flag in flags])) == 0  # resumes with nothing to do
    assert "3 clips, 3 of them captioned before" in capsys.readouterr().err


@pytest.mark.slow
def test_caption_over_four_devices(checkpoint: Path, list_file: Path, tmp_path: Path) -> None:
    flags = ["--model", checkpoint, "--input", list_file, "--output", tmp_path / "out.jsonl", *SIZES]
    command = [sys.executable, "-m", "infer.caption", *map(str, flags), "--mesh", "data=2,tensor=2"]
    environment = {**simulated_devices(4), "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "0 compilations after warm-up" in done.stderr, done.stderr
    check_lines(tmp_path / "out.jsonl")
