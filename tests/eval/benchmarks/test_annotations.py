"""Annotation files of the original, and the messages of their rows."""

import collections
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks import Benchmark, select
from eval.benchmarks.annotations import (
    first_videos,
    load_annotations,
    messages_of,
    videos_of,
    with_video_files,
    with_videos,
)
from eval.predictions import Prediction
from infer.bulk.inputs import with_answer
from tarsier_jax.errors import InputError
from tarsier_jax.processing.sample import read_messages
from tests.eval.benchmarks.rows import caption_row, question_row, text_row, write_rows

(DREAM, TVBENCH, VIDEO_MME, EGOSCHEMA) = select(["dream", "tvbench", "video-mme", "egoschema"])
REAL = os.environ.get("TARSIER_ANNOTATIONS")


def texts(message: dict[str, Any]) -> list[str]:
    return [item["text"] for item in message["content"] if item["type"] == "text"]


@pytest.mark.skipif(not REAL, reason="TARSIER_ANNOTATIONS is not the directory of the original's annotation files")
@pytest.mark.parametrize("benchmark", [DREAM, TVBENCH], ids=lambda benchmark: benchmark.name)
def test_files_of_the_original(benchmark: Benchmark) -> None:
    rows = load_annotations(benchmark, Path(str(REAL)))
    assert collections.Counter(row["dataset"] for row in rows) == benchmark.subsets
    for row in rows:
        user, assistant = read_messages({"messages": messages_of(benchmark, with_video_files(row, ["a.mp4"]))})
        assert [item["type"] for item in user["content"]] == ["video", "text"] and texts(user)[0]
        assert "".join(texts(assistant)) == benchmark.prefill
        prediction = Prediction.of(with_answer(row, "B) it"))
        assert prediction.text == "B) it" and prediction.reference and prediction.prompt == texts(user)[0]


def test_files_of_the_shape_of_the_original(tmp_path: Path) -> None:
    rows = [caption_row(i, dataset) for i, dataset in enumerate(d for d, n in DREAM.subsets.items() for _ in range(n))]
    path = write_rows(tmp_path / "DREAM-1k.jsonl", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_annotations(DREAM, tmp_path) == rows


def test_a_file_with_fewer_rows_is_reported(tmp_path: Path) -> None:
    write_rows(tmp_path / "DREAM-1k.jsonl", [caption_row(i) for i in range(199)])
    with pytest.warns(UserWarning, match="lacks samples.*, 199 of 200 in DREAM/youtube"):
        load_annotations(DREAM, tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([question_row(1), caption_row(1)], r"TVBench\.jsonl line 2 is a row of DREAM, not of TVBench"),
        ([question_row(1), question_row("1")], r"line 2 repeats idx 1 of TVBench/Action Count, which .*line 1 has"),
        ([question_row(1), '{"messages": [{"ro'], r"TVBench\.jsonl line 2 is not JSON .*Copy the file again"),
        ([question_row(1), "[1]"], r"line 2 has no \"dataset\" and \"idx\""),
        ([question_row(1), '{"dataset": "TVBench/Action Count", "idx": 2}'], r"line 2 is not a row"),
        ([{**question_row(1), "messages": question_row(1)["messages"][:1]}], r"line 1 .*has no reference"),
        (
            [question_row(1), text_row(2, "<video> Why?", "TVBench/Action Count")],
            r"line 1 and .*TVBench\.jsonl line 2 have different formats",
        ),
        ([], r"TVBench\.jsonl is empty"),
    ],
)
def test_damaged_files(tmp_path: Path, lines: list[Any], message: str) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (tmp_path / "TVBench.jsonl").write_text("\n".join(texts), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_annotations(TVBENCH, tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"TVBench\.jsonl does not exist.*--annotations"):
        load_annotations(TVBENCH, tmp_path)
    with pytest.raises(InputError, match=r"tvbench needs TVBench\.jsonl\. Pass its directory as --annotations"):
        load_annotations(TVBENCH, None)


def test_limit_counts_videos() -> None:
    rows = [question_row(i, vid) for i, vid in enumerate("abacb")]
    assert [row["vid"] for row in first_videos(rows, 2)] == ["a", "b", "a", "b"]
    assert first_videos(rows, None) == first_videos(rows, 9) == rows


def test_messages_have_no_answer() -> None:
    row = with_answer(question_row(1), "A) a ring")
    assert Prediction.of(row).text == "A) a ring"
    user, assistant = messages_of(TVBENCH, row)
    assert user["content"][0] == {"type": "video", "video": {"video_file": "<placeholder>"}}
    assert texts(assistant) == [" Answer: (", ""]
    assert texts(messages_of(DREAM, with_answer(caption_row(1), "A ring jumps."))[1]) == [""]


def test_benchmarks_have_a_prompt_and_a_prefill() -> None:
    """They fill in for a row without them."""
    row = question_row(1)
    user, assistant = row["messages"]
    bare = {**row, "messages": [user, {**assistant, "content": assistant["content"][1:]}]}
    assert "".join(texts(messages_of(TVBENCH, bare)[1])) == " Answer: ("
    assert messages_of(TVBENCH, {**row, "messages": [user]})[1]["role"] == "assistant"
    silent = caption_row(1)
    silent["messages"][0]["content"].pop()
    assert texts(messages_of(DREAM, silent)[0]) == ["Describe the video in detail."]


@pytest.mark.parametrize(
    ("prompt", "question", "prefill"),
    [
        ("USER: <video> Question: Why?\n(A) So.\nASSISTANT: Answer: (", "Question: Why?\n(A) So.", " Answer: ("),
        ("USER: <video>\nWhy? ASSISTANT:\nAnswer: In the video,", "Why?", "\nAnswer: In the video,"),
        ("<video>\nDescribe the video in detail.", "Describe the video in detail.", " Answer: ("),
        ("Question: Why?", "Question: Why?", " Answer: ("),
    ],
)
def test_prompts_of_the_first_version(prompt: str, question: str, prefill: str) -> None:
    row = text_row(1, prompt, start_time=2.5, end_time=0)
    user, assistant = messages_of(VIDEO_MME, with_video_files(row, ["a.mp4"]))
    assert user["content"][0] == {"type": "video", "video": {"video_file": "a.mp4", "start_time": 2.5}}
    assert texts(user) == [question] and "".join(texts(assistant)) == prefill
    prediction = Prediction.of(with_answer(row, "B) since"))
    assert prediction.text == "B) since" and prediction.prompt == prompt and prediction.references == ("B",)


def test_videos_of_messages_can_be_replaced() -> None:
    messages = messages_of(TVBENCH, question_row(1, start_time=1.0))
    assert videos_of(messages) == [{"video_file": "<placeholder>", "start_time": 1.0}]
    assert videos_of(with_videos(messages, [{"frames": []}])) == [{"frames": []}]
    assert [item["type"] for item in with_videos(messages, [None])[0]["content"]] == ["text"]
