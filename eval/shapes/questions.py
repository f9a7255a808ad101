"""Multiple-choice questions about a scene, with four options of which one is right.

Wrong options are events of the scene at the wrong time, then the right one played backwards, then events that do not
happen. No wrong option is half true: a shape that moves in any way is not said to move in another, nor one that changes
colour to take on a colour on the way.
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
    """`kind` is order, direction or antonym; `answer` is a letter, A to D."""

    kind: str
    text: str
    options: tuple[str, ...]
    answer: str

    def prompt(self) -> str:
        """The question as TVBench asks it, options on lines of their own."""
        lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, self.options, strict=True)]
        return "\n".join([f"Question: {self.text}", *lines])

    def reply(self) -> str:
        """The right option's words, and then its letter: from letters alone a small model learns next to nothing."""
        return f" {self.options[LETTERS.index(self.answer)]} Answer: ({self.answer})"


def letter_in(reply: str) -> str:
    """The letter that a reply chooses: its last "(B)", or all that it says. Empty if there is none."""
    chosen = re.findall(rf"\(([{LETTERS}])\)", reply) or re.findall(rf"^[ (]*([{LETTERS}])[ .)]*$", reply)
    return chosen[-1] if chosen else ""


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """All questions that the scene has an answer to, at least one: which event happens at all, and not backwards."""
    told = facts(scene)
    asked = [ask(scene, told, rng) for ask in (_antonym, _first, _last, _after, _direction)]
    return [question for question in asked if question is not None]


def sample_question(scene: Scene, rng: np.random.Generator) -> Question:
    """One of them at random."""
    asked = questions(scene, rng)
    return asked[int(rng.integers(len(asked)))]


def false_events(scene: Scene, rng: np.random.Generator) -> list[Fact]:
    """Events that do not happen in the scene, in random order."""
    told = set(facts(scene))
    pool = []
    for i, shape in enumerate(scene.shapes):
        names = names_of(scene, i)
        verbs = {fact.verb for fact in told if names & set(fact.names)}
        for name in sorted(names):
            pool += [Fact(verb, (name,)) for verb in ("grow", "shrink")]
            pool += [Fact("turn", (name,), turn) for turn in TURNS if shape.kind not in ROUND]
            pool += [Fact("jump", (name,))] if not verbs & set(_MOTIONS) else []
            pool += [Fact("move", (name,), way) for way in DIRECTIONS if not verbs & set(_MOTIONS)]
            pool += [Fact(verb, (name,)) for verb in ("appear", "disappear")]
            pool += [Fact("recolour", (name,), c) for c in COLOURS if "recolour" not in verbs and c not in name]
    return [pool[i] for i in rng.permutation(len(pool)) if pool[i] not in told]


def _antonym(scene: Scene, told: Sequence[Fact], rng: np.random.Generator) -> Question:
    right = told[int(rng.integers(len(told)))]
    wrong = [*_backwards(right, told), *false_events(scene, rng)]
    return _events("antonym", "Which of these happens in the video?", right, wrong, rng)


def _first(scene: Scene, told: Sequence[Fact], rng: np.random.Generator) -> Question | None:
    return _ordered(scene, told, rng, "What happens first?", 0)


def _last(scene: Scene, told: Sequence[Fact], rng: np.random.Generator) -> Question | None:
    return _ordered(scene, told, rng, "What happens last?", len(told) - 1)


def _after(scene: Scene, told: Sequence[Fact], rng: np.random.Generator) -> Question | None:
    """What comes next is asked in clips of three events or more; otherwise it is what happens last."""
    if len(told) < 3:
        return None
    i = int(rng.integers(1, len(told)))
    return _ordered(scene, told, rng, f"What happens right after {clause(told[i - 1])}?", i, i - 1)


def _ordered(
    scene: Scene, told: Sequence[Fact], rng: np.random.Generator, text: str, right: int, but: int = -1
) -> Question | None:
    """Options are the event at `right` and others of the scene, save the one at `but`."""
    if len(told) < 2:
        return None
    others = [told[i] for i in rng.permutation(len(told)) if i not in (right, but)]
    wrong = [*others, *_backwards(told[right], told), *false_events(scene, rng)]
    return _events("order", text, told[right], wrong, rng)


def _direction(scene: Scene, told: Sequence[Fact], rng: np.random.Generator) -> Question | None:
    """Asked of a shape that moves once, and neither flies, bounces nor swaps places."""
    aliases = [names_of(scene, i) for i in range(len(scene.shapes))]
    motions = [[f for f in told if f.verb in _MOTIONS and names & set(f.names)] for names in aliases]
    movers = [found[0] for found in motions if len(found) == 1 and found[0].verb == "move"]
    if not movers:
        return None
    fact = movers[int(rng.integers(len(movers)))]
    wrong = [as_sentence(DIRECTION_PHRASES[way][0]) for way in DIRECTIONS if way != fact.detail]
    text = f"In which direction does the {fact.names[0]} move?"
    return _question("direction", text, as_sentence(DIRECTION_PHRASES[fact.detail][0]), wrong, rng)


def _backwards(fact: Fact, told: Sequence[Fact]) -> list[Fact]:
    return [opposite(fact)] if opposite(fact) not in told else []


def _events(kind: str, text: str, right: Fact, wrong: Sequence[Fact], rng: np.random.Generator) -> Question:
    distinct = [fact for fact in dict.fromkeys(wrong) if fact != right]
    return _question(kind, text, plain(right), [plain(fact) for fact in distinct[:3]], rng)


def _question(kind: str, text: str, right: str, wrong: Sequence[str], rng: np.random.Generator) -> Question:
    place = int(rng.integers(len(LETTERS)))
    options = list(wrong)
    options.insert(place, right)
    return Question(kind, text, tuple(options), LETTERS[place])
