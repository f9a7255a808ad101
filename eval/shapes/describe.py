"""Scenes in words: descriptions, sentences of single events, and descriptions grounded in frames.

A shape goes by the name that it has when an event begins (see `world`): "the red circle". Random phrasings say "a red
circle" at first, and "it" (or nothing, in the same sentence) where the event before was its own and of no other shape.
"""

from collections.abc import Sequence

import numpy as np

from eval.shapes.words import (
    FIRST,
    JOINED,
    LAST,
    NEXT,
    PLACES,
    article,
    as_sentence,
    clause,
    name_after,
    plain,
    sentences,
)
from eval.shapes.world import ROUND, TURNS, Fact, Scene, changed_frames, facts, pose_at
from tarsier_jax.processing.frame_sampling import sample_uniform

_LARGE, _UPRIGHT = 0.12, 10.0  # of a frame, and degrees: what is called large, and not tilted
_SYMMETRY = {"bar": 2, "cross": 4}  # in how many ways a shape looks the same as it is turned once around
_JOIN, _PRONOUN = 0.35, 0.7  # how often, at random, two events share a sentence, and a shape is "it"


def event_sentences(scene: Scene) -> list[str]:
    """The atomic events in order, one canonical sentence each: "The red circle moves to the left."."""
    return [plain(fact) for fact in facts(scene)]


def describe(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A description. Without `rng` the plainest: one sentence an event, each with its shapes' names."""
    return " ".join(_tell(facts(scene), rng, join=True))


def describe_grounded(scene: Scene, n: int = 16, rng: np.random.Generator | None = None) -> str:
    """A description with `<frame: i-j>` before each event: which of n sampled frames show it, counted from 1.

    An event between two sampled frames goes to the frame after it. Events that then share a frame share a tag.
    """
    told = _tell(facts(scene), rng, join=False)
    groups = frame_groups(scene, n)
    return " ".join(
        f"<frame: {first}> {text}" if first == last else f"<frame: {first}-{last}> {text}"
        for first, last, events in groups
        for text in [" ".join(told[i] for i in events)]
    )


def describe_frame(scene: Scene, frame: int) -> str:
    """What is where in one frame, place by place: row by row, from left to right.

    "A large red circle at the top left, a small blue bar tilted clockwise in the middle."
    """
    poses = [(pose_at(scene, i, frame), shape.kind) for i, shape in enumerate(scene.shapes)]
    placed = [(_ninth(pose.y / scene.height), _ninth(pose.x / scene.width), pose, kind) for pose, kind in poses]
    shown = [
        f"{article(f'{_size(pose.size)} {pose.colour} {kind}')} {_tilt(kind, pose.angle)}{PLACES[row][column]}"
        for row, column, pose, kind in sorted(placed, key=lambda p: (p[0], p[1], p[2].x, p[2].y))
        if pose.present
    ]
    return as_sentence(", ".join(shown) or "nothing")


def _size(size: float) -> str:
    return "large" if size > _LARGE else "small"


def _tilt(kind: str, angle: float) -> str:
    """Empty for a shape that looks upright."""
    if kind in ROUND:
        return ""
    period = 360.0 / _SYMMETRY.get(kind, 1)  # after which it looks the same
    angle = (angle + period / 2) % period - period / 2
    return "" if abs(angle) < _UPRIGHT else f"tilted {TURNS[0] if angle > 0 else TURNS[1]} "


def _ninth(share: float) -> int:
    """In which row or column of ninths something lies, that is so far down or across, 0 to 1."""
    return min(int(3 * share), 2)


def frame_groups(scene: Scene, n: int) -> list[tuple[int, int, list[int]]]:
    """First and last of n sampled frames (from 1), and the events they show. Ranges ascend and do not overlap."""
    indices = sample_uniform(scene.frames, n)
    groups: list[tuple[int, int, list[int]]] = []
    for i, event in enumerate(scene.events):
        after = next((k for k, frame in enumerate(indices) if frame >= event.last), len(indices) - 1)
        shown = changed_frames(event, indices) or [after]
        first, last, events = shown[0] + 1, shown[-1] + 1, [i]
        if groups and groups[-1][1] >= first:
            earlier = groups.pop()
            first, last, events = earlier[0], max(earlier[1], last), [*earlier[2], i]
        groups.append((first, last, events))
    return groups


def _tell_plainly(told: Sequence[Fact]) -> list[str]:
    """Nothing in a sentence says how many others come, and no name hangs on those before."""
    first, *later = told
    return [plain(first), *(f"Then {clause(fact)}." for fact in later)]


def _tell(told: Sequence[Fact], rng: np.random.Generator | None, join: bool) -> list[str]:
    """One sentence an event, or with `join` and at random sometimes for two."""
    if rng is None:
        return _tell_plainly(told)
    texts: list[str] = []
    named: set[str] = set()
    joined = True  # the sentence that is being written cannot take another event
    for i, fact in enumerate(told):
        same = i > 0 and len(fact.names) == 1 == len(told[i - 1].names) and name_after(told[i - 1]) == fact.names[0]
        joined = join and not joined and rng.random() < _JOIN
        if joined:
            texts[-1] = f"{texts[-1][:-1]}{_joined(fact, named, same, rng)}."
        else:
            opening = _pick(FIRST if i == 0 else LAST if i == len(told) - 1 > 1 else NEXT, rng)
            short = same and rng.random() < _PRONOUN
            text = _pick(sentences(fact, "it") if short else _named(fact, named, rng), rng)
            texts.append(as_sentence(opening + text))
        named |= {*fact.names, name_after(fact)}
    return texts


def _joined(fact: Fact, named: set[str], same: bool, rng: np.random.Generator) -> str:
    """What follows in a sentence that has told one event: " and then turns blue"."""
    how = _pick(JOINED, rng)
    if same:
        return f" {how}{_pick(sentences(fact, ''), rng)}"
    return f", {how} {_pick(_named(fact, named, rng), rng)}"


def _named(fact: Fact, named: set[str], rng: np.random.Generator) -> list[str]:
    """All ways to tell a fact with the shapes' names, those of a pair in either order."""
    names = [f"the {name}" if name in named else article(name) for name in fact.names]
    if len(names) == 2 and rng.random() < 0.5:
        names.reverse()
    return sentences(fact, *names)


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
