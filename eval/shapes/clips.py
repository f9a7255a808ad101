"""The clips that the embedded model is trained on, and those that it is scored on."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from eval.shapes.render import render_scene
from eval.shapes.script import draw_scene
from eval.shapes.world import Scene, reverse

HELD_OUT = 10**9  # the first seed that is never trained on
# Heights and widths in pixels of the clips that are trained on (one in five is not square), and frames per event: a
# clip with few events is short.
TRAINING_SIZES = (*[(84, 84)] * 6, *[(112, 112)] * 2, (84, 112), (112, 84))
PACES = tuple(range(3, 9))
SLOW = 0.15  # share of clips that are longer, up to 40 frames
# Sizes in pixels and lengths in frames of other clips, which are not trained on.
OTHER_SIZES = ((98, 98), (140, 140), (56, 56), (90, 120), (240, 180))
OTHER_LENGTHS = (42, 50, 64, 81, 121)

FrameSize = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ShapeClip:
    """A clip of moving shapes.

    Attributes:
        scene: The scene that it shows.
        video: Source of an annotation's video item.
    """

    scene: Scene
    video: dict[str, Any]


def draw_clips(seed: int, count: int, other: bool = False) -> Iterator[ShapeClip]:
    """Yields the clips of the seeds `seed`, `seed` + 1 and so on; with `other`, at sizes and lengths not trained on."""
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
    """Returns a random scene (see `script.draw_scene`), forwards or backwards, and its height and width in pixels.

    Half of the scenes are reversed because some events, such as a shape that appears, are possible at some points of a
    scene only. A model should see them in the frames and not guess them from the order.
    """
    sizes = OTHER_SIZES if other else TRAINING_SIZES
    height, width = size = sizes[int(rng.integers(len(sizes)))]
    events = int(rng.integers(1, 6)) if events is None else events
    frames = int(rng.choice(OTHER_LENGTHS) if other else events * rng.choice(PACES))
    if not other and rng.random() < SLOW:
        frames = int(rng.integers(max(frames, 16), 41))
    scene = draw_scene(rng, frames, aspect=width / height, shapes=shapes, events=events, verb=verb)
    return (reverse(scene) if rng.random() < 0.5 else scene), size
