"""Media in tar, Parquet and Arrow files: their frames are those of the files that they were made of."""

import gzip
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tarsier_jax.errors import InputError, MediaError
from tarsier_jax.processing.archives import find_archives, open_archive
from tarsier_jax.processing.processor import media_sample
from tarsier_jax.processing.sample import open_visuals, read_messages
from tarsier_jax.processing.tar_archive import FileRange
from tarsier_jax.processing.video import find_inputs, open_clip

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CHAT = [{"role": "user", "content": "<video>Describe."}, {"role": "assistant", "content": "A ball."}]


def write_tar(path: Path, members: Mapping[str, bytes | str | dict]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            text = json.dumps(content) if isinstance(content, dict) else content
            data = text.encode() if isinstance(text, str) else text
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_table(path: Path, **columns: Any) -> Path:
    """A Parquet file with two rows per row group, or an Arrow file."""
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return path


def pictures(path: str | Path) -> list[np.ndarray]:
    clip = open_clip(path)
    return [np.asarray(frame) for frame in clip.read(range(clip.length))]


def samples(path: Path) -> list[Any]:
    """The samples in order, each equal to the one that is read alone."""
    archive = open_archive(path)
    every = [sample for _, sample in archive.samples(path.name)]
    assert [archive.sample(i, path.name) for i in range(len(archive))] == every
    return every


@pytest.fixture
def files(mp4: Path, tmp_path: Path) -> dict[str, bytes]:
    """The bytes of a video, an animation and a picture, by ending."""
    frames = [Image.new("RGB", (30, 20), (i * 60, 9, 9)) for i in range(3)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=50)
    frames[0].save(tmp_path / "x.png")
    return {"mp4": mp4.read_bytes(), **{e: (tmp_path / f"x.{e}").read_bytes() for e in ("gif", "png")}}


@pytest.mark.parametrize("kind", ["mp4", "gif", "png"])
@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.arrow"])
def test_frames_are_those_of_the_file(name: str, kind: str, files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / f"whole.{kind}").write_bytes(files[kind])
    archive = tmp_path / name
    if name == "a.tar":
        write_tar(archive, {"x/0.txt": "before", f"./x/1.{kind}": files[kind], f"x/2.{kind}": b"after"})
        place = archive / "x" / f"1.{kind}"
    else:
        value = {"bytes": files[kind], "path": f"other.{kind}"}
        write_table(archive, video=pa.array([None, {"bytes": b"x", "path": None}, value], STRUCT))
        place = archive / "2" / "video"
    expected = pictures(tmp_path / f"whole.{kind}")
    np.testing.assert_array_equal(pictures(place), expected)
    (visual,) = open_visuals(read_messages(media_sample(place)), 4, 4, "v1", 1, None)
    assert visual.clip.name == str(place) and visual.count == min(4, len(expected))
    assert find_inputs(place) == [place]


def test_a_range_reads_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(100)))
    with FileRange(str(tmp_path / "x"), 10, 20).open() as file:
        assert file.read(5) == bytes(range(10, 15)) and file.tell() == 5
        assert file.seek(-3, 2) == 17 and file.read() == bytes(range(27, 30)) and file.read(1) == b""
        assert file.seek(50) == 50 and file.read() == b""
        assert file.seek(2) == 2 and file.read(2) == bytes((12, 13))


def test_the_samples_of_a_tar_file(files: dict[str, bytes], tmp_path: Path) -> None:
    """A key is a name up to its first dot; the parts of a sample may be apart; other members are not read."""
    mp4, png = files["mp4"], files["png"]
    members = {
        "README.txt": "About.",
        "b/0.mp4": mp4,
        "b/1.left.png": png,
        "b/0.txt": "A ball.\n",
        "b/1.left.json": {"prompt": "Which?"},
        "b/1.json": {"prompt": "Why?", "caption": "Because.", "fps": 30},
        "b/.0.mp4": b"hidden",
        "b/0.cls": "3",
    }
    plain = {"input": "a.tar/b/0.mp4", "caption": "A ball."}
    question = {"input": "a.tar/b/1.left.png", "prompt": "Why?", "caption": "Because."}
    assert samples(write_tar(tmp_path / "a.tar", members)) == [plain, question]


