"""The tasks of judges, and their answers."""

import dataclasses
from typing import Literal

Relationship = Literal["entailment", "neutral", "contradiction"]


@dataclasses.dataclass(frozen=True)
class EventVerdict:
    """Whether a description entails an event.

    Attributes:
        event: The event as the judge returned it.
        relationship: "entailment", "neutral" or "contradiction".
        reason: The judge's reason; empty if it returned none.
    """

    event: str
    relationship: Relationship
    reason: str


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

    caption: str


@dataclasses.dataclass(frozen=True)
class EventEntailment:
    """Checks which events a description entails; the answer is a list of EventVerdict, one per event.

    Attributes:
        description: The description.
        events: The events.
        is_caption: Whether the only event is a whole caption, in place of an empty list. Then the answer may also be
            an empty list.
    """

    description: str
    events: tuple[str, ...]
    is_caption: bool = False


@dataclasses.dataclass(frozen=True)
class AnswerComparison:
    """Compares a predicted answer with the right one; the answer is an AnswerVerdict.

    Attributes:
        question: The question.
        answer: The right answer.
        prediction: The predicted answer.
    """

    question: str
    answer: str
    prediction: str
