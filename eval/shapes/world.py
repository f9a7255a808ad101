"""Scenes of moving shapes: shapes on a background, and events that change them, one after another.

Lengths are in units of the shorter side of the scene, y points down, angles are degrees clockwise. Frames are numbered
from 0. An event changes the frames after `first`, up to and including `last`.
The name of a shape is its colour at the start of an event and its kind: when "the red circle turns blue", its name is
"the blue circle" in later events. Two shapes of a scene never have the same name.
"""

import dataclasses
from collections.abc import Sequence

SHAPE_KINDS = ("circle", "ring", "bar", "triangle", "cross")
ROUND = ("circle", "ring")  # turning them is not visible
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 133, 24),
    "yellow": (247, 217, 36),
    "green": (38, 156, 70),
    "blue": (36, 84, 214),
    "purple": (142, 48, 178),
}
DIRECTIONS = ("left", "right", "up", "down")
TURNS = ("clockwise", "counterclockwise")
PAIR_VERBS = ("collide", "swap")
VERBS = ("move", "grow", "shrink", "turn", "recolour", "appear", "disappear", "jump", *PAIR_VERBS)

_OPPOSITES = (("left", "right"), ("up", "down"), TURNS, ("grow", "shrink"), ("appear", "disappear"))
OPPOSITE = {a: b for pair in _OPPOSITES for a, b in (pair, pair[::-1])}


@dataclasses.dataclass(frozen=True)
class Pose:
    """The state of a shape between events.

    Attributes:
        x: Of the centre.
        y: Of the centre.
        size: Distance from the centre to the farthest corner.
        angle: Degrees clockwise.
        colour: Name of the colour.
        present: Whether the shape is visible.
    """

    x: float
    y: float
    size: float
    angle: float
    colour: str
    present: bool = True


@dataclasses.dataclass(frozen=True)
class Shape:
    """A shape and its pose in frame 0."""

    kind: str
    pose: Pose


@dataclasses.dataclass(frozen=True)
class Change:
    """The effect of an event on one shape.

    Attributes:
        shape: Index of the shape.
        before: Pose before the event.
        after: Pose after the event.
        via: Offset (x, y) from the straight line between the two poses, half-way.
    """

    shape: int
    before: Pose
    after: Pose
    via: tuple[float, float] = (0.0, 0.0)


# A spark is drawn while colliding shapes are near each other: sampled frames may miss the moment of contact.
_SPARK_FROM, _SPARK_SIZE, _SPARK_RGB = 0.5, 0.1, (255.0, 235.0, 120.0)


@dataclasses.dataclass(frozen=True)
class Event:
    """An event.

    Attributes:
        verb: One of VERBS.
        detail: Direction (move, turn), new colour (recolour), or empty.
        first: The last frame before the event.
        last: The first frame in which the event is over.
        changes: One per shape that takes part.
    """

    verb: str
    detail: str
    first: int
    last: int
    changes: tuple[Change, ...]


@dataclasses.dataclass(frozen=True)
class Background:
    """The background of a scene.

    Attributes:
        style: "plain", "gradient", "stripes" or "checks".
        colours: Two RGB colours.
        period: Width of a stripe or a check.
        vertical: Whether the colours change from top to bottom instead of from left to right.
    """

    style: str
    colours: tuple[tuple[int, int, int], tuple[int, int, int]]
    period: float
    vertical: bool


@dataclasses.dataclass(frozen=True)
class Scene:
    """The script of a clip with `frames` frames."""

    width: float
    height: float
    frames: int
    background: Background
    shapes: tuple[Shape, ...]
    events: tuple[Event, ...]


@dataclasses.dataclass(frozen=True)
class Sprite:
    """A shape as drawn in one frame; `alpha` is its opacity, 0 to 1."""

    kind: str
    x: float
    y: float
    size: float
    angle: float
    rgb: tuple[float, float, float]
    alpha: float


@dataclasses.dataclass(frozen=True)
class Fact:
    """An event in words.

    Attributes:
        verb: One of VERBS.
        names: Name of the shape, or the names of two shapes in alphabetical order.
        detail: See `Event`.
    """

    verb: str
    names: tuple[str, ...]
    detail: str = ""


def facts(scene: Scene) -> list[Fact]:
    """Returns the events of a scene in words, in order."""
    return [_fact(scene, event) for event in scene.events]


def _fact(scene: Scene, event: Event) -> Fact:
    names = sorted(f"{c.before.colour} {scene.shapes[c.shape].kind}" for c in event.changes)
    return Fact(event.verb, tuple(names), event.detail)