@pytest.mark.parametrize(
    ("annotation", "videos"),
    [
        ({"messages": CHAT}, {"videos": ["a.tar/0.mp4"]}),
        ({"messages": CHAT, "videos": ["0.mp4"]}, {"videos": ["a.tar/0.mp4"]}),
        ({"messages": CHAT, "video": "/data/whole/name.mp4"}, {"video": "a.tar/0.mp4"}),
        ({"messages": CHAT, "url": "http://example.com/0"}, {"url": "http://example.com/0", "videos": ["a.tar/0.mp4"]}),
    ],
)
def test_annotations_in_a_tar_file(annotation: dict, videos: dict, files: dict[str, bytes], tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.mp4": files["mp4"], "0.json": annotation})
    assert samples(path) == [{"messages": CHAT, **videos}]


def test_media_of_one_sample_by_their_names(files: dict[str, bytes], tmp_path: Path) -> None:
    item = {"type": "video", "video": {"video_file": "0.b.mp4"}}
    turns = [{"role": "user", "content": [item, {"type": "image", "image": "0.c.png"}]}]
    members = {"s/0.b.mp4": files["mp4"], "s/0.c.png": files["png"]}
    (sample,) = samples(write_tar(tmp_path / "a.tar", {**members, "s/0.json": {"messages": turns}}))
    first, second = sample["messages"][0]["content"]
    assert first["video"] == {"video_file": "a.tar/s/0.b.mp4"} and second["image"] == "a.tar/s/0.c.png"
    bad = write_tar(tmp_path / "b.tar", {**members, "s/0.json": {"messages": turns, "video": "other.mp4"}})
    with pytest.raises(InputError, match=r"names other\.mp4, which is not a member.*s/0\.b\.mp4, s/0\.c\.png"):
        open_archive(bad).sample(0, "b.tar")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_the_rows_of_a_table(name: str, tmp_path: Path) -> None:
    """Their bytes are not among them."""
    value = {"bytes": b"123", "path": "x.mp4"}
    rows = samples(
        write_table(tmp_path / name, video=pa.array([value, None], STRUCT), prompt=["Why?", None], fps=[30, None])
    )
    assert rows == [{"prompt": "Why?", "input": f"{name}/0/video"}, {}]
    lists = pa.array([[value], [value, value]], pa.list_(STRUCT))
    chats = pa.array([json.dumps(CHAT), json.dumps(CHAT)])
    rows = samples(write_table(tmp_path / f"chat_{name}", messages=chats, videos=lists))
    assert rows[1] == {"messages": CHAT, "videos": [f"chat_{name}/1/videos/{i}" for i in range(2)]}
    rows = samples(write_table(tmp_path / f"bytes_{name}", clip=pa.array([b"1", b"2"])))
    assert rows == [{"input": f"bytes_{name}/{i}/clip"} for i in range(2)]


def test_only_the_last_bytes_that_were_read_stay_in_memory(tmp_path: Path) -> None:
    """A row group of more than 1 GiB is refused, since each of its rows would read all of it."""
    path = write_table(tmp_path / "a.parquet", video=pa.array([{"bytes": b"1" * 2000, "path": None}] * 3, STRUCT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tarsier_jax.processing.table_archive._MAX_GROUP", 1000)
        with pytest.raises(InputError, match=r"a\.parquet has a row group of .* row_group_size=10"):
            open_archive(path).content("0/video")
    assert open_archive(path).content("2/video") == b"1" * 2000


def test_directories(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    value = {"bytes": b"123", "path": None}
    rows = datasets.Dataset.from_dict({"video": [value] * 3}, datasets.Features({"video": datasets.Video()}))
    rows.save_to_disk(tmp_path / "saved", num_shards=2)
    first, second = find_archives(tmp_path / "saved")
    assert samples(first) == [{"input": f"{first.name}/{i}/video"} for i in range(2)]
    assert open_archive(second).content("0/video") == b"123"
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "splits")
    with pytest.raises(InputError, match=r"several splits. Choose one of them: .*splits/test, .*splits/train"):
        find_archives(tmp_path / "splits")
    (tmp_path / "below").mkdir()
    tar = write_tar(tmp_path / "below" / "a.tar", {})
    assert find_archives(tmp_path / "below") == [tar] and find_archives(tar) == [tar]


def test_errors(files: dict[str, bytes], tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", {"0.mp4": files["mp4"], "1.mp4": b"", "2.mp4": b"<html>no", "3.json": "[1]"})
    for place, message in {
        "4.mp4": r"4\.mp4 does not exist: .*a\.tar has no 4\.mp4",
        "1.mp4": r"1\.mp4 is empty",
        "2.mp4": r"2\.mp4 cannot be decoded: it is a web page",
    }.items():
        with pytest.raises(MediaError, match=message):
            open_clip(whole / place)
    with pytest.raises(InputError, match=r"3\.json is not a JSON object"):
        open_archive(whole).sample(3, "a.tar")
    table = write_table(tmp_path / "a.parquet", video=pa.array([{"bytes": b"nothing known", "path": None}], STRUCT))
    for place, message in {
        "1/video": "has no 1/video",
        "0/image": "has no 0/image",
        "0/video": "not a video or image of a known format",
    }.items():
        with pytest.raises(MediaError, match=message):
            open_clip(table / place)
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "zipped.tar").write_bytes(gzip.compress(whole.read_bytes()))
    for name, message in {
        "cut.tar": "cut off, damaged or not a tar file",
        "zipped.tar": "compressed.*`gunzip",
        "gone.tar": "cannot be read",
    }.items():
        with pytest.raises(InputError, match=message):
            open_archive(tmp_path / name)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.tar.gz").touch()
    for source in (tmp_path / "below" / "a.tar.gz", tmp_path / "below"):
        with pytest.raises(InputError, match=r"a\.tar\.gz is compressed.*Decompress it"):
            find_archives(source)


def test_an_archive_that_is_replaced_is_read_again(files: dict[str, bytes], tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.png": b"x" * 5000, "1.png": files["png"]})
    assert len(open_archive(path)) == 2 and open_archive(path) is open_archive(str(path))
    write_tar(path, {"1.png": files["png"]})
    assert open_clip(path / "1.png").length == 1 and len(open_archive(path)) == 1
