"""Random scenes: `generate`. The same seed gives the same story at any number of frames."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from eval.shapes.world import (
    COLOURS,
    DIRECTIONS,
    KINDS,
    PAIR_VERBS,
    TURNS,
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

MIN_FRAMES = 8
_MARGIN = 0.02  # between shapes, and between a shape and the border
_SHORTEST = 0.165  # of an event, as a share of the clip: 2.5 of the 15 steps between 16 sampled frames
_PAUSE = 0.015  # at least, between two events
_TRIES = 60  # at a next event, before a scene is begun anew
_STEPS = 8  # at which the way of a moving shape is checked
_SIZES = (0.11, 0.32)
# How often a verb is drawn: more often where it can seldom happen.
_WEIGHTS = {"move": 10, "grow": 5, "shrink": 2, "turn": 2, "recolour": 2, "appear": 2}
_WEIGHTS |= {"disappear": 1, "jump": 5, "collide": 6, "swap": 10}
_DRAWN = tuple(verb for verb, weight in _WEIGHTS.items() for _ in range(weight))
# Less than half of the angle at which a shape looks the same again, so that the direction can be seen.
_ANGLES = {"bar": 60.0, "triangle": 90.0, "cross": 40.0}
# How near shapes come that collide, as a share of their size: corners may overlap a little, flat sides touch.
_REACH = {"circle": 1.0, "ring": 1.0, "bar": 0.6, "triangle": 0.65, "cross": 0.8}

Made = tuple[str, list[Change]]  # the event's detail, and what it does to each actor


@dataclasses.dataclass
class _Stage:
    width: float
    height: float
    kinds: list[str]
    poses: list[Pose]
    names: dict[str, int]  # each name ever borne, and the shape that bears it
    told: set[Fact]


def generate(
    rng: np.random.Generator,
    frames: int = 32,
    aspect: float = 1.0,
    shapes: int | None = None,
    events: int | None = None,
) -> Scene:
    """A random scene of one to three shapes and one to five events.

    Args:
        frames: how long the clip is.  From 16 frames on, every event shows at work in at least two of the steps between
            16 sampled frames.
        aspect: width over height.  shapes, events: how many, drawn at random if not given.

    Raises:
        InputError: the clip is too short for five events, or a count is out of range.
    """
    n_shapes = int(rng.integers(1, 4)) if shapes is None else shapes
    n_events = int(rng.integers(1, 6)) if events is None else events
    if frames < MIN_FRAMES or not 1 <= n_shapes <= 3 or not 1 <= n_events <= 5 or not 0.5 <= aspect <= 2:
        raise InputError(
            f"A scene has 1 to 3 shapes, 1 to 5 events, {MIN_FRAMES} frames or more and an aspect of 0.5 to 2, not "
            f"{n_shapes}, {n_events}, {frames} and {aspect}."
        )
    while True:
        scene = _attempt(rng, frames, (max(aspect, 1.0), max(1 / aspect, 1.0)), n_shapes, n_events)
        if scene is not None:
            return scene


def _attempt(
    rng: np.random.Generator, frames: int, size: tuple[float, float], n_shapes: int, n_events: int
) -> Scene | None:
    stage = _set_stage(rng, size, n_shapes)
    if stage is None:
        return None
    shapes = tuple(Shape(kind, pose) for kind, pose in zip(stage.kinds, stage.poses, strict=True))
    seen = [pose.present for pose in stage.poses]
    spans = _spans(rng, n_events, frames)
    events = []
    for first, last in spans:
        made = next((e for e in (_propose(rng, stage) for _ in range(_TRIES)) if e is not None), None)
        if made is None:
            return None
        verb, detail, changes = made
        for change in changes:
            stage.poses[change.shape] = change.after
            stage.names[f"{change.after.colour} {stage.kinds[change.shape]}"] = change.shape
            seen[change.shape] |= change.after.present
        events.append(Event(verb, detail, first, last, tuple(changes)))
    if not all(seen):
        return None
    return Scene(*size, frames, _background(rng), shapes, tuple(events))


def _set_stage(rng: np.random.Generator, size: tuple[float, float], n_shapes: int) -> _Stage | None:
    stage = _Stage(*size, [], [], {}, set())
    for i in range(n_shapes):
        kind, colour = _pick(rng, KINDS), _pick(rng, tuple(COLOURS))
        radius = rng.uniform(0.15, 0.21)
        x, y = (rng.uniform(radius + _MARGIN, side - radius - _MARGIN) for side in size)
        pose = Pose(x, y, radius, 0.0, colour, present=rng.random() > 0.15)
        if f"{colour} {kind}" in stage.names or any(_near(still(kind, pose), still(kind, p)) for p in stage.poses):
            return None
        stage.kinds.append(kind)
        stage.poses.append(pose)
        stage.names[f"{colour} {kind}"] = i
    return stage


def _background(rng: np.random.Generator) -> Background:
    """Dark or middling, and nearly grey, so that every colour and the shapes' rims stand out."""
    level = rng.uniform(20, 100)
    contrast = rng.uniform(6, 18) * (1 if rng.random() < 0.5 else -1)
    tint = rng.uniform(-8, 8, 3)
    colours = [np.clip(level + tint + shift, 0, 255).astype(int).tolist() for shift in (-contrast, contrast)]
    style = _pick(rng, ("plain", "gradient", "stripes", "checks"))
    (a, b) = (tuple(c) for c in colours)
    return Background(style, (a, b), rng.uniform(0.06, 0.2), rng.random() < 0.5)


