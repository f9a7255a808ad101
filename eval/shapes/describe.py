"""Scenes in words: descriptions, sentences of single events, and descriptions grounded in frames.

An event uses the names that its shapes have at its start (see `world`): "the red circle". Random phrasing, the argument
`rng`, only serves to train the tokenizer of the embedded model; delete it when that model is trained again. It
introduces a shape as "a red circle". If the previous event is of the same shape alone, it replaces the name by "it", or
omits it inside a sentence.
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
    phrasings,
    plain,
)
from eval.shapes.world import ROUND, TURNS, Fact, Scene, changed_frames, facts, pose_at
from tarsier_jax.processing.frame_sampling import sample_uniform

_LARGE = 0.12  # size above which a shape is "large"
_UPRIGHT = 10.0  # degrees below which a shape is not "tilted"
_SYMMETRY = {"bar": 2, "cross": 4}  # orientations in which a shape looks the same
_JOIN, _PRONOUN = 0.35, 0.7  # probabilities that two events share a sentence, and that a shape is "it"


def event_sentences(scene: Scene) -> list[str]:
    """Returns one canonical sentence per event, in order: "The red circle moves to the left."."""
    return [plain(fact) for fact in facts(scene)]


def describe(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Returns a description: one sentence per event, with the names of its shapes. `rng` varies the phrasing."""
    return " ".join(_sentences(facts(scene), rng, join=True))


def describe_grounded(scene: Scene, n: int = 16, rng: np.random.Generator | None = None) -> str:
    """Returns a description with `<frame: i-j>` before each event: the sampled frames that show it, from 1 to n.

    An event between two sampled frames belongs to the later one. Events that share a frame share a tag.
    """
    sentences = _sentences(facts(scene), rng, join=False)
    groups = frame_groups(scene, n)
    return " ".join(
        " ".join([_frame_tag(first, last), *(sentences[i] for i in events)]) for first, last, events in groups
    )


def _frame_tag(first: int, last: int) -> str:
    return f"<frame: {first}>" if first == last else f"<frame: {first}-{last}>"


def describe_frame(scene: Scene, frame: int) -> str:
    """Returns the shapes of one frame with their places, row by row and from left to right.

    "A large red circle at the top left, a small blue bar tilted clockwise in the middle."
    """
    poses = [(pose_at(scene, i, frame), shape.kind) for i, shape in enumerate(scene.shapes)]
    places = [(_third(pose.y / scene.height), _third(pose.x / scene.width), pose, kind) for pose, kind in poses]
    names = [
        f"{article(f'{_size(pose.size)} {pose.colour} {kind}')} {_tilt(kind, pose.angle)}{PLACES[row][column]}"
        for row, column, pose, kind in sorted(places, key=lambda p: (p[0], p[1], p[2].x, p[2].y))
        if pose.present
    ]
    return as_sentence(", ".join(names) or "nothing")


def _size(size: float) -> str:
    return "large" if size > _LARGE else "small"


def _tilt(kind: str, angle: float) -> str:
    """Returns the direction in which a shape is tilted, or an empty string if it looks upright."""
    if kind in ROUND:
        return ""
    period = 360.0 / _SYMMETRY.get(kind, 1)  # after which it looks the same
    angle = (angle + period / 2) % period - period / 2
    return "" if abs(angle) < _UPRIGHT else f"tilted {TURNS[0] if angle > 0 else TURNS[1]} "


def _third(share: float) -> int:
    """Returns the row or column, 0 to 2, of a coordinate from 0 to 1."""
    return min(int(3 * share), 2)


def frame_groups(scene: Scene, n: int) -> list[tuple[int, int, list[int]]]:
    """Returns (first, last, events) tuples: a range of the n sampled frames, from 1, and the events that it shows.

    The ranges ascend and do not overlap.
    """
    indices = sample_uniform(scene.frames, n)
    groups: list[tuple[int, int, list[int]]] = []
    for i, event in enumerate(scene.events):
        after = next((k for k, frame in enumerate(indices) if frame >= event.last), len(indices) - 1)
        frames = changed_frames(event, indices) or [after]
        first, last, events = frames[0] + 1, frames[-1] + 1, [i]
        if groups and groups[-1][1] >= first:
            earlier = groups.pop()
            first, last, events = earlier[0], max(earlier[1], last), [*earlier[2], i]
        groups.append((first, last, events))
    return groups


def _plain_sentences(events: Sequence[Fact]) -> list[str]:
    """Returns sentences whose wording does not depend on the number of events or on earlier sentences."""
    first, *later = events
    return [plain(first), *(f"Then {clause(fact)}." for fact in later)]


def _sentences(events: Sequence[Fact], rng: np.random.Generator | None, join: bool) -> list[str]:
    """Returns one sentence per event; with `join`, `rng` puts some pairs of events into one sentence."""
    if rng is None:
        return _plain_sentences(events)
    texts: list[str] = []
    known_names: set[str] = set()
    joined = True  # the last sentence cannot take another event
    for i, fact in enumerate(events):
        same = i > 0 and len(fact.names) == 1 == len(events[i - 1].names) and name_after(events[i - 1]) == fact.names[0]
        joined = join and not joined and rng.random() < _JOIN
        if joined:
            texts[-1] = f"{texts[-1][:-1]}{_joined(fact, known_names, same, rng)}."
        else:
            opening = _pick(FIRST if i == 0 else LAST if i == len(events) - 1 > 1 else NEXT, rng)
            short = same and rng.random() < _PRONOUN
            text = _pick(phrasings(fact, "it") if short else _with_names(fact, known_names, rng), rng)
            texts.append(as_sentence(opening + text))
        known_names |= {*fact.names, name_after(fact)}
    return texts


def _joined(fact: Fact, known_names: set[str], same: bool, rng: np.random.Generator) -> str:
    """Returns the continuation of a sentence with a second event: " and then turns blue"."""
    how = _pick(JOINED, rng)
    if same:
        return f" {how}{_pick(phrasings(fact, ''), rng)}"
    return f", {how} {_pick(_with_names(fact, known_names, rng), rng)}"


def _with_names(fact: Fact, known_names: set[str], rng: np.random.Generator) -> list[str]:
    """Returns all phrasings of a fact with the names of its shapes; two names are in random order."""
    names = [f"the {name}" if name in known_names else article(name) for name in fact.names]
    if len(names) == 2 and rng.random() < 0.5:
        names.reverse()
    return phrasings(fact, *names)


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
