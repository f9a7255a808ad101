"""Runs over archives, windows and lists, with an engine that answers with the frames that it receives."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from infer import caption
from infer.bulk.config import CaptionConfig
from infer.bulk.inputs import find_items
from tarsier_jax.errors import InputError
from tarsier_jax.processing.processor import media_sample
from tarsier_jax.processing.sample import open_visuals, read_messages
from tests.infer.crashing import NameEngine
from tests.processing.test_archives import CHAT, STRUCT, write_table, write_tar

Run = Callable[..., tuple[int, list[dict[str, Any]]]]


class FrameProcessor:
    """Returns the indices of 256 frames of a clip as the name of its prompt."""

    def __call__(self, sample: Any) -> Any:
        (visual,) = open_visuals(read_messages(sample), 256, 256, "v1", 1, None)
        return SimpleNamespace(frames=1, input_ids=[], name=f"{visual.indices[0]}-{visual.indices[-1]}")

    def decode(self, tokens: list[int]) -> str:
        return ""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `infer.caption` in `tmp_path` into out.jsonl, and returns its status and the lines of the output."""
    engine = NameEngine()
    engine.processor = FrameProcessor()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(CaptionConfig, "start", lambda self: engine)
    monkeypatch.chdir(tmp_path)

    def run(source: str, *flags: object) -> tuple[int, list[dict[str, Any]]]:
        args = ["--input", source, "--output", "out.jsonl", "--workers", "0", *map(str, flags)]
        status = caption.main(caption.parse(args))
        return status, [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]

    return run


def manifest() -> dict[str, Any]:
    return json.loads(Path("out.jsonl.manifest.json").read_text())


def captions(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {line["input"]: line.get("caption") or line.get("error") for line in lines}


def test_tar_files(run: Run, mp4: Path, tmp_path: Path) -> None:
    """A clip without an annotation, a prompt, a conversation, a broken clip; a shard that is cut off is one error."""
    data = mp4.read_bytes()
    write_tar(tmp_path / "s-0.tar", {"a.mp4": data, "b.mp4": data, "b.json": {"prompt": "Why?"}})
    write_tar(tmp_path / "s-1.tar", {"a.mp4": data, "a.json": {"idx": 7, "messages": CHAT}, "c.mp4": b"<html>"})
    (tmp_path / "s-2.tar").write_bytes((tmp_path / "s-0.tar").read_bytes()[:3000])
    status, lines = run("s-*.tar")
    assert status == 1 and len(lines) == 5
    by_input = {line["input"]: line for line in lines}
    assert by_input["s-0.tar/a.mp4"]["caption"] == by_input["s-0.tar/b.mp4"]["caption"] == "0-39"
    assert by_input["s-0.tar/b.mp4"]["prompt"] == "Why?"
    answer = by_input["s-1.tar/a.mp4"]["messages"][1]["content"][0]
    assert answer == {"type": "text", "text": "0-39", "reference": "A ball."}
    assert "s-1.tar/c.mp4 cannot be decoded: it is a web page" in by_input["s-1.tar/c.mp4"]["error"]
    assert "s-2.tar is cut off, damaged or not a tar file" in by_input["s-2.tar"]["error"]
    assert run("s-*.tar") == (1, lines)
    # A path in an archive is a line of a list as well.
    Path("list.jsonl").write_text('"s-0.tar/a.mp4"\n')
    Path("out.jsonl").unlink()
    assert captions(run("list.jsonl")[1]) == {"s-0.tar/a.mp4": "0-39"}


def test_archives_without_samples(run: Run, tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, {"README.txt": "About."})
    for source in ("a.tar", "*.tar"):
        with pytest.raises(InputError, match=r"tar contains no samples"):
            run(source)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "parquet_below", "saved"])
def test_tables(run: Run, name: str, mp4: Path, tmp_path: Path) -> None:
    value = {"bytes": mp4.read_bytes(), "path": None}
    columns = {"video": pa.array([value, {"bytes": b"nothing", "path": None}, value], STRUCT), "prompt": ["Why?"] * 3}
    if name == "saved":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset(pa.table(columns)).save_to_disk(name)
    elif name == "parquet_below":
        (tmp_path / name / "data").mkdir(parents=True)
        write_table(tmp_path / name / "data" / "train-0.parquet", **columns)
    else:
        write_table(tmp_path / name, **columns)
    status, lines = run(name)
    assert status == 1 and [line["idx"] for line in lines] == [0, 1, 2]
    assert [line.get("caption") for line in lines] == ["0-39", None, "0-39"]
    assert "not a video or image of a known format" in lines[1]["error"] and lines[0]["prompt"] == "Why?"
    assert run(name) == (1, lines)


def test_conversations_of_a_table(run: Run, mp4: Path, tmp_path: Path) -> None:
    """The output has no bytes, and can be read again."""
    value = {"bytes": mp4.read_bytes(), "path": None}
    path = write_table(tmp_path / "a.parquet", messages=[CHAT], videos=pa.array([[value]], pa.list_(STRUCT)))
    _, (line,) = run(path.name)
    video = {"type": "video", "video": {"video_file": "a.parquet/0/videos/0"}}
    assert line["messages"][0]["content"][0] == video and line["messages"][1]["content"][0]["text"] == "0-39"
    shutil.move("out.jsonl", "lines.jsonl")
    assert run("lines.jsonl")[0] == 0


