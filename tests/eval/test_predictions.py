"""Rows of predictions in both formats of the original, and files of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval.predictions import Prediction, PredictionFiles, read_rows
from infer.bulk.inputs import with_prediction
from tarsier_jax.errors import InputError
from tests.eval.rows import row


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_a_prefill_is_no_part_of_the_prediction() -> None:
    sample = row("TVBench/Action Count", 1, "B)", "B", prompt="Question: Why?")
    sample["messages"][1]["content"].insert(0, {"type": "text", "text": " Answer: ("})
    prediction = Prediction.of(sample)
    assert (prediction.prompt, prediction.text, prediction.references) == ("Question: Why?", "B)", ("B",))
    assert (prediction.key, prediction.vid) == ("TVBench/Action Count_1", "TVBench/Action Count_1")


def test_texts_of_several_turns_are_joined() -> None:
    sample = row("TVBench", 1, "A", "A", prompt="First?")
    sample["messages"] += row("TVBench", 1, "B", "B", prompt=" Then?")["messages"]
    prediction = Prediction.of(sample)
    assert (prediction.prompt, prediction.text, prediction.references) == ("First? Then?", "AB", ("AB",))


def test_rows_of_the_first_version() -> None:
    sample = row("MSVD-QA-val", 1, "a dog", "dog", "text", vid="v1", prompt="USER: Who? ASSISTANT:")
    sample["text"]["question"] = "Who?"
    prediction = Prediction.of(sample)
    assert (prediction.question, prediction.text, prediction.references) == ("Who?", "a dog", ("dog",))
    assert (prediction.vid, prediction.row_format) == ("v1", "text")


@pytest.mark.parametrize("row_format", ["messages", "text"])
def test_lists_of_references(row_format: Any) -> None:
    assert Prediction.of(row("VATEX-test", 1, "", ["a dog", "a puppy"], row_format)).references == ("a dog", "a puppy")


@pytest.mark.parametrize("row_format", ["messages", "text"])
def test_an_answer_that_is_null_or_an_error_is_missing(row_format: Any) -> None:
    for text, is_missing in ((None, True), ("<error>", True), ("", False)):
        assert Prediction.of(row("TVBench/One", 1, text, "A", row_format)).is_missing == is_missing


def test_the_first_row_of_a_sample_counts_and_the_others_are_counted(tmp_path: Path) -> None:
    texts = {"a.jsonl": ["A", "B", "A"], "b.jsonl": ["C"]}
    for name, answers in texts.items():
        write(tmp_path / name, *(row("TVBench/One", 1 if i else "1", text, "A") for i, text in enumerate(answers)))
    predictions = PredictionFiles(tmp_path).of("TVBench")
    assert [each.text for each in predictions.rows] == ["A"]
    assert (predictions.num_repeated, predictions.num_conflicting) == (1, 2)


def test_only_files_of_the_directory_itself_with_the_right_ending_are_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", row("TVBench/One", 1, "A", "A"), row("TVBench2/One", 1, "A", "A"))
    write(tmp_path / "old" / "a.jsonl", row("TVBench/One", 2, "A", "A"))
    write(tmp_path / "a.jsonl.bak", "not JSON")
    files = PredictionFiles(tmp_path)
    assert files.num_rows == {"TVBench": 1, "TVBench2": 1} and len(files.of("TVBench").rows) == 1
    assert not files.of("tvbench").rows
    assert PredictionFiles(tmp_path / "old" / "a.jsonl").num_rows == {"TVBench": 1}


def test_a_byte_order_mark_separators_in_texts_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", row("VATEX-test", 1, "a\u2028b\x85c", "x"), "", row("VATEX-test", 2, "", "x"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert [each.text for each in PredictionFiles(path).of("VATEX-test").rows] == ["a\u2028b\x85c", ""]


def test_lines_of_infer_caption(tmp_path: Path) -> None:
    failure = {"idx": 2, "input": "clips.jsonl line 3", "error": "2.mp4 is empty."}
    files = PredictionFiles(
        write(tmp_path / "a.jsonl", with_prediction(row("VATEX-test", 1, "", "x"), "a dog"), failure)
    )
    assert files.num_failed == 1 and [each.text for each in files.of("VATEX-test").rows] == ["a dog"]


def test_not_a_number_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row("DREAM/youtube", 1, "a", "b", extra_info={"duration": float("nan")})) + "\n")
    assert PredictionFiles(path).of("DREAM").rows[0].extra_info["duration"] != 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [{"role": "user", "content": [{"type": "te', r"a\.jsonl line 2 is not JSON .* killed"),
        ("[1]", r'a\.jsonl line 2 has no "dataset" and "idx"'),
        ('{"idx": 1}', r'a\.jsonl line 2 has no "dataset" and "idx"'),
    ],
)
def test_a_line_that_is_no_row(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", row("TVBench/One", 1, "A", "A"), line)
    with pytest.raises(InputError, match=message):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"dataset": "TVBench", "idx": 1}, "line 1 is not a row of either format of the original .no 'messages'"),
        ({"dataset": "TVBench", "idx": 1, "text": {"prompt": "Q"}}, "no 'response'"),
        (row("TVBench/One", 1, "A", ""), r"line 1 \(TVBench/One, idx 1\) has no reference"),
        (row("TVBench/One", 1, "A", None, "text"), r"line 1 \(TVBench/One, idx 1\) has no reference"),
    ],
)
def test_a_row_that_cannot_be_read(tmp_path: Path, sample: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PredictionFiles(write(tmp_path / "a.jsonl", sample)).of("TVBench")


def test_rows_of_both_formats_are_not_scored_together(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", row("TVBench/One", 1, "A", "A"), row("TVBench/One", 2, "A", "A", "text"))
    with pytest.raises(InputError, match="rows of TVBench in both formats"):
        PredictionFiles(path).of("TVBench")


@pytest.mark.parametrize(("name", "message"), [("none", "does not exist"), ("empty", r"contains no \.jsonl file")])
def test_no_files(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        PredictionFiles(tmp_path / name)
