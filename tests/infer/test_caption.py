"""Bulk captioning: a line a clip, whatever the input, and nothing lost or done twice."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.shapes.annotations import annotation
from eval.shapes.clips import draw_clips
from eval.shapes.render import write_clip
from infer import caption, describe
from infer.bulk.inputs import find_items
from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.files import locked
from tests.devices import quick_compilation

FLAGS = ("--max_new_tokens", "8", "--slots", "4", "--n_frames", "4", "--workers", "0")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("clips")
    for i, clip in enumerate(draw_clips(0, 6)):
        write_clip(directory / f"{i}.mp4", clip.video["frames"])
    return directory


def run(source: Any, output: Path, *flags: object) -> tuple[int, list[dict]]:
    args = ("--input", source, "--output", output, *FLAGS, *flags)
    status = caption.main(caption.parse([str(arg) for arg in args]))
    written = output.read_text() if output.exists() else ""
    return status, [json.loads(line) for line in written.splitlines()]


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
def test_a_directory(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same captions that `infer.describe` gives one by one."""
    status, lines = run(clips, tmp_path / "out.jsonl")
    assert status == 0 and "0 compilations after warm-up" in capsys.readouterr().err
    flags = ["--input", str(clips), "--max_new_tokens", "8", "--n_frames", "4", "--json"]
    assert describe.main(describe.parse(flags)) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    told, alone = ({line["input"]: line["caption"] for line in found} for found in (lines, expected))
    assert told == alone and len(told) == 6
    line = min(lines, key=lambda line: line["idx"])
    assert line["idx"] == 0 and line["input"] == str(clips / "0.mp4") and line["n_frames"] == 4
    assert 0 < line["new_tokens"] <= 8 and line["finish_reason"] in ("eos", "length") and line["seconds"] > 0
    assert line["prompt"] == "Describe the video in detail."


