"""What --input stands for: lists in every form, directories, and the lines made of them."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infer.bulk.inputs import Item, find_items, find_media, open_answer, with_prediction
from infer.bulk.loading import ItemLoader
from infer.bulk.outputs import LineWriter, finished_lines, write_parquet
from infer.caption import missing_items
from tarsier_jax.errors import InputError, reason_of
from tarsier_jax.processing.sample import open_visuals, read_messages
from tests.infer.conftest import write_gif

SWIFT = {"messages": [{"role": "user", "content": "<video>Describe."}], "videos": ["a.mp4"], "idx": 3}
QUESTION = [{"type": "video", "video": {"video_file": "a.mp4"}}, {"type": "text", "text": "Describe."}]


def items(path: Path, data: bytes | str) -> list[Item]:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(find_items(str(path)))


def reason(item: Item) -> str:
    with pytest.raises(InputError) as error:
        item.sample("Describe.")
    return str(error.value)


def written(path: Path, *lines: dict) -> list[dict]:
    """The lines as the next run reads them, which have to be UTF-8 and JSON."""
    writer = LineWriter(path)
    for line in lines:
        writer.write(line)
    writer.close()
    text = path.read_bytes().decode()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


@pytest.mark.parametrize("name", ["list.jsonl", "list.json"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_encodings_and_arrays(tmp_path: Path, name: str, encoding: str) -> None:
    lines = ["a.mp4", {"input": "b.mp4", "prompt": "Décris."}]
    text = json.dumps(lines, indent=1, ensure_ascii=False)
    first, second = items(tmp_path / name, text.encode(encoding))
    assert (first.idx, first.input, first.line) == (0, "a.mp4", {"input": "a.mp4"})
    assert (second.idx, second.input, second.line) == (1, "b.mp4", lines[1])


def test_another_encoding_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"list\.jsonl line 2 is not UTF-8"):
        items(tmp_path / "list.jsonl", '"a.mp4"\n"Décris"\n'.encode("latin-1"))
    with pytest.raises(InputError, match=r"list\.parquet is not a readable Parquet file"):
        items(tmp_path / "list.parquet", b"PAR1")


def test_a_bad_line_is_one_error(tmp_path: Path) -> None:
    deep, bare, good, empty = items(tmp_path / "list.jsonl", "[" * 100_000 + '\na.mp4\n"b.mp4"\n{"messages": null}\n')
    assert "list.jsonl line 1 cannot be read as JSON: it is nested too deeply" in reason(deep)
    assert "list.jsonl line 2 is not JSON" in reason(bare) and "a path in quotes" in reason(bare)
    assert 'neither "messages" nor "input"' in reason(empty)
    assert good.input == "b.mp4"


def test_keys_beside_an_input_that_would_be_ignored(tmp_path: Path) -> None:
    for key in ("start_time", "videos", "max_pixels"):
        (item,) = items(tmp_path / "list.jsonl", json.dumps({"input": "a.mp4", key: 1, "note": "x"}))
        assert reason(item) == f'"{key}" beside "input" is not read. Write the line as an annotation, with messages.'


def test_indices_that_json_does_not_have(tmp_path: Path) -> None:
    """They are numbered; what comes out is found again."""
    lines = (
        '{"input": "a", "idx": NaN}\n{"input": "a", "idx": 1e400}\n{"input": "a", "idx": null}\n{"input": "\\ud83d"}'
    )
    found = items(tmp_path / "list.jsonl", lines)
    assert [item.idx for item in found] == [0, 1, 2, 3]
    known = [{"idx": item.idx, "input": item.input} for item in found]
    assert written(tmp_path / "out.jsonl", *known) == known


def test_an_annotation_of_another_format_comes_back_as_one(tmp_path: Path) -> None:
    (item,) = items(tmp_path / "list.jsonl", json.dumps(SWIFT))
    assert item.is_annotation
    assert item.sample("Describe.") == {"idx": 3, "messages": [{"role": "user", "content": QUESTION}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A ball."}]}
    line = with_prediction(item.line, "A ball.")
    assert line == {"idx": 3, "messages": [{"role": "user", "content": QUESTION}, answer]}


def test_the_answer_of_a_conversation_is_its_reference() -> None:
    turns = [{"from": "human", "value": "<video>\nDescribe."}, {"from": "gpt", "value": "A cross."}]
    line = with_prediction({"conversations": turns, "video": "a.mp4"}, "A ball.")
    answer = {"type": "text", "text": "A ball.", "reference": "A cross."}
    assert line["messages"] == [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": [answer]}]


@pytest.mark.parametrize("content", [7, ["a"], None])
def test_a_malformed_answer_stays_for_its_reader(content: Any) -> None:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": content}]
    assert open_answer({"messages": messages})["messages"] == messages


def test_an_answer_of_several_items_is_one_reference() -> None:
    answer = [{"type": "text", "text": "A ball "}, {"type": "text", "text": "moves."}]
    line = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]}
    assert open_answer(line)["messages"][-1]["content"] == [{"type": "text", "text": "", "reference": "A ball moves."}]


def test_an_error_of_a_former_run_is_no_error_of_this_one(tmp_path: Path) -> None:
    """Lines of a former output are captioned again."""
    (item,) = items(tmp_path / "list.jsonl", '{"idx": 1, "input": "a.mp4", "error": "a.mp4 is empty."}\n')
    assert item.sample("Describe.")["messages"][0]["content"][0]["video"] == {"video_file": "a.mp4"}


@pytest.mark.parametrize("name", ["y" * 300 + ".mp4", "y" * 5000 + ".mp4", "a\0.mp4"])
def test_impossible_names(name: str) -> None:
    with pytest.raises(InputError, match=r"cannot be looked up|does not exist") as error:
        open_visuals(read_messages(Item(0, 0, name, {}).sample("Describe.")), 4, 4, "v1", 1, None)
    assert len(str(error.value)) < 2000
    with pytest.raises(InputError):
        find_items(name)


@pytest.mark.parametrize("line", ["3", '"a.mp4"', "[1]", "null", "[" * 100_000])
def test_an_output_of_something_else(tmp_path: Path, line: str) -> None:
    (tmp_path / "out.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"out.jsonl line 1 was not written by a captioning run"):
        list(finished_lines(tmp_path / "out.jsonl"))


@pytest.mark.parametrize("content", ['{"my": "settings"}', "my notes", '[{"input": "a.mp4"}]', '{"input": "a.mp4"}\n'])
def test_a_file_of_something_else_is_not_touched(tmp_path: Path, content: str) -> None:
    path = tmp_path / "precious.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"precious.json line 1 was not written by a captioning run"):
        list(finished_lines(path))
    assert path.read_text() == content


@pytest.mark.parametrize("whole", ["", '{"idx": 0, "input": "a.mp4", "caption": "A ball."}\n'])
def test_a_line_cut_short_is_cut_off(tmp_path: Path, whole: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(whole + '{"idx": 1, "input": "b.m')
    list(finished_lines(path))
    assert path.read_text() == whole


def test_questions_about_one_video_are_known_by_their_prompts(tmp_path: Path) -> None:
    lines = [{"idx": "v", "input": "a.mp4", "prompt": prompt} for prompt in ("one", "two", "two")]
    every = items(tmp_path / "list.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    fields = ("idx", "input")

    def missing(*former: dict) -> list[int]:
        return [item.number for item in missing_items(every, former, fields, "Describe.")]

    assert missing() == [0, 1, 2]
    assert missing(lines[1]) == [0, 2]
    assert missing(lines[0], lines[1], lines[1]) == []
    assert missing({"idx": "v", "input": "a.mp4", "error": "It is empty."}) == [1, 2]
    (single,) = items(tmp_path / "single.jsonl", json.dumps(lines[0]))
    assert not list(missing_items([single], [{**lines[0], "prompt": "a former one"}], fields, "Describe."))


def test_reasons_are_in_words() -> None:
    def processor(sample: Any) -> None:
        raise KeyError("tokens") if sample["messages"][0]["content"][1]["text"] == "key" else RecursionError

    found = [Item(i, i, "a.mp4", {"prompt": prompt}) for i, prompt in enumerate(("key", "deep"))]
    reasons = []
    for item in found:
        with pytest.raises((KeyError, RecursionError)) as error:
            ItemLoader(processor, "")(item)  # pyright: ignore[reportArgumentType]
        reasons.append(reason_of(error.value))
    assert "could not be prepared, because of an unexpected key error: 'tokens'" in reasons[0]
    assert "nested too deeply" in reasons[1]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """A run captions them, writes their lines, and knows them when it is started again."""
    name = os.fsdecode(b"caf\xe9.gif")
    write_gif(tmp_path / name)
    (item,) = find_items(str(tmp_path))
    assert item.input == str(tmp_path / name)
    line = {"input": item.input, "caption": "A ball."}
    assert written(tmp_path / "out.jsonl", line) == [line] == list(finished_lines(tmp_path / "out.jsonl"))
    write_parquet(tmp_path / "out.jsonl", tmp_path / "out.parquet")
    assert next(iter(find_items(str(tmp_path / "out.parquet")))).input.endswith("caf\\udce9.gif")


def test_values_that_json_does_not_have(tmp_path: Path) -> None:
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    values = {2**70: [np.inf], 1: deep, 2: float("nan")}
    lines = written(
        tmp_path / "out.jsonl", *({"idx": idx, "input": "a", "caption": "", "x": x} for idx, x in values.items())
    )
    assert [line.get("x") for line in lines] == [[None], None, None]
    assert lines[1]["idx"] == 1 and "nested too deeply" in lines[1]["error"]
    write_parquet(tmp_path / "out.jsonl", tmp_path / "out.parquet")
    assert [item.idx for item in find_items(str(tmp_path / "out.parquet"))] == [str(2**70), "1", "2"]


def test_a_scan_says_what_it_skips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("notes.txt", "list.TXT", "old.mpg", "README", ".hidden.txt"):
        (tmp_path / name).write_text("x")
    for name in ("below", ".git"):
        (tmp_path / name).mkdir()
    (tmp_path / ".git" / "index").write_text("x")
    gif = write_gif(tmp_path / "below" / "clip.gif")
    assert find_media([str(tmp_path)]) == [gif]
    err = capsys.readouterr().err
    assert err.startswith("skipped 4 files whose endings are not read: .txt 2, ")
    assert ".mpg 1" in err and "no ending 1" in err and ".mp4 .avi" in err
    find_media([str(gif)])
    assert capsys.readouterr().err == ""
    gif.unlink()
    with pytest.raises(InputError, match="contains no video"):
        find_media([str(tmp_path)])
    assert "skipped 4 files" in capsys.readouterr().err
