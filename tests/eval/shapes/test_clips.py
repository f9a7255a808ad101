"""Selected frames of a scene, and the clips that the embedded model is trained and scored on."""

import numpy as np

from eval.shapes.clips import OTHER_LENGTHS, OTHER_SIZES, PACES, TRAINING_SIZES, draw_clip_scene
from eval.shapes.render import render_scene
from eval.shapes.script import draw_scene


def test_only_the_frames_asked_for() -> None:
    scene = draw_scene(np.random.default_rng(4), frames=24)
    np.testing.assert_array_equal(
        render_scene(scene, 42, 42, [0, 7, 7, 23]), render_scene(scene, 42, 42)[[0, 7, 7, 23]]
    )


def test_sizes_and_lengths() -> None:
    samples = [draw_clip_scene(np.random.default_rng(seed)) for seed in range(300)]
    assert {size for _, size in samples} == set(TRAINING_SIZES)
    paces = [scene.frames / len(scene.events) for scene, _ in samples]
    assert set(PACES) < set(paces) and min(paces) == 3 and all(scene.frames <= 40 for scene, _ in samples)
    assert sum(pace in PACES for pace in paces) > 0.75 * len(paces)
    scene, size = draw_clip_scene(np.random.default_rng(0), other=True, shapes=1, events=5)
    assert len(scene.shapes) == 1 and len(scene.events) == 5
    assert size in OTHER_SIZES and scene.frames in OTHER_LENGTHS
    assert not set(OTHER_SIZES) & set(TRAINING_SIZES) and min(OTHER_LENGTHS) > 5 * max(PACES)
