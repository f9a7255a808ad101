"""Replies are read exactly as the original reads them."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval.judges.tasks import AnswerComparison, AnswerVerdict, EventEntailment, EventExtraction

GOLDENS = Path(__file__).parent.parent / "goldens"


def replies(name: str) -> list[dict[str, Any]]:
    return json.loads((GOLDENS / f"{name}_replies.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("golden", replies("extraction"), ids=lambda golden: golden["reply"][:40])
def test_extraction(golden: dict[str, Any]) -> None:
    task = EventExtraction("a caption")
    if golden["taken"]:
        assert task.read(golden["reply"]) == golden["events"]
    else:
        with pytest.raises(ValueError, match=r"."):
            task.read(golden["reply"])


@pytest.mark.parametrize("golden", replies("entailment"), ids=lambda golden: golden["reply"][:40])
def test_entailment(golden: dict[str, Any]) -> None:
    task = EventEntailment("a description", tuple(f"event {i}" for i in range(golden["events"])))
    if not golden["taken"]:
        with pytest.raises(ValueError, match=r"."):
            task.read(golden["reply"])
        return
    verdicts = task.read(golden["reply"])
    assert [verdict.item for verdict in verdicts] == golden["judged"]
    num_entailed = sum(verdict.relationship == "entailment" for verdict in verdicts)
    assert golden["hit"] == f"hit: {num_entailed} / {golden['events']}"


@pytest.mark.parametrize("golden", replies("question"), ids=lambda golden: golden["reply"][:40])
def test_comparison(golden: dict[str, Any]) -> None:
    task = AnswerComparison("who?", "a man", "a boy")
    if golden["taken"]:
        assert task.read(golden["reply"]) == AnswerVerdict(golden["pred"], golden["score"])
    else:
        with pytest.raises(ValueError, match=r"."):
            task.read(golden["reply"])


def verdicts_text(count: int, end: str = "") -> str:
    return json.dumps({"events": [{"event": "e", "relationship": "neutral"}] * count}) + end


@pytest.mark.parametrize(
    ("reply", "count"),
    [
        (verdicts_text(2).replace("},", "}"), 2),  # `} {`
        (verdicts_text(2).replace("}, ", "}"), 2),  # `}{`
        (verdicts_text(1).replace('"e"', "[Placeholder]"), 1),
        (verdicts_text(1).replace("}]", ", } , ]"), 1),
        (verdicts_text(1).replace("}]", ",, }]"), 1),
        (verdicts_text(1).replace("}]", ",,, }]"), None),  # the original removes two commas at most
        ("```json " + verdicts_text(1), 1),
        ("\n\n" + verdicts_text(1).replace(" ", "\n \t"), 1),
        ("{" * 100_000, None),
        ('{"events": null}', None),
        ('{"events": "a"}', None),
        ('{"events": [null]}', None),
        ('{"events": [{"event": "e", "relationship": null}]}', None),
        ('{"events": [{"event": "e", "relationship": []}]}', None),
    ],
)
def test_repairs(reply: str, count: int | None) -> None:
    task = EventEntailment("a description", ("e",) * (count or 1))
    if count is None:
        with pytest.raises(ValueError, match=r"."):
            task.read(reply)
    else:
        assert len(task.read(reply)) == count


@pytest.mark.parametrize("reply", ["(" * 100_000, "{'events': [a]}", "{'events': f()}", "\0", "None"])
def test_an_expression_is_not_executed(reply: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        EventExtraction("a caption").read(reply)
    with pytest.raises(ValueError, match=r"."):
        AnswerComparison("who?", "a man", "a boy").read(reply)


def test_a_caption_without_events_is_asked_about_as_one_event() -> None:
    task = EventEntailment("a description", (), caption="a man\nsits")
    assert task.fields["events"] == "['a man sits']"
    assert EventEntailment("a description", ("it's", 'a "b"')).fields["events"] == repr(["it's", 'a "b"'])