def opposite(fact: Fact) -> Fact:
    """Returns the fact of the same event played backwards."""
    if fact.verb == "recolour":
        colour, kind = fact.names[0].split()
        return Fact("recolour", (f"{fact.detail} {kind}",), colour)
    return Fact(OPPOSITE.get(fact.verb, fact.verb), fact.names, OPPOSITE.get(fact.detail, fact.detail))


def names_of(scene: Scene, shape: int) -> set[str]:
    """Returns all names that a shape has in the course of a scene."""
    poses = [scene.shapes[shape].pose, *(c.after for e in scene.events for c in e.changes if c.shape == shape)]
    return {f"{pose.colour} {scene.shapes[shape].kind}" for pose in poses}


def reverse(scene: Scene) -> Scene:
    """Returns the scene played backwards; its frames are exactly those of the scene in reversed order."""
    shapes = tuple(Shape(s.kind, pose_at(scene, i, scene.frames - 1)) for i, s in enumerate(scene.shapes))
    events = tuple(_reverse_event(event, scene.frames - 1) for event in reversed(scene.events))
    return dataclasses.replace(scene, shapes=shapes, events=events)


def _reverse_event(event: Event, end: int) -> Event:
    before = event.changes[0].before
    detail = before.colour if event.verb == "recolour" else OPPOSITE.get(event.detail, event.detail)
    changes = tuple(Change(c.shape, c.after, c.before, c.via) for c in event.changes)
    return Event(OPPOSITE.get(event.verb, event.verb), detail, end - event.last, end - event.first, changes)


def pose_at(scene: Scene, shape: int, frame: int) -> Pose:
    """Returns the pose of a shape after the events that are over at `frame`."""
    pose = scene.shapes[shape].pose
    for event in scene.events:
        if event.last > frame:
            break
        pose = next((c.after for c in event.changes if c.shape == shape), pose)
    return pose


def sprites_at(scene: Scene, frame: int) -> list[Sprite]:
    """Returns the shapes as drawn in a frame, from back to front."""
    running = next((e for e in scene.events if e.first < frame < e.last), None)
    sprites = [still(shape.kind, pose_at(scene, i, frame)) for i, shape in enumerate(scene.shapes)]
    if running is not None:
        steps = running.last - running.first
        for change in running.changes:
            kind = scene.shapes[change.shape].kind
            sprites[change.shape] = between(kind, running.verb, change, frame - running.first, steps)
        if running.verb == "collide" and bounce(frame - running.first, steps) >= _SPARK_FROM:
            a, b = (sprites[change.shape] for change in running.changes)
            sprites.append(Sprite("spark", (a.x + b.x) / 2, (a.y + b.y) / 2, _SPARK_SIZE, 0.0, _SPARK_RGB, 1.0))
    return sprites


def bounce(step: int, steps: int) -> float:
    """Returns the share of the way to the meeting point that colliding shapes have covered, 0 to 1."""
    return 2 * min(step, steps - step) / steps


def still(kind: str, pose: Pose) -> Sprite:
    """Returns a shape in a pose."""
    return Sprite(kind, pose.x, pose.y, pose.size, pose.angle, COLOURS[pose.colour], float(pose.present))


def between(kind: str, verb: str, change: Change, step: int, steps: int) -> Sprite:
    """Returns a shape in the middle of a change, bit by bit the same when the change is played backwards."""
    a, b = still(kind, change.before), still(kind, change.after)
    remaining = steps - step

    def mix(u: float, v: float) -> float:
        return u if u == v else (u * remaining + v * step) / steps

    # Colliding shapes move straight and back; jumping shapes move along a parabola.
    bend = bounce(step, steps) if verb == "collide" else 4 * step * remaining / steps**2
    (red, green, blue) = (mix(u, v) for u, v in zip(a.rgb, b.rgb, strict=True))
    return Sprite(
        kind,
        x=mix(a.x, b.x) + change.via[0] * bend,
        y=mix(a.y, b.y) + change.via[1] * bend,
        size=mix(a.size, b.size),
        angle=mix(a.angle, b.angle),
        rgb=(red, green, blue),
        alpha=mix(a.alpha, b.alpha),
    )


def changed_frames(event: Event, indices: Sequence[int]) -> list[int]:
    """Returns the positions in `indices` (ascending) of the frames that show an event in progress or just completed."""
    return [i for i, frame in enumerate(indices) if event.first < frame <= event.last]
