"""Which clips the small model learns from, and on which it is scored."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from eval.shapes.render import render
from eval.shapes.script import generate
from eval.shapes.world import Scene, crop, reverse

HELD_OUT = 10**9  # seeds from here on are never trained on
# Height and width in pixels, and frames, of clips that are trained on; those that appear twice are drawn more often.
SIZES = ((84, 84), (84, 84), (112, 112), (84, 112), (112, 84))
LENGTHS = tuple(range(16, 65))
# Of clips that are not.
OTHER_SIZES = ((98, 98), (140, 140), (90, 120), (150, 126), (180, 240))
OTHER_LENGTHS = (10, 12, 81, 121)

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Clip:
    """What is described, and the scene that it shows. video: the source of an annotation's video item."""

    scene: Scene
    video: dict[str, Any]


def draw_clips(seed: int, count: int, other: bool = False) -> Iterator[Clip]:
    """The clips of seeds `seed`, `seed` + 1, and so on; with `other`, of sizes and lengths not trained on."""
    for i in range(count):
        sizes, lengths = (OTHER_SIZES, OTHER_LENGTHS) if other else (SIZES, LENGTHS)
        scene, size = draw_scene(np.random.default_rng(seed + i), sizes, lengths)
        yield Clip(scene, {"frames": render(scene, *size)})


def draw_scene(
    rng: np.random.Generator,
    sizes: Sequence[Size] = SIZES,
    lengths: Sequence[int] = LENGTHS,
    shapes: int | None = None,
    events: int | None = None,
) -> tuple[Scene, Size]:
    """A random scene, forwards or backwards, and the size to render it at.

    Half of them are reversed because some events (a shape that appears) can be only in some places of a story, and a
    model should not learn that from anything but the frames.
    """
    height, width = size = sizes[int(rng.integers(len(sizes)))]
    scene = generate(rng, int(rng.choice(lengths)), aspect=width / height, shapes=shapes, events=events)
    return (reverse(scene) if rng.random() < 0.5 else scene), size


def cut(rng: np.random.Generator, scene: Scene, indices: Sequence[int], events: int) -> tuple[Scene, list[int]]:
    """A part of the scene in which only so many consecutive events happen, and those of the frames that show it."""
    start = int(rng.integers(len(scene.events) - events + 1))
    before = scene.events[start - 1].last if start else 0
    end = start + events
    after = scene.events[end].first if end < len(scene.events) else scene.frames - 1
    shown = [i for i in indices if before <= i <= after]
    return crop(scene, before, after), [i - before for i in shown]
