"""The tasks of judges, and their answers.

`read` accepts exactly the replies that the original accepts (Tarsier, evaluation/metrics/evaluate_dream_gpt.py and
evaluate_qa_oe_gpt.py), with the same repairs.
"""

import ast
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

Relationship = Literal["entailment", "neutral", "contradiction"]
_FENCES = ("```json", "```python")


@dataclasses.dataclass(frozen=True)
class EventVerdict:
    """Whether a description entails an event.

    Attributes:
        event: The event as the judge returned it.
        relationship: "entailment", "neutral" or "contradiction".
        reason: The judge's reason; empty if it returned none.
        item: The verdict as the judge returned it; empty if the judge is not a language model.
    """

    event: str
    relationship: Relationship
    reason: str
    item: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class AnswerVerdict:
    """Whether a predicted answer is right.

    Attributes:
        pred: "yes" or "no".
        score: From 0 to 5.
    """

    pred: Literal["yes", "no"]
    score: float


@dataclasses.dataclass(frozen=True)
class EventExtraction:
    """Extracts the events of a caption; the answer is a list of strings.

    Attributes:
        caption: The caption.
    """

    prompt: ClassVar[str] = "extract_events"
    placeholders: ClassVar[tuple[str, ...]] = ("caption",)
    attempts: ClassVar[int] = 10

    caption: str

    @property
    def fields(self) -> dict[str, str]:
        return {"caption": self.caption}

    def read(self, reply: str) -> list[str]:
        """Reads a Python dictionary. As in the original, only the first event must be a string."""
        events = _item(_literal(_without_fence(reply)), "events")
        if not isinstance(events, list) or (events and not isinstance(events[0], str)):
            raise ValueError("`events` is not a list of strings")
        return events


@dataclasses.dataclass(frozen=True)
class EventEntailment:
    """Checks which events a description entails; the answer is a list of EventVerdict, one per event.

    Attributes:
        description: The description.
        events: The events.
        caption: The caption that contains the events. If there are none, the original asks about the caption instead,
            and accepts one verdict or none.
    """

    prompt: ClassVar[str] = "entailment"
    placeholders: ClassVar[tuple[str, ...]] = ("description", "events")
    attempts: ClassVar[int] = 10

    description: str
    events: tuple[str, ...]
    caption: str = ""

    @property
    def fields(self) -> dict[str, str]:
        events = list(self.events) or [self.caption.replace("\n", " ")]
        return {"description": self.description, "events": repr(events)}

    def read(self, reply: str) -> list[EventVerdict]:
        """Reads a JSON object after repairs. Its events may differ in order and text from those of the task."""
        items = _item(_json(_repaired(reply)), "events")
        items = list(items) if isinstance(items, list | str | dict) else [items]  # an empty string is an empty list
        if len(items) != len(self.events) and not (len(items) == 1 and not self.events):
            raise ValueError(f"there are {len(items)} verdicts on {len(self.events)} events")
        return [_verdict(item) for item in items]


@dataclasses.dataclass(frozen=True)
class AnswerComparison:
    """Compares a predicted answer with the right one; the answer is an AnswerVerdict.

    Attributes:
        question: The question.
        answer: The right answer.
        prediction: The predicted answer.
    """

    prompt: ClassVar[str] = "answer"
    placeholders: ClassVar[tuple[str, ...]] = ("question", "answer", "prediction")
    attempts: ClassVar[int] = 1

    question: str
    answer: str
    prediction: str

    @property
    def fields(self) -> dict[str, str]:
        return {"question": self.question, "answer": self.answer, "prediction": self.prediction}

    def read(self, reply: str) -> AnswerVerdict:
        """Reads a Python dictionary."""
        verdict = _literal(reply)
        pred, score = _item(verdict, "pred"), _item(verdict, "score")
        if pred not in ("yes", "no"):
            raise ValueError("`pred` is not 'yes' or 'no'")
        if not isinstance(score, int | float) or not 0 <= score <= 5:
            raise ValueError("`score` is not a number from 0 to 5")
        return AnswerVerdict(pred, float(score))


TASKS = (EventExtraction, EventEntailment, AnswerComparison)


def _without_fence(reply: str) -> str:
    for fence in _FENCES:
        if reply.startswith(fence):
            return reply.replace(fence, "").replace("```", "").strip()
    return reply


def _repaired(reply: str) -> str:
    """Returns a reply with the original's repairs, which also change the texts in it."""
    text = _without_fence(re.sub(r"\s+", " ", reply.strip()))
    text = text if text.startswith("{") else "{" + text
    text = text if text.endswith("}") else text + "}"
    text = text.replace("True", "true").replace("False", "false")
    text = text.replace("} {", "}, {").replace("}{", "}, {")
    text = text.replace(", }", "}").replace(",}", "}").replace(", ]", "]").replace(",]", "]")
    return text.replace("[Placeholder]", "null").replace("{Events:", "").strip()


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"it is not a Python literal ({error})") from None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None


def _item(container: Any, key: str) -> Any:
    try:
        return container[key]
    except (TypeError, KeyError, IndexError):
        raise ValueError(f"it lacks `{key}`") from None


def _verdict(item: Any) -> EventVerdict:
    relationship: Any = _item(item, "relationship")
    name: Any = relationship.strip().lower() if isinstance(relationship, str) else relationship
    if name not in get_args(Relationship):
        raise ValueError(f"the relationship {relationship!r} is none of {', '.join(get_args(Relationship))}")
    return EventVerdict(item.get("event", ""), name, item.get("reason", ""), item)
