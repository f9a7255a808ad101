"""A judge with rules: it parses the events of a description (see `words`) and matches them in order.

Recall is the share of the reference's events that the description contains, precision is the share of the description's
events that the reference contains (AutoDQ, arXiv 2407.00634). The matches are the longest common subsequence of the two
lists of events: if two events are in the wrong order, one of them does not match. The part of a sentence that cannot be
parsed is one event that matches nothing. Case, articles, commas, the final period and frame tags are ignored.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from eval.judges.judge import Task
from eval.judges.tasks import AnswerComparison, AnswerVerdict, EventEntailment, EventExtraction, EventVerdict
from eval.shapes.words import ALONE, OF_TWO, WITH, name_after, plain
from eval.shapes.world import COLOURS, SHAPE_KINDS, Fact
from tarsier_jax.errors import InputError

UNREAD = "unread"  # the verb of text that cannot be parsed


def _any(words: Sequence[str]) -> str:
    return "(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


_OF_TWO = {phrase: verb for verb, phrases in OF_TWO.items() for phrase in phrases}
_WITH = {phrase: verb for verb, phrases in WITH.items() for phrase in phrases}
_NAME = f"(?:(?:an?|the) )?({_any(list(COLOURS))} {_any(SHAPE_KINDS)})"
_LINKS = "(?:(?:and|then|next|first|finally|after that|at the end|also) )*"
_END = "(?: |$)"
_PAIR_CLAUSE = re.compile(f"{_LINKS}{_NAME} and {_NAME} ({_any(list(_OF_TWO))}){_END}")
_WITH_CLAUSE = re.compile(f"{_LINKS}(?:{_NAME} |(it) )?({_any(list(_WITH))}) {_NAME}{_END}")
_CLAUSE = re.compile(f"{_LINKS}(?:{_NAME} |(it) )?({_any(list(ALONE))}){_END}")
_TAG = re.compile(r"<frame:[^>]*>")


class _Reader:
    """Parses clauses.

    Attributes:
        events: The events up to the current position.
        it: The shape that "it" refers to.
        subject: The shape that a clause without a subject refers to.
    """

    def __init__(self) -> None:
        self.events: list[Fact] = []
        self.it: str | None = None
        self.subject: str | None = None

    def sentence(self, text: str) -> None:
        self.subject, at = None, 0
        while at < len(text):
            end = self._clause(text, at)
            if end is None:
                self.events.append(Fact(UNREAD, (), text[at:]))
                return
            at = end

    def _clause(self, text: str, at: int) -> int | None:
        """Parses one clause; returns its end, or None if there is no clause."""
        if match := _PAIR_CLAUSE.match(text, at):
            a, b, phrase = match.groups()
            self._note(Fact(_OF_TWO[phrase], tuple(sorted((a, b)))), None, b)
        elif (match := _WITH_CLAUSE.match(text, at)) and (subject := self._subject(match[1], match[2])):
            self._note(Fact(_WITH[match[3]], tuple(sorted((subject, match[4])))), subject, match[4])
        elif (match := _CLAUSE.match(text, at)) and (subject := self._subject(match[1], match[2])):
            fact = Fact(ALONE[match[3]][0], (subject,), ALONE[match[3]][1])
            self._note(fact, name_after(fact), name_after(fact))
        else:
            return None
        return match.end()

    def _subject(self, name: str | None, pronoun: str | None) -> str | None:
        return name or (self.it if pronoun else self.subject)

    def _note(self, fact: Fact, subject: str | None, it: str) -> None:
        self.events.append(fact)
        self.subject, self.it = subject, it


def events_of(text: str) -> list[Fact]:
    """Returns the events of a text in order; text that cannot be parsed has the verb UNREAD."""
    reader = _Reader()
    for sentence in re.split(r"[.!?;\n]", _TAG.sub(" ", text.lower())):
        if words := " ".join(sentence.replace(",", " ").split()):
            reader.sentence(words)
    return reader.events


def match_events(described: Sequence[Fact], reference: Sequence[Fact]) -> tuple[int, ...]:
    """Returns the positions in `reference` of a longest common subsequence; UNREAD events match nothing."""
    row: list[tuple[int, ...]] = [()] * (len(reference) + 1)
    for fact in described:
        before = row
        row = [()]
        for j, other in enumerate(reference):
            same = fact == other and fact.verb != UNREAD
            row.append((*before[j], j) if same else max(before[j + 1], row[j], key=len))
    return row[-1]


def score_description(description: str, reference_events: Sequence[str]) -> tuple[float, float]:
    """Returns recall and precision, 0 to 1; the share of an empty list is 1, as in AutoDQ."""
    described = events_of(description)
    reference = [fact for event in reference_events for fact in events_of(event)]
    matches = len(match_events(described, reference))
    return matches / len(reference) if reference else 1.0, matches / len(described) if described else 1.0


def corpus_scores(descriptions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns the mean recall and precision of several clips, and F1 of the means: keys f1, recall, precision.

    Raises:
        InputError: the lists differ in length, or are empty.
    """
    if not descriptions or len(descriptions) != len(references):
        raise InputError(
            f"There are {len(descriptions)} descriptions and {len(references)} lists of events. Pass equally many."
        )
    scores = [score_description(text, events) for text, events in zip(descriptions, references, strict=True)]
    recall, precision = (sum(values) / len(scores) for values in zip(*scores, strict=True))
    total = recall + precision
    return {"f1": 2 * recall * precision / total if total else 0.0, "recall": recall, "precision": precision}


class RulesJudge:
    """Answers the tasks of language models by the rules of this module, about moving shapes only."""

    name: ClassVar[str] = "rules"
    settings: Mapping[str, Any] = {"judge": name}
    concurrency = 1

    def answer(self, task: Task[Any]) -> Any:
        """Answers a task; see `eval.judges.judge.Judge`."""
        match task:
            case EventExtraction():
                return [fact.detail if fact.verb == UNREAD else plain(fact) for fact in events_of(task.caption)]
            case EventEntailment():
                return _event_verdicts(task.description, task.events)
            case AnswerComparison():
                same = _words(task.answer) == _words(task.prediction)
                return AnswerVerdict("yes", 5.0) if same else AnswerVerdict("no", 0.0)
        raise TypeError(f"{type(task).__name__} is not a task of this judge")


def _event_verdicts(description: str, events: Sequence[str]) -> list[EventVerdict]:
    """Returns "entailment" for the events of a longest common subsequence with the description."""
    facts = [(i, fact) for i, event in enumerate(events) for fact in events_of(event)]
    matches = match_events(events_of(description), [fact for _, fact in facts])
    others = {i for position, (i, _) in enumerate(facts) if position not in matches}
    parsed = {i for i, _ in facts}
    return [
        EventVerdict(event, "entailment" if i in parsed - others else "contradiction", "")
        for i, event in enumerate(events)
    ]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
