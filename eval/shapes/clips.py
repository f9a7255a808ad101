"""Which clips the small model learns from, and on which it is scored."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from eval.shapes.render import render_scene
from eval.shapes.script import draw_scene
from eval.shapes.world import Scene, reverse

HELD_OUT = 10**9  # seeds from here on are never trained on
# Height and width in pixels of clips that are trained on (one clip in five is no square), and how many
# frames an event takes, so that short stories make short clips.
TRAINING_SIZES = (*[(84, 84)] * 6, *[(112, 112)] * 2, (84, 112), (112, 84))
PACES = tuple(range(3, 9))
SLOW = 0.15  # how many clips take longer, up to 40 frames
# Sizes, and lengths in frames, of clips that are not trained on.
OTHER_SIZES = ((98, 98), (140, 140), (56, 56), (90, 120), (240, 180))
OTHER_LENGTHS = (42, 50, 64, 81, 121)

FrameSize = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ShapeClip:
    """What is described, and the scene that it shows. video: the source of an annotation's video item."""

    scene: Scene
    video: dict[str, Any]


def draw_clips(seed: int, count: int, other: bool = False) -> Iterator[ShapeClip]:
    """The clips of seeds `seed`, `seed` + 1, and so on; with `other`, of sizes and lengths not trained on."""
    for i in range(count):
        scene, size = draw_clip_scene(np.random.default_rng(seed + i), other)
        yield ShapeClip(scene, {"frames": render_scene(scene, *size)})


def draw_clip_scene(
    rng: np.random.Generator,
    other: bool = False,
    shapes: int | None = None,
    events: int | None = None,
    verb: str | None = None,
) -> tuple[Scene, FrameSize]:
    """A random scene (see `script.draw_scene`), forwards or backwards, and the size to render it at.

    Half of them are reversed because some events (a shape that appears) can be only in some places of a story, and a
    model should not learn that from anything but the frames.
    """
    sizes = OTHER_SIZES if other else TRAINING_SIZES
    height, width = size = sizes[int(rng.integers(len(sizes)))]
    events = int(rng.integers(1, 6)) if events is None else events
    frames = int(rng.choice(OTHER_LENGTHS) if other else events * rng.choice(PACES))
    if not other and rng.random() < SLOW:
        frames = int(rng.integers(max(frames, 16), 41))
    scene = draw_scene(rng, frames, aspect=width / height, shapes=shapes, events=events, verb=verb)
    return (reverse(scene) if rng.random() < 0.5 else scene), size
