"""A judge that answers from functions."""

from collections.abc import Callable, Mapping
from typing import Any

from eval.judges.judge import Task
from eval.judges.tasks import EventEntailment, EventExtraction, EventVerdict


class FakeJudge:
    """Answers a task with `answers[type(task)](task)`; `tasks` are those that it has received."""

    concurrency = 4
    settings: Mapping[str, Any] = {"judge": "fake"}

    def __init__(self, answers: Mapping[type, Callable[[Any], Any]]):
        self._answers = answers
        self.tasks: list[Any] = []

    def answer(self, task: Task[Any]) -> Any:
        self.tasks.append(task)
        return self._answers[type(task)](task)


def sentence_judge() -> FakeJudge:
    """Returns a judge whose events are sentences; a description entails the events that it contains."""

    def extract(task: EventExtraction) -> list[str]:
        return [sentence.strip() for sentence in task.caption.split(".") if sentence.strip()]

    def entail(task: EventEntailment) -> list[EventVerdict]:
        events = task.events or (task.caption,)
        is_entailed = [event.lower().strip(".") in task.description for event in events]
        names = ["entailment" if each else "neutral" for each in is_entailed]
        return [EventVerdict(event, name, "") for event, name in zip(events, names, strict=True)]

    return FakeJudge({EventExtraction: extract, EventEntailment: entail})
