import json
import math
from pathlib import Path

import pytest

from tarsier_jax.errors import InputError
from tarsier_jax.processing.jsonl import parse_json, read_lines, to_json

VALUES = [{"input": "a.mp4", "prompt": "Décris\u2028."}, {"input": "b.mp4", "prompt": "Why?"}]
LINES = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in VALUES)


@pytest.mark.parametrize(
    "data",
    [
        LINES.encode(),
        LINES.encode("utf-8-sig"),
        LINES.encode("utf-16"),
        LINES.encode("utf-16-be"),
        LINES.encode("utf-32"),
        LINES.replace("\n", "\r\n\r\n").encode(),
        b"".join(f"{line}\n".encode("utf-8-sig") for line in LINES.split("\n")),  # files put together
        json.dumps(VALUES).encode(),
        json.dumps(VALUES, indent=1).encode("utf-8-sig"),
    ],
)
def test_lists_as_programs_leave_them(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "list.jsonl"
    path.write_bytes(data)
    assert [parse_json(line, "") for line in read_lines(path)] == VALUES


def test_one_object_over_several_lines(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(VALUES[0], indent=1))
    assert [parse_json(line, "") for line in read_lines(tmp_path / "one.json")] == VALUES[:1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            LINES.encode("latin-1", "replace"),
            r"line 1 is not UTF-8 \(byte 0xe9\).*`iconv -f latin1 -t utf-8",
        ),
        (b"{}\n" + LINES.encode("cp1252", "replace"), "line 2 is not UTF-8"),
        (LINES.encode("utf-16")[:-1], "has the encoding utf-16, but is cut off"),
    ],
)
def test_other_encodings_are_one_error(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "list.jsonl").write_bytes(data)
    with pytest.raises(InputError, match=message):
        list(read_lines(tmp_path / "list.jsonl"))


def test_bad_lines_stay_for_their_reader(tmp_path: Path) -> None:
    lines = ["[" * 100_000, "a.mp4", json.dumps(VALUES[1])]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    assert list(read_lines(tmp_path / "list.jsonl")) == lines
    with pytest.raises(InputError, match=r"^The line cannot be read as JSON: it is nested too deeply"):
        parse_json(lines[0], "The line")
    with pytest.raises(InputError, match=r"^The line is not JSON \(Expecting value"):
        parse_json(lines[1], "The line")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": "é"}, '{"a": "é"}'),
        ({"a": "caf\udce9"}, '{"a": "caf\\udce9"}'),
        ({"a": [math.nan, (math.inf, 1.5)]}, '{"a": [null, [null, 1.5]]}'),
        ({"a": math.nan, "b": "\ud83d"}, '{"a": null, "b": "\\ud83d"}'),
        ({"a": 10**30, "b": b"x"}, '{"a": 1000000000000000000000000000000, "b": "b\'x\'"}'),
    ],
)
def test_output_is_valid_json(value: dict, text: str) -> None:
    assert to_json(value) == text
    json.loads(to_json(value).encode(), parse_constant=lambda name: pytest.fail(name))


def test_numbers_of_an_array_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('[{"start_time": NaN}]')
    (line,) = read_lines(tmp_path / "list.json")
    assert math.isnan(parse_json(line, "")["start_time"])


def test_output_for_a_terminal_of_few_characters() -> None:
    assert to_json("é", "ascii") == '"\\u00e9"'
