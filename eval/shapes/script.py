"""Random scenes: `draw_scene`. A seed has the same events at any number of frames."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from eval.shapes.world import (
    COLOURS,
    DIRECTIONS,
    PAIR_VERBS,
    SHAPE_KINDS,
    TURNS,
    VERBS,
    Background,
    Change,
    Event,
    Fact,
    Pose,
    Scene,
    Shape,
    Sprite,
    between,
    still,
)
from tarsier_jax.errors import InputError

_MIN_FRAMES = 3  # per event
_ROWS = 3  # places for resting shapes along the shorter side
_LOOSE = 0.008  # the largest distance of a shape from the middle of its place, per axis
# The shortest duration of an event: a share of the clip, 2.5 of the 15 steps between 16 sampled frames, or in steps.
_SHORTEST, _STEPS_SHORTEST = 0.165, 2
_PAUSE = 0.015  # share of the clip between two events, if there is time
_TRIES = 60  # of each event, before the scene is discarded
_STEPS = 8  # at which the path of a moving shape is checked
_LARGE = (0.145, 0.155)  # the range of large sizes; small ones are smaller by _RATIO
_RATIO = 1.5
# Weights of the verbs: larger for events that are seldom possible.
_WEIGHTS = {
    **{"move": 10, "grow": 5, "shrink": 2, "turn": 3, "recolour": 2, "appear": 2},
    **{"disappear": 1, "jump": 5, "collide": 5, "swap": 5},
}
_VERB_POOL = tuple(verb for verb, weight in _WEIGHTS.items() for _ in range(weight))
# Less than half of the angle at which a shape looks the same again: this shows the direction.
_ANGLES = {"bar": 60.0, "triangle": 90.0, "cross": 30.0}
# Distance of colliding shapes as a share of their size: corners may overlap a little, flat sides touch.
_REACH = {"circle": 1.0, "ring": 1.0, "bar": 0.6, "triangle": 0.65, "cross": 0.8}

Outcome = tuple[str, list[Change]]  # the detail of an event, and one change per actor


@dataclasses.dataclass
class _Stage:
    """The state of a scene while its events are drawn.

    Attributes:
        width: Of the scene.
        height: Of the scene.
        kinds: Kind per shape.
        poses: Pose per shape.
        large: Large size per shape.
        names: The shape of every name up to now.
        facts: The events up to now.
    """

    width: float
    height: float
    kinds: list[str]
    poses: list[Pose]
    large: list[float]
    names: dict[str, int]
    facts: set[Fact]


def draw_scene(
    rng: np.random.Generator,
    frames: int = 32,
    aspect: float = 1.0,
    shapes: int | None = None,
    events: int | None = None,
    verb: str | None = None,
) -> Scene:
    """Returns a random scene of one to three shapes and one to five events.

    Args:
        frames: Length of the clip. Every event is visible in at least two of the steps between frames, or between 16
            sampled frames if the clip is longer.
        aspect: Width over height.
        shapes: Number of shapes; random if None.
        events: Number of events; random if None.
        verb: Verb of the first event; random if None.

    Raises:
        InputError: the clip is too short for its events, a number is out of range, the verb is unknown, or it needs two
            shapes and there is one.
    """
    fewest = 2 if verb in PAIR_VERBS else 1
    n_shapes = int(rng.integers(fewest, 4)) if shapes is None else shapes
    n_events = int(rng.integers(1, 6)) if events is None else events
    short = frames < _MIN_FRAMES * n_events
    if short or not 1 <= n_shapes <= 3 or not 1 <= n_events <= 5 or not 0.5 <= aspect <= 2:
        raise InputError(
            f"A scene has 1 to 3 shapes, 1 to 5 events, {_MIN_FRAMES} frames or more for each of them and an aspect of "
            f"0.5 to 2, not {n_shapes}, {n_events}, {frames} and {aspect}."
        )
    if verb is not None and (verb not in VERBS or n_shapes < fewest):
        raise InputError(
            f"{n_shapes} shapes cannot {verb!r}. Verbs: {', '.join(VERBS)}; {' and '.join(PAIR_VERBS)} take two."
        )
    while True:
        scene = _attempt(rng, frames, (max(aspect, 1.0), max(1 / aspect, 1.0)), n_shapes, n_events, verb)
        if scene is not None:
            return scene


def _attempt(
    rng: np.random.Generator, frames: int, size: tuple[float, float], n_shapes: int, n_events: int, verb: str | None
) -> Scene | None:
    stage = _set_stage(rng, size, n_shapes)
    if stage is None:
        return None
    shapes = tuple(Shape(kind, pose) for kind, pose in zip(stage.kinds, stage.poses, strict=True))
    visible = [pose.present for pose in stage.poses]
    spans = _spans(rng, n_events, frames)
    events = []
    for first, last in spans:
        verbs = (verb if verb and not events else _pick(rng, _VERB_POOL) for _ in range(_TRIES))
        event = next((e for e in (_propose(rng, stage, v) for v in verbs) if e is not None), None)
        if event is None:
            return None
        event_verb, detail, changes = event
        for change in changes:
            stage.poses[change.shape] = change.after
            stage.names[f"{change.after.colour} {stage.kinds[change.shape]}"] = change.shape
            visible[change.shape] |= change.after.present
        events.append(Event(event_verb, detail, first, last, tuple(changes)))
    if not all(visible):
        return None
    return Scene(*size, frames, _background(rng), shapes, tuple(events))


def _set_stage(rng: np.random.Generator, size: tuple[float, float], n_shapes: int) -> _Stage | None:
    stage = _Stage(*size, [], [], [], {}, set())
    columns, rows = (round(_ROWS * side) for side in size)
    for i, place in enumerate(rng.permutation(columns * rows)[:n_shapes]):
        kind, colour, large = _pick(rng, SHAPE_KINDS), _pick(rng, tuple(COLOURS)), rng.uniform(*_LARGE)
        if f"{colour} {kind}" in stage.names:
            return None
        row, column = divmod(int(place), columns)
        x, y = (column + 0.5) * size[0] / columns, (row + 0.5) * size[1] / rows
        x, y = (at + rng.uniform(-_LOOSE, _LOOSE) for at in (x, y))
        radius = large if rng.random() < 0.5 else large / _RATIO
        stage.kinds.append(kind)
        stage.large.append(large)
        stage.poses.append(Pose(x, y, radius, 0.0, colour, present=rng.random() > 0.15))
        stage.names[f"{colour} {kind}"] = i
    return stage


def _background(rng: np.random.Generator) -> Background:
    """Returns a dark or medium, nearly grey background; every colour and the rims contrast with it."""
    level = rng.uniform(20, 100)
    contrast = rng.uniform(6, 18) * (1 if rng.random() < 0.5 else -1)
    tint = rng.uniform(-8, 8, 3)
    colours = [np.clip(level + tint + shift, 0, 255).astype(int).tolist() for shift in (-contrast, contrast)]
    style = _pick(rng, ("plain", "gradient", "stripes", "checks"))
    (a, b) = (tuple(c) for c in colours)
    return Background(style, (a, b), rng.uniform(0.06, 0.2), rng.random() < 0.5)


def _spans(rng: np.random.Generator, n: int, frames: int) -> list[tuple[int, int]]:
    """Returns the first and last frame per event. Time beyond the shortest durations is distributed at random."""
    shortest = max(_SHORTEST, _STEPS_SHORTEST / (frames - 1))
    pause = min(_PAUSE, (1 - n * shortest) / n)
    free = 1 - n * shortest - (n - 1) * pause
    shares = rng.dirichlet(np.ones(2 * n + 1)) * free
    spans, time = [], 0.0
    for i in range(n):
        start = time + shares[2 * i] + (pause if i else 0)
        time = start + shortest + shares[2 * i + 1]
        spans.append((round(start * (frames - 1)), round(time * (frames - 1))))
    return spans


def _propose(rng: np.random.Generator, stage: _Stage, verb: str) -> tuple[str, str, list[Change]] | None:
    """Returns verb, detail and changes of a random event with this verb, or None if it is not possible."""
    count = 2 if verb in PAIR_VERBS else 1
    if len(stage.poses) < count:
        return None
    actors = rng.permutation(len(stage.poses))[:count].tolist()
    if any(stage.poses[i].present == (verb == "appear") for i in actors):
        return None
    outcome = _MAKERS[verb](rng, stage, actors)
    if outcome is None or not _clear(stage, outcome[1], verb):
        return None
    fact = Fact(verb, tuple(sorted(f"{stage.poses[i].colour} {stage.kinds[i]}" for i in actors)), outcome[0])
    if fact in stage.facts:
        return None
    stage.facts.add(fact)
    return verb, *outcome


def _move(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Outcome:
    """Moves a shape by one or two places."""
    pose, direction, places = stage.poses[actors[0]], _pick(rng, DIRECTIONS), int(rng.integers(1, 3))
    steps = -places if direction in ("left", "up") else places
    if direction in ("left", "right"):
        return direction, [_change(stage, actors[0], x=pose.x + steps * stage.width / round(_ROWS * stage.width))]
    return direction, [_change(stage, actors[0], y=pose.y + steps * stage.height / round(_ROWS * stage.height))]


def _grow(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Outcome | None:
    return _resize(stage, actors[0], stage.large[actors[0]])


def _shrink(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Outcome | None:
    return _resize(stage, actors[0], stage.large[actors[0]] / _RATIO)


def _resize(stage: _Stage, shape: int, size: float) -> Outcome | None:
    return None if size == stage.poses[shape].size else ("", [_change(stage, shape, size=size)])


def _turn(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Outcome | None:
    angle, direction = _ANGLES.get(stage.kinds[actors[0]]), _pick(rng, TURNS)
    if angle is None:
        return None
    sign = 1 if direction == "clockwise" else -1
    return direction, [_change(stage, actors[0], angle=stage.poses[actors[0]].angle + sign * angle)]


def _recolour(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Outcome | None:
    colour, shape = _pick(rng, tuple(COLOURS)), actors[0]
    if colour == stage.poses[shape].colour or stage.names.get(f"{colour} {stage.kinds[shape]}", shape) != shape:
        return None
    return colour, [_change(stage, shape, colour=colour)]


def _appear(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Outcome:
    return "", [_change(stage, actors[0], present=True)]


def _disappear(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Outcome:
    return "", [_change(stage, actors[0], present=False)]


def _jump(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Outcome:
    return "", [dataclasses.replace(_change(stage, actors[0]), via=(0.0, -rng.uniform(0.28, 0.34)))]


def _collide(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Outcome | None:
    """Moves two shapes towards each other until they touch half-way, and back to their places."""
    a, b = (stage.poses[i] for i in actors)
    distance = np.hypot(b.x - a.x, b.y - a.y)
    run = (distance - sum(stage.poses[i].size * _REACH[stage.kinds[i]] for i in actors)) / 2
    if run < 0.1:
        return None
    x, y = float((b.x - a.x) * run / distance), float((b.y - a.y) * run / distance)
    offsets = ((x, y), (-x, -y))
    return "", [dataclasses.replace(_change(stage, i), via=via) for i, via in zip(actors, offsets, strict=True)]


def _swap(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Outcome:
    """Moves two shapes straight to each other's place; one covers the other where they meet."""
    a, b = (stage.poses[i] for i in actors)
    return "", [_change(stage, actors[0], x=b.x, y=b.y), _change(stage, actors[1], x=a.x, y=a.y)]