def test_a_run_goes_on(clips: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    _, first = run(clips, output, "--limit", 3)
    assert sorted(line["idx"] for line in first) == [0, 1, 2]
    with output.open("a") as file:
        file.write('{"idx": 3, "inp')  # what a killed run leaves
    status, lines = run(clips, output)
    assert status == 0 and lines[:3] == first and sorted(line["idx"] for line in lines) == list(range(6))
    assert run(clips, output) == (0, lines)
    assert len(run(clips, output, "--limit", 2, "--overwrite")[1]) == 2


@pytest.mark.slow
def test_int8(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = run(clips, tmp_path / "out.jsonl", "--int8", "--limit", 2)
    assert status == 0 and len(lines) == 2 and "0 compilations after warm-up" in capsys.readouterr().err


def test_isolated_decoding(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same captions; a clip on which the decoder crashes gets an error line, and the run goes on."""
    _, expected = run(clips, tmp_path / "in_thread.jsonl")
    monkeypatch.setattr("infer.media.children.PROGRAM", "tests.infer.media.faulty")
    shutil.copy(clips / "0.mp4", tmp_path / "abort.mp4")
    names = [str(tmp_path / "abort.mp4"), *(str(clips / f"{i}.mp4") for i in range(6))]
    status, lines = run(write_lines(tmp_path / "list.jsonl", names), tmp_path / "out.jsonl", "--isolate")
    by_name = {line["input"]: line for line in lines}
    assert status == 1 and len(by_name) == 7
    assert by_name[names[0]]["error"].startswith("The decoder crashed on the images and videos.")
    for line in expected:
        assert by_name[line["input"]]["caption"] == line["caption"]
    assert not list(tmp_path.glob(".*"))


def test_lists(clips: Path, tmp_path: Path) -> None:
    path = str(clips / "1.mp4")
    lines = [path, {"input": path, "prompt": "What moves?", "idx": "b"}, {"nothing": 1}, {"input": "gone.mp4"}]
    source = write_lines(tmp_path / "list.jsonl", lines)
    source.write_text(source.read_text() + "no json\n")
    status, written = run(source, tmp_path / "out.jsonl", "--prompt", "Why?")
    by_idx = {line["idx"]: line for line in written}
    assert status == 1 and len(written) == 5
    assert (by_idx[0]["prompt"], by_idx["b"]["prompt"]) == ("Why?", "What moves?")
    assert (
        "neither" in by_idx[2]["error"] and "does not exist" in by_idx[3]["error"] and "not JSON" in by_idx[4]["error"]
    )
    assert run(source, tmp_path / "out.jsonl", "--prompt", "Why?")[0] == 1  # nothing to do, but not all is well


def test_annotations_come_back_with_predictions(clips: Path, tmp_path: Path) -> None:
    scenes = [clip.scene for clip in draw_clips(0, 2)]
    asked = [annotation(scene, {"video_file": str(clips / f"{i}.mp4")}, 7 + i) for i, scene in enumerate(scenes)]
    told = annotation(scenes[0], {"video_file": str(clips / "0.mp4")}, 9)
    told["messages"][1] = {"role": "assistant", "content": "A cross jumps."}  # as training data has it
    source = write_lines(tmp_path / "in.jsonl", [*asked, told])
    status, lines = run(source, tmp_path / "out.jsonl")
    assert status == 0
    for line in lines:
        (answer,) = line["messages"][1]["content"]
        reference = (
            "A cross jumps." if line["idx"] == 9 else asked[line["idx"] - 7]["messages"][1]["content"][0]["reference"]
        )
        assert answer["reference"] == reference != answer["text"] and answer["text"]
        assert line["extra_info"]["events"] and line["new_tokens"] > 0
    same = {line["idx"]: line["messages"][1]["content"][0]["text"] for line in lines}
    assert same[7] == same[9]  # the answer was not shown


def test_parquet(clips: Path, tmp_path: Path) -> None:
    """Written at the end, from lines; read again as a list."""
    scene = next(iter(draw_clips(0, 1))).scene
    asked = annotation(scene, {"video_file": str(clips / "0.mp4")}, 7)
    source = write_lines(tmp_path / "in.jsonl", [asked, str(clips / "1.mp4"), "gone.mp4"])
    flags = ["--input", str(source), "--output", str(tmp_path / "out.parquet"), *FLAGS]
    assert caption.main(caption.parse(flags)) == 1
    lines = [json.loads(line) for line in (tmp_path / "out.parquet.jsonl").read_text().splitlines()]
    items = {item.idx: item for item in find_items(str(tmp_path / "out.parquet"))}
    assert len(items) == len(lines) == 3
    for line in lines:
        assert items[line["idx"]].line == line
    assert not list(tmp_path.glob(".*partial"))


def test_parquet_without_pyarrow(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"out\.parquet needs pyarrow: pip install pyarrow"):
        run(clips, tmp_path / "out.parquet")


def test_shards(clips: Path, tmp_path: Path) -> None:
    for shard in range(2):
        run(clips / "*.mp4", tmp_path / "out.jsonl", "--num_shards", 2, "--shard_index", shard)
    parts = [(tmp_path / f"out.{i:05d}-of-00002.jsonl").read_text().splitlines() for i in range(2)]
    assert [sorted(json.loads(line)["idx"] for line in part) for part in parts] == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.slow
def test_processes_that_find_each_other(clips: Path, one_frame_size: Path, tmp_path: Path) -> None:
    """As MPI starts them. Each captions its share and ends, whatever the other does."""
    command = [sys.executable, "-m", "infer.caption", "--distributed", "--input", str(clips), *FLAGS]
    command += ["--output", str(tmp_path / "out.jsonl"), "--model", str(one_frame_size)]
    mpi = {"OMPI_MCA_orte_hnp_uri": f"{os.getpid()}.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"}
    started = []
    for rank in "01":
        ranks = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank}
        started.append(subprocess.Popen(command, env={**quick_compilation(), **mpi, **ranks}, stderr=subprocess.PIPE))
    for process in started:
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told.decode()
    parts = [(tmp_path / f"out.{i:05d}-of-00002.jsonl").read_text().splitlines() for i in range(2)]
    assert [sorted(json.loads(line)["idx"] for line in part) for part in parts] == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.slow
def test_processes_that_do_not(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"did not find each other.*--num_shards"):
        run(clips, tmp_path / "out.jsonl", "--distributed")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_shards", 2, "--shard_index", 2), "--shard_index is 2; it must be from 0 to 1"),
        (("--mesh", "data=3"), "--mesh data=3 does not fit 1 devices"),
        (("--mesh", "rows=1"), "--mesh rows=1 is not a list of axes"),
        (("--temperature", -1), "temperature is -1"),
        (("--slots", 0), "0 slots cannot be split"),
        (("--num_shards", 0), "--num_shards is 0; it must be at least 1"),
        (("--limit", -1), "--limit is -1; it must be at least 0"),
        (("--max_new_tokens", 0), "max_new_tokens is 0; it must be at least 1"),
        (("--workers", -1), "--workers is -1; it must be at least 0"),
    ],
)
def test_bad_flags(clips: Path, tmp_path: Path, flags: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(clips, tmp_path / "out.jsonl", *flags)


def test_bad_inputs(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    sources = {"empty.jsonl": "is empty", "*.mp4": "Nothing matches", "gone.mp4": "does not exist"}
    for source, message in {**sources, "gone.jsonl": "cannot be read"}.items():
        with pytest.raises(InputError, match=message):
            run(tmp_path / source, tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").write_text("a caption\n")
    with pytest.raises(InputError, match=r"out.jsonl line 1 was not written by a captioning run.*--overwrite"):
        run(clips, tmp_path / "out.jsonl")


def test_a_second_run_into_one_output_is_refused(clips: Path, tmp_path: Path) -> None:
    """Before the model is loaded; also for the lines behind a Parquet file. Shards have outputs of their own."""
    with locked(tmp_path / "out.parquet.jsonl"), pytest.raises(InputError, match=r"Another run is writing .*jsonl"):
        run(clips, tmp_path / "out.parquet", "--model", "/no/model")
    with locked(tmp_path / "out.00000-of-00002.jsonl"), pytest.raises(CheckpointError, match="does not exist"):
        run(clips, tmp_path / "out.jsonl", "--model", "/no/model", "--num_shards", 2, "--shard_index", 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--input", "--output", "--model"])
def test_urls(tmp_path: Path, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    flags = {"--input": "clips", "--output": "out.jsonl", "--model": "org/name", flag: "https://host/x"}
    with pytest.raises(SystemExit):
        caption.parse([word for pair in flags.items() for word in pair])
    assert f"argument {flag}: the path https://host/x is a URL; only local paths" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_at_random_moments(clips: Path, one_frame_size: Path, tmp_path: Path) -> None:
    """Every clip once, whole lines only."""
    source = write_lines(tmp_path / "list.jsonl", [str(clips / f"{i % 6}.mp4") for i in range(120)])
    output = tmp_path / "out.jsonl"
    args = ("--input", source, "--output", output, "--model", one_frame_size, *FLAGS)
    command = [sys.executable, "-m", "infer.caption", *map(str, args)]
    wait = random.Random(0)
    for _ in range(2):
        before = output.stat().st_size if output.exists() else 0
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=quick_compilation()) as process:
            while process.poll() is None and (not output.exists() or output.stat().st_size == before):
                time.sleep(0.02)
            time.sleep(wait.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
    assert subprocess.run(command, stderr=subprocess.DEVNULL, env=quick_compilation(), check=False).returncode == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(line["idx"] for line in lines) == list(range(120))
