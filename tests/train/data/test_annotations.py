"""Annotation files: encodings, weights, paths of media, and lines that are not samples."""

import json
from pathlib import Path

import pytest

from tarsier_jax.errors import InputError
from tests.train.texts import write_lines, write_texts
from train.data.annotations import AnnotationFile, AnnotationLine, describe_files, parse_files, read_sample, with_root


def test_lines_are_read_where_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\n{"a": "ü"}\n\n  \n{"b": 2}'.encode())
    file = AnnotationFile(str(path))
    assert len(file) == 2
    assert file[0] == AnnotationLine(str(path), 2, '{"a": "ü"}\n')
    assert file[1] == AnnotationLine(str(path), 5, '{"b": 2}')


@pytest.mark.parametrize(("name", "message"), [("none.jsonl", "No such file"), ("blank.jsonl", "are empty")])
def test_annotations_that_hold_nothing(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(InputError, match=rf"{name} .*{message}.*config\.data"):
        AnnotationFile(str(tmp_path / name))


def test_annotations_of_other_programs(tmp_path: Path) -> None:
    """A byte order mark, also in the middle, where files were put together, and the line ends of Windows."""
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff\r\n\ufeff{"a": "ü"}\r\n\r\n\ufeff{"b": 2}\r\n'.encode())
    file = AnnotationFile(str(path))
    assert [file[i] for i in range(2)] == [
        AnnotationLine(str(path), 2, '{"a": "ü"}\r\n'),
        AnnotationLine(str(path), 4, '{"b": 2}\r\n'),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"a": 1}\n{"a": "ü"}\n'.encode("latin-1"), r"a\.jsonl line 2 is not UTF-8 \(byte 0xfc\).*`iconv -f latin1"),
        ('{"a": 1}\n'.encode("utf-16"), "a.jsonl has the encoding utf-16.*`iconv -f utf-16 -t utf-8"),
        ('{"a": 1}\n'.encode("utf-16-le"), "has the encoding utf-16-le.*`iconv -f utf-16le"),
        (b'\xef\xbb\xbf\n [\n{"a": 1}]', r"a\.jsonl is a JSON array; .*`jq -c"),
    ],
)
def test_annotations_that_are_no_json_lines_are_one_error(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(InputError, match=message):
        AnnotationFile(str(tmp_path / "a.jsonl"))


def test_files_with_and_without_weights(tmp_path: Path) -> None:
    odd = write_lines(tmp_path / "lr=3", ["{}"])
    assert parse_files("a.jsonl=3, b.jsonl=0.5") == [("a.jsonl", 3.0), ("b.jsonl", 0.5)]
    assert parse_files(f"a.jsonl,{odd},") == [("a.jsonl", None), (odd, None)]  # a file's own name may hold a "="
    assert parse_files(f"{odd}=2") == [(odd, 2.0)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("a.jsonl=x", "'a.jsonl=x' in config.data should be FILE or FILE=WEIGHT"),
        ("a.jsonl=1,b.jsonl", "set a weight above 0 for every file, or for none"),
        ("a.jsonl=0", "set a weight above 0 for every file"),
        ("a.jsonl=nan", "set a weight above 0 for every file"),
        (" , ", "config.data.train is empty"),
    ],
)
def test_malformed_lists_of_files(files: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_files(files)


def test_files_are_described_by_their_content(tmp_path: Path) -> None:
    a, b = write_texts(tmp_path / "a.jsonl", [1, 2]), write_texts(tmp_path / "b.jsonl", [2, 1])
    moved = write_texts(tmp_path / "moved.jsonl", [1, 2])
    assert describe_files(a) == describe_files(moved) != describe_files(b)
    assert describe_files(f"{a},{b}") == describe_files(f"{b},{a}")[::-1]
    assert describe_files(f"{a}=2")[0] == f"{describe_files(a)[0]}, weight 2"
    with pytest.raises(InputError, match=r"nowhere.jsonl cannot be read .*config\.data"):
        describe_files(str(tmp_path / "nowhere.jsonl"))


def test_relative_paths_of_media_start_from_the_root() -> None:
    def sample(video: str, images: list[str]) -> dict:
        items = [
            {"type": "video", "video": {"video_file": video, "fps": 2}},
            {"type": "image", "image": {"image_file": images}},
        ]
        return {
            "messages": [{"role": "user", "content": [*items, {"type": "text", "text": "a.mp4"}]}],
            "video_file": video,
        }

    line = sample("a/b.mp4", ["/x/1.png", "2.png"])
    assert with_root(line, "/media") == sample("/media/a/b.mp4", ["/x/1.png", "/media/2.png"])
    assert line == with_root(line, "") == sample("a/b.mp4", ["/x/1.png", "2.png"])


@pytest.mark.parametrize(
    ("beside", "visual"),
    [
        ({"videos": ["a.mp4"]}, {"video_file": "/media/a.mp4"}),
        ({"video": "/x/a.mp4"}, {"video_file": "/x/a.mp4"}),
        ({"videos": ["https://x.org/a.mp4"]}, {"video_file": "https://x.org/a.mp4"}),  # refused when it is opened
        ({"videos": [["1.png", "/x/2.png"]]}, {"frames": ["/media/1.png", "/x/2.png"]}),
    ],
)
def test_the_root_of_media_in_other_formats(beside: dict, visual: dict) -> None:
    messages = [{"role": "user", "content": "<video>Describe."}, {"role": "assistant", "content": "A cat."}]
    sample = read_sample(json.dumps({"messages": messages, **beside}), "/media")
    question = [{"type": "video", "video": visual}, {"type": "text", "text": "Describe."}]
    assert sample == {"messages": [{"role": "user", "content": question}, messages[1]]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "is not a JSON object"),
        ("{", "The line is not JSON "),
        ('{"a": ' * 100_000, "is nested too deeply"),
        ('{"messages": [{"role": "user", "content": "<video>"}]}', 'files in "videos" is 0, but 1 places'),
    ],
)
def test_lines_that_are_no_samples(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_sample(text, "")