_MAKERS: dict[str, Callable[[np.random.Generator, _Stage, list[int]], Outcome | None]] = {
    "move": _move,
    "grow": _grow,
    "shrink": _shrink,
    "turn": _turn,
    "recolour": _recolour,
    "appear": _appear,
    "disappear": _disappear,
    "jump": _jump,
    "collide": _collide,
    "swap": _swap,
}


def _change(stage: _Stage, shape: int, **to: object) -> Change:
    pose = stage.poses[shape]
    return Change(shape, pose, dataclasses.replace(pose, **to))


def _clear(stage: _Stage, changes: list[Change], verb: str) -> bool:
    """Returns whether the actors stay inside the scene and apart from all other shapes."""
    actors = {c.shape for c in changes}
    others = [still("", p) for i, p in enumerate(stage.poses) if i not in actors]
    # From the last step on, where most conflicts are.
    moving = (between("", verb, c, step, _STEPS) for step in range(_STEPS, -1, -1) for c in changes)
    return all(_inside(s, stage) and not any(_near(s, o) for o in others) for s in moving)


def _inside(s: Sprite, stage: _Stage) -> bool:
    return s.size <= s.x <= stage.width - s.size and s.size <= s.y <= stage.height - s.size


def _near(a: Sprite, b: Sprite) -> bool:
    return (a.x - b.x) ** 2 + (a.y - b.y) ** 2 < (a.size + b.size) ** 2


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