def _spans(rng: np.random.Generator, n: int, frames: int) -> list[tuple[int, int]]:
    """When the events happen: what is left beside their shortest duration is shared at random with the pauses."""
    free = 1 - n * _SHORTEST - (n - 1) * _PAUSE
    shares = rng.dirichlet(np.ones(2 * n + 1)) * free
    spans, time = [], 0.0
    for i in range(n):
        start = time + shares[2 * i] + (_PAUSE if i else 0)
        time = start + _SHORTEST + shares[2 * i + 1]
        spans.append((round(start * (frames - 1)), round(time * (frames - 1))))
    return spans


def _propose(rng: np.random.Generator, stage: _Stage) -> tuple[str, str, list[Change]] | None:
    """A next event, if the one that was drawn can happen."""
    verb = _pick(rng, _DRAWN)
    count = 2 if verb in PAIR_VERBS else 1
    if len(stage.poses) < count:
        return None
    actors = rng.permutation(len(stage.poses))[:count].tolist()
    if any(stage.poses[i].present == (verb == "appear") for i in actors):
        return None
    made = _MAKERS[verb](rng, stage, actors)
    if made is None or not _clear(stage, verb, made[1]):
        return None
    fact = Fact(verb, tuple(sorted(f"{stage.poses[i].colour} {stage.kinds[i]}" for i in actors)), made[0])
    if fact in stage.told:
        return None
    stage.told.add(fact)
    return verb, *made


def _move(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Made:
    pose, direction, distance = stage.poses[actors[0]], _pick(rng, DIRECTIONS), rng.uniform(0.25, 0.55)
    sign = -1 if direction in ("left", "up") else 1
    x, y = (sign * distance, 0.0) if direction in ("left", "right") else (0.0, sign * distance)
    return direction, [_change(stage, actors[0], x=pose.x + x, y=pose.y + y)]


def _grow(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Made:
    return "", [_change(stage, actors[0], size=stage.poses[actors[0]].size * rng.uniform(1.4, 1.8))]


def _shrink(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Made:
    return "", [_change(stage, actors[0], size=stage.poses[actors[0]].size / rng.uniform(1.4, 1.8))]


def _turn(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Made | None:
    angle, direction = _ANGLES.get(stage.kinds[actors[0]]), _pick(rng, TURNS)
    if angle is None:
        return None
    sign = 1 if direction == "clockwise" else -1
    return direction, [_change(stage, actors[0], angle=stage.poses[actors[0]].angle + sign * angle)]


def _recolour(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Made | None:
    colour, shape = _pick(rng, tuple(COLOURS)), actors[0]
    if colour == stage.poses[shape].colour or stage.names.get(f"{colour} {stage.kinds[shape]}", shape) != shape:
        return None
    return colour, [_change(stage, shape, colour=colour)]


def _appear(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Made:
    return "", [_change(stage, actors[0], present=True)]


def _disappear(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Made:
    return "", [_change(stage, actors[0], present=False)]


def _jump(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Made:
    return "", [dataclasses.replace(_change(stage, actors[0]), via=(0.0, -rng.uniform(0.22, 0.35)))]


def _collide(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Made | None:
    """Both run at each other, meet half-way, and bounce back to where they were."""
    a, b = (stage.poses[i] for i in actors)
    distance = np.hypot(b.x - a.x, b.y - a.y)
    run = (distance - sum(stage.poses[i].size * _REACH[stage.kinds[i]] for i in actors)) / 2
    if run < 0.1:
        return None
    x, y = float((b.x - a.x) * run / distance), float((b.y - a.y) * run / distance)
    ways = ((x, y), (-x, -y))
    return "", [dataclasses.replace(_change(stage, i), via=way) for i, way in zip(actors, ways, strict=True)]


def _swap(rng: np.random.Generator, stage: _Stage, actors: list[int]) -> Made:
    """Each flies to the other's place, the two passing on different sides."""
    a, b = (stage.poses[i] for i in actors)
    bulge = (a.size + b.size) / 2 + _MARGIN
    distance = np.hypot(b.x - a.x, b.y - a.y)
    x, y = float((a.y - b.y) * bulge / distance), float((b.x - a.x) * bulge / distance)
    to_b, to_a = _change(stage, actors[0], x=b.x, y=b.y), _change(stage, actors[1], x=a.x, y=a.y)
    return "", [dataclasses.replace(to_b, via=(x, y)), dataclasses.replace(to_a, via=(-x, -y))]


_MAKERS: dict[str, Callable[[np.random.Generator, _Stage, list[int]], Made | None]] = {
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


def _clear(stage: _Stage, verb: str, changes: list[Change]) -> bool:
    """Whether the actors stay inside the scene, within the limits of size, and apart from all others."""
    if not all(_SIZES[0] <= c.after.size <= _SIZES[1] for c in changes):
        return False
    actors = {c.shape for c in changes}
    others = [still("", p) for i, p in enumerate(stage.poses) if p.present and i not in actors]
    for step in range(_STEPS + 1):
        moving = [between("", verb, c, step, _STEPS) for c in changes]
        if not all(_inside(s, stage) for s in moving) or any(_near(s, o) for s in moving for o in others):
            return False
        if verb == "swap" and _near(*moving):
            return False
    return True


def _inside(s: Sprite, stage: _Stage) -> bool:
    room = s.size + _MARGIN / 2
    return room <= s.x <= stage.width - room and room <= s.y <= stage.height - room


def _near(a: Sprite, b: Sprite) -> bool:
    return (a.x - b.x) ** 2 + (a.y - b.y) ** 2 < (a.size + b.size + _MARGIN / 2) ** 2


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
