"""Multiple-choice questions about a scene, with four options of which one is right.

Wrong options are events of the scene at another time, then the right event played backwards, then events that do not
happen. No wrong option is half true: if a shape moves, no option has it move in another direction, and if it changes
its colour, no option has another change of its colour.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from eval.shapes.words import DIRECTION_PHRASES, as_sentence, clause, plain
from eval.shapes.world import COLOURS, DIRECTIONS, ROUND, TURNS, Fact, Scene, facts, names_of, opposite

LETTERS = "ABCD"
_MOTIONS = ("move", "jump", "collide", "swap")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        kind: "order", "direction" or "antonym".
        text: The question.
        options: The four options.
        answer: Letter of the right option, A to D.
    """

    kind: str
    text: str
    options: tuple[str, ...]
    answer: str

    def prompt(self) -> str:
        """Returns the prompt in the format of TVBench, with one option per line."""
        lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, self.options, strict=True)]
        return "\n".join([f"Question: {self.text}", *lines])

    def reply(self) -> str:
        """Returns the right option and then its letter: a small model learns next to nothing from letters alone."""
        return f" {self.options[LETTERS.index(self.answer)]} Answer: ({self.answer})"


def letter_in(reply: str) -> str:
    """Returns the letter of a reply: the last one in parentheses, or the whole reply. Empty if there is none."""
    letters = re.findall(rf"\(([{LETTERS}])\)", reply) or re.findall(rf"^[ (]*([{LETTERS}])[ .)]*$", reply)
    return letters[-1] if letters else ""


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Returns all questions that have an answer in the scene; one about an event that happens at all is among them."""
    events = facts(scene)
    candidates = [make(scene, events, rng) for make in (_antonym, _first, _last, _after, _direction)]
    return [question for question in candidates if question is not None]


def sample_question(scene: Scene, rng: np.random.Generator) -> Question:
    """Returns one of the scene's questions at random."""
    candidates = questions(scene, rng)
    return candidates[int(rng.integers(len(candidates)))]


def false_events(scene: Scene, rng: np.random.Generator) -> list[Fact]:
    """Returns events that do not happen in the scene, in random order."""
    events = set(facts(scene))
    pool = []
    for i, shape in enumerate(scene.shapes):
        names = names_of(scene, i)
        verbs = {fact.verb for fact in events if names & set(fact.names)}
        for name in sorted(names):
            pool += [Fact(verb, (name,)) for verb in ("grow", "shrink")]
            pool += [Fact("turn", (name,), turn) for turn in TURNS if shape.kind not in ROUND]
            pool += [Fact("jump", (name,))] if not verbs & set(_MOTIONS) else []
            pool += [Fact("move", (name,), way) for way in DIRECTIONS if not verbs & set(_MOTIONS)]
            pool += [Fact(verb, (name,)) for verb in ("appear", "disappear")]
            pool += [Fact("recolour", (name,), c) for c in COLOURS if "recolour" not in verbs and c not in name]
    return [pool[i] for i in rng.permutation(len(pool)) if pool[i] not in events]


def _antonym(scene: Scene, events: Sequence[Fact], rng: np.random.Generator) -> Question:
    right = events[int(rng.integers(len(events)))]
    wrong = [*_backwards(right, events), *false_events(scene, rng)]
    return _event_question("antonym", "Which of these happens in the video?", right, wrong, rng)


def _first(scene: Scene, events: Sequence[Fact], rng: np.random.Generator) -> Question | None:
    return _ordered(scene, events, rng, "What happens first?", 0)


def _last(scene: Scene, events: Sequence[Fact], rng: np.random.Generator) -> Question | None:
    return _ordered(scene, events, rng, "What happens last?", len(events) - 1)


def _after(scene: Scene, events: Sequence[Fact], rng: np.random.Generator) -> Question | None:
    """Returns a question about the next event; None for fewer than three events, where the next one is the last."""
    if len(events) < 3:
        return None
    i = int(rng.integers(1, len(events)))
    return _ordered(scene, events, rng, f"What happens right after {clause(events[i - 1])}?", i, i - 1)


def _ordered(
    scene: Scene, events: Sequence[Fact], rng: np.random.Generator, text: str, right: int, excluded: int = -1
) -> Question | None:
    """Returns a question whose options are events of the scene, without the one at `excluded`."""
    if len(events) < 2:
        return None
    others = [events[i] for i in rng.permutation(len(events)) if i not in (right, excluded)]
    wrong = [*others, *_backwards(events[right], events), *false_events(scene, rng)]
    return _event_question("order", text, events[right], wrong, rng)


def _direction(scene: Scene, events: Sequence[Fact], rng: np.random.Generator) -> Question | None:
    """Returns a question about a shape that moves once, and does not jump, collide or swap places."""
    aliases = [names_of(scene, i) for i in range(len(scene.shapes))]
    motions = [[f for f in events if f.verb in _MOTIONS and names & set(f.names)] for names in aliases]
    movers = [moves[0] for moves in motions if len(moves) == 1 and moves[0].verb == "move"]
    if not movers:
        return None
    fact = movers[int(rng.integers(len(movers)))]
    wrong = [as_sentence(DIRECTION_PHRASES[direction][0]) for direction in DIRECTIONS if direction != fact.detail]
    text = f"In which direction does the {fact.names[0]} move?"
    return _question("direction", text, as_sentence(DIRECTION_PHRASES[fact.detail][0]), wrong, rng)


def _backwards(fact: Fact, events: Sequence[Fact]) -> list[Fact]:
    return [opposite(fact)] if opposite(fact) not in events else []


def _event_question(kind: str, text: str, right: Fact, wrong: Sequence[Fact], rng: np.random.Generator) -> Question:
    distinct = [fact for fact in dict.fromkeys(wrong) if fact != right]
    return _question(kind, text, plain(right), [plain(fact) for fact in distinct[:3]], rng)


def _question(kind: str, text: str, right: str, wrong: Sequence[str], rng: np.random.Generator) -> Question:
    place = int(rng.integers(len(LETTERS)))
    options = list(wrong)
    options.insert(place, right)
    return Question(kind, text, tuple(options), LETTERS[place])