def test_windows(run: Run, mp4: Path, tmp_path: Path) -> None:
    """Of 40 frames, 8 per second; a window contains its start and not its end, and the last one is cut."""
    shutil.copy(mp4, tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"no video")
    write_table(tmp_path / "c.parquet", video=pa.array([{"bytes": mp4.read_bytes(), "path": None}], STRUCT))
    Path("list.jsonl").write_text('"a.mp4"\n{"input": "b.mp4"}\n"c.parquet/0/video"\n')
    status, lines = run("list.jsonl", "--every", 2, "--window", 3)
    windows = {0.0: (3.0, "0-23"), 2.0: (5.0, "16-39"), 4.0: (5.0, "32-39")}
    for name in ("a.mp4", "c.parquet/0/video"):
        rows = {line["start"]: (line["end"], line["caption"]) for line in lines if line["input"] == name}
        assert rows == windows
    assert status == 1 and len(lines) == 7 and "start" not in next(line for line in lines if "error" in line)
    assert run("list.jsonl", "--every", 2, "--window", 3) == (1, lines)
    kept = [line for line in lines if line.get("start") != 2.0]
    Path("out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    _, again = run("list.jsonl", "--every", 2, "--window", 3)
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, lines))


@pytest.mark.parametrize("name", ["a.gif", "a.png"])
def test_pictures_stay_whole(run: Run, name: str, tmp_path: Path) -> None:
    from PIL import Image

    frames = [Image.new("RGB", (30, 20), (i, 9, 9)) for i in range(0, 250, 50)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=1000)
    _, (line,) = run(name, "--every", 1)
    assert "caption" in line and "start" not in line


def test_windows_and_annotations(run: Run, mp4: Path, tmp_path: Path) -> None:
    sample: Mapping[str, Any] = media_sample(mp4)
    Path("list.jsonl").write_text(json.dumps(sample))
    status, (line,) = run("list.jsonl", "--window", 2)
    assert status == 1 and "is an annotation, which --every does not split" in line["error"]
    with pytest.raises(InputError, match=r"--every is 0\.0; it must be a number of seconds above 0"):
        run("list.jsonl", "--every", 0)


def test_errors_are_tried_again_on_request(run: Run, mp4: Path, tmp_path: Path) -> None:
    shutil.copy(mp4, tmp_path / "a.mp4")
    Path("list.jsonl").write_text('"a.mp4"\n"b.mp4"\n"c.mp4"\n')
    status, first = run("list.jsonl")
    assert status == 1 and ["error" in line for line in first] == [False, True, True]
    shutil.copy(mp4, tmp_path / "b.mp4")
    assert run("list.jsonl") == (1, first)
    status, second = run("list.jsonl", "--retry_errors")
    assert status == 1 and second[0] == first[0]
    assert [line.get("caption") for line in second] == ["0-39", "0-39", None]
    assert (manifest()["captions"], manifest()["errors"], len(manifest()["runs"])) == (2, 1, 2)


def test_the_manifest_refuses_other_options(run: Run, mp4: Path, tmp_path: Path) -> None:
    shutil.copy(mp4, tmp_path / "a.mp4")
    status, lines = run("a.mp4", "--temperature", 0.5, "--stop", "x")
    content = manifest()
    assert content["model"]["name"] == "tarsier2-micro" and len(content["model"]["sha256"]) == 64
    assert content["options"]["temperature"] == 0.5 and content["options"]["stop"] == ["x"]
    (started,) = content["runs"]
    assert started["ended"] and started["versions"]["jax"] and (content["captions"], content["errors"]) == (1, 0)
    for flags, message in {
        (): r"out\.jsonl has captions of other options: temperature was 0\.5 and is now 0\.0, stop was \['x'\]",
        ("--temperature", 0.5, "--stop", "x", "--every", 1): r"windows was None and is now \{'every': 1\.0",
        ("--temperature", 0.5, "--stop", "x", "--prompt", "Why?"): r"prompt was .* and is now 'Why\?'",
    }.items():
        with pytest.raises(InputError, match=message):
            run("a.mp4", *flags)
    assert run("a.mp4", "--temperature", 0.5, "--stop", "x", "--slots", 2) == (status, lines)
    assert run("a.mp4", "--overwrite")[0] == 0 and manifest()["options"]["temperature"] == 0
    Path("out.jsonl.manifest.json").write_text("[]")
    with pytest.raises(InputError, match=r"manifest\.json is not the manifest of a captioning run"):
        run("a.mp4")


def test_other_weights_under_the_same_name(run: Run, mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(mp4, "a.mp4")
    run("a.mp4")
    monkeypatch.setattr("infer.bulk.manifest.digest_weights", lambda directory: b"other")
    with pytest.raises(InputError, match=r"the model was tarsier2-micro \(sha256 .*\) and is now tarsier2-micro"):
        run("a.mp4")


def test_a_list_is_not_in_memory(tmp_path: Path) -> None:
    """Items are read when they are needed."""
    path = tmp_path / "list.jsonl"
    path.write_text('"a.mp4"\n' * 3)
    items = find_items(str(path))
    assert items.total == 3
    first = iter(items)
    assert next(first).input == "a.mp4"
    path.write_text('"a.mp4"\n"b.mp4"\n' * 3)
    assert [item.input for item in items][:2] == ["a.mp4", "b.mp4"]
    part = items.part(2, 1, 2)
    assert [item.number for item in part] == [1] and part.total == 1
