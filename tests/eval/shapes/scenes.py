"""Scenes for the tests: by seed, and one made by hand."""

import functools

import numpy as np

from eval.shapes.script import draw_scene
from eval.shapes.world import Background, Change, Event, Pose, Scene, Shape

PALE = Background("plain", ((220, 220, 220), (230, 230, 230)), 0.1, True)


@functools.cache
def random_scene(seed: int, frames: int = 32) -> Scene:
    return draw_scene(np.random.default_rng(seed), frames)


def by_hand() -> Scene:
    """A red circle moves to the left, turns blue and grows, beside a green bar."""
    start = Pose(0.7, 0.3, 0.1, 0.0, "red")
    beside = Pose(0.3, 0.3, 0.1, 0.0, "red")
    blue = Pose(0.3, 0.3, 0.1, 0.0, "blue")
    large = Pose(0.3, 0.3, 0.2, 0.0, "blue")
    events = (
        Event("move", "left", 0, 10, (Change(0, start, beside),)),
        Event("recolour", "blue", 10, 20, (Change(0, beside, blue),)),
        Event("grow", "", 21, 30, (Change(0, blue, large),)),
    )
    bar = Shape("bar", Pose(0.7, 0.8, 0.1, 0.0, "green"))
    return Scene(1.0, 1.0, 31, PALE, (Shape("circle", start), bar), events)
