"""What a clip of moving shapes is: shapes on a background, and events that change them, one after another.

Lengths are in units of the shorter side of the scene, y points down, angles are degrees clockwise. Frames count from 0.
An event leaves frame `first` as it is, changes every frame after that, and is over at frame `last`.
A shape is named by its colour when an event begins, and its kind: "the red circle turns blue" and from then on is "the
blue circle". No two shapes of a scene ever bear the same name.
"""

import dataclasses
from collections.abc import Sequence

SHAPE_KINDS = ("circle", "ring", "bar", "triangle", "cross")
ROUND = ("circle", "ring")  # which nobody sees turn
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
    """How a shape is while nothing happens to it. `size` is the distance from its centre to its farthest corner."""

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
    """What an event does to one shape; half-way it is (x, y) `via` off the straight line between the two poses."""

    shape: int
    before: Pose
    after: Pose
    via: tuple[float, float] = (0.0, 0.0)


# Where two shapes collide, a spark flies while they are nearest, so that it shows between frames too.
_SPARK_FROM, _SPARK_SIZE, _SPARK_RGB = 0.5, 0.1, (255.0, 235.0, 120.0)


@dataclasses.dataclass(frozen=True)
class Event:
    """`detail` is a direction (move, turn), the new colour (recolour), or empty."""

    verb: str
    detail: str
    first: int
    last: int
    changes: tuple[Change, ...]


@dataclasses.dataclass(frozen=True)
class Background:
    """`style` is plain, gradient, stripes or checks, of two colours; `period` is the width of a stripe or a check."""

    style: str
    colours: tuple[tuple[int, int, int], tuple[int, int, int]]
    period: float
    vertical: bool  # from top to bottom; else from left to right


@dataclasses.dataclass(frozen=True)
class Scene:
    """The script of a clip of `frames` frames."""

    width: float
    height: float
    frames: int
    background: Background
    shapes: tuple[Shape, ...]
    events: tuple[Event, ...]


@dataclasses.dataclass(frozen=True)
class Sprite:
    """A shape as it is drawn in one frame; `alpha` is 0 where it is absent, 1 where it is present."""

    kind: str
    x: float
    y: float
    size: float
    angle: float
    rgb: tuple[float, float, float]
    alpha: float


@dataclasses.dataclass(frozen=True)
class Fact:
    """An event as words tell it: `names` has the shape's name, or in alphabetical order those of two."""

    verb: str
    names: tuple[str, ...]
    detail: str = ""


def facts(scene: Scene) -> list[Fact]:
    """What happens, in order."""
    return [_fact(scene, event) for event in scene.events]


def _fact(scene: Scene, event: Event) -> Fact:
    names = sorted(f"{c.before.colour} {scene.shapes[c.shape].kind}" for c in event.changes)
    return Fact(event.verb, tuple(names), event.detail)


def opposite(fact: Fact) -> Fact:
    """The fact of the same event played backwards."""
    if fact.verb == "recolour":
        colour, kind = fact.names[0].split()
        return Fact("recolour", (f"{fact.detail} {kind}",), colour)
    return Fact(OPPOSITE.get(fact.verb, fact.verb), fact.names, OPPOSITE.get(fact.detail, fact.detail))


def names_of(scene: Scene, shape: int) -> set[str]:
    """All names that a shape bears in the course of a scene."""
    poses = [scene.shapes[shape].pose, *(c.after for e in scene.events for c in e.changes if c.shape == shape)]
    return {f"{pose.colour} {scene.shapes[shape].kind}" for pose in poses}


def reverse(scene: Scene) -> Scene:
    """The scene played backwards: its frames are those of the scene in reversed order, exactly."""
    shapes = tuple(Shape(s.kind, pose_at(scene, i, scene.frames - 1)) for i, s in enumerate(scene.shapes))
    events = tuple(_reverse_event(event, scene.frames - 1) for event in reversed(scene.events))
    return dataclasses.replace(scene, shapes=shapes, events=events)


def _reverse_event(event: Event, end: int) -> Event:
    before = event.changes[0].before
    detail = before.colour if event.verb == "recolour" else OPPOSITE.get(event.detail, event.detail)
    changes = tuple(Change(c.shape, c.after, c.before, c.via) for c in event.changes)
    return Event(OPPOSITE.get(event.verb, event.verb), detail, end - event.last, end - event.first, changes)


def pose_at(scene: Scene, shape: int, frame: int) -> Pose:
    """The pose that the events over by `frame` leave a shape in."""
    pose = scene.shapes[shape].pose
    for event in scene.events:
        if event.last > frame:
            break
        pose = next((c.after for c in event.changes if c.shape == shape), pose)
    return pose


def sprites_at(scene: Scene, frame: int) -> list[Sprite]:
    """The shapes as they are drawn in a frame, from the rearmost on."""
    running = next((e for e in scene.events if e.first < frame < e.last), None)
    sprites = [still(shape.kind, pose_at(scene, i, frame)) for i, shape in enumerate(scene.shapes)]
    if running is not None:
        for change in running.changes:
            kind = scene.shapes[change.shape].kind
            steps = running.last - running.first
            sprites[change.shape] = between(kind, running.verb, change, frame - running.first, steps)
        if running.verb == "collide" and bounce(frame - running.first, steps) >= _SPARK_FROM:
            a, b = (sprites[change.shape] for change in running.changes)
            sprites.append(Sprite("spark", (a.x + b.x) / 2, (a.y + b.y) / 2, _SPARK_SIZE, 0.0, _SPARK_RGB, 1.0))
    return sprites


def bounce(step: int, steps: int) -> float:
    """How near colliding shapes are to where they meet, 0 to 1."""
    return 2 * min(step, steps - step) / steps


def still(kind: str, pose: Pose) -> Sprite:
    """A shape in a pose."""
    return Sprite(kind, pose.x, pose.y, pose.size, pose.angle, COLOURS[pose.colour], float(pose.present))


def between(kind: str, verb: str, change: Change, step: int, steps: int) -> Sprite:
    """A shape in the middle of a change, the same to the last bit when the change is played backwards."""
    a, b = still(kind, change.before), still(kind, change.after)
    left = steps - step

    def mix(u: float, v: float) -> float:
        return u if u == v else (u * left + v * step) / steps

    # Colliding shapes run straight and bounce; those that jump fly in a parabola.
    bend = bounce(step, steps) if verb == "collide" else 4 * step * left / steps**2
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
    """Which of some frames (given by index, ascending) show the event at work or just done, as positions from 0."""
    return [i for i, frame in enumerate(indices) if event.first < frame <= event.last]
