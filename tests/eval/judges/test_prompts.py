"""Prompts contain the texts of their tasks, and files of prompts are checked."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from eval.judges.judge import Task
from eval.judges.prompts import DEFAULT_PROMPTS, read_prompts
from eval.judges.tasks import AnswerComparison, EventEntailment, EventExtraction
from tarsier_jax.errors import InputError

EVENTS = ("It's a 'test'", 'he says "no"', "{caption} {events}")
TASKS = [
    EventExtraction('a "quoted" {caption} {}\n{description}'),
    EventEntailment("a {description} \\1 {events}", EVENTS),
    AnswerComparison("who {answer}?", "a man", "{question}"),
]
VALID: dict[str, Any] = {
    "extract_events": [{"role": "user", "content": 'Reply {"events": []} {} {1} { caption } {caption}'}],
    "entailment": [{"role": "system", "content": "{description}"}, {"role": "user", "content": "{events} {events}"}],
    "answer": [{"role": "user", "content": "{question}{answer}{prediction}"}],
}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.prompt)
def test_the_texts_of_a_task_are_in_the_messages_as_they_are(task: Task[Any]) -> None:
    text = "\n".join(message["content"] for message in DEFAULT_PROMPTS.messages(task))
    assert all(value in text for value in task.fields.values())
    assert list(task.placeholders) == list(task.fields)


def test_events_are_a_python_list_in_one_request() -> None:
    (message,) = DEFAULT_PROMPTS.messages(TASKS[1])
    assert repr(list(EVENTS)) in message["content"]


@pytest.mark.parametrize(("name", "task"), [("extract_events", TASKS[0]), ("answer", TASKS[2])])
def test_examples_in_the_prompts_are_replies_that_are_read(name: str, task: Task[Any]) -> None:
    example = DEFAULT_PROMPTS.templates[name][-1]["content"]
    assert all(task.read(reply) for reply in re.findall(r"^\{.*\}$", example, re.MULTILINE) if reply != "{caption}")


def test_half_surrogates_are_replaced() -> None:
    (message,) = DEFAULT_PROMPTS.messages(EventExtraction("smile \ud83d\ude00 half \ud83d end"))
    assert "smile \U0001f600 half \ufffd end" in message["content"]


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_prompts_of_a_file(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path / "prompts.json", VALID))
    assert prompts.messages(EventExtraction("{x} a")) == [
        {"role": "user", "content": 'Reply {"events": []} {} {1} { caption } {x} a'}
    ]
    assert [message["role"] for message in prompts.messages(TASKS[1])] == ["system", "user"]
    assert prompts.hash != DEFAULT_PROMPTS.hash
    assert prompts.hash == read_prompts(write(tmp_path / "copy.json", "\ufeff" + json.dumps(VALID, indent=1))).hash


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "prompts.json is not JSON"),
        ([], "keys extract_events, entailment, answer. Its keys are: none"),
        ({"answer": VALID["answer"]}, "Its keys are: answer"),
        ({**VALID, "other": []}, "Its keys are: extract_events, entailment, answer, other"),
        ({**VALID, "answer": "text"}, "answer must be a list of messages"),
        ({**VALID, "answer": []}, "answer must be a list of messages"),
        ({**VALID, "answer": [{"role": "tool", "content": "a"}]}, "roles system, user"),
        ({**VALID, "answer": [{"role": "user", "content": 1}]}, "answer must be a list of messages"),
        (
            {**VALID, "answer": [{"role": "user", "content": "{question}{answer}"}]},
            "lacks the placeholder {prediction}. Its placeholders are {question}, {answer}, {prediction}",
        ),
        (
            {**VALID, "extract_events": [{"role": "user", "content": "{caption}{video}"}]},
            "extract_events has the unknown placeholder {video}. Its placeholders are {caption}",
        ),
    ],
)
def test_unusable_files(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read_prompts(write(tmp_path / "prompts.json", value))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_prompts(tmp_path / "prompts.json")
