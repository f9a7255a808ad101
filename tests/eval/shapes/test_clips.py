"""Parts of a scene, and what the embedded model is trained on and scored on."""

import numpy as np
import pytest

from eval.shapes.clips import LENGTHS, OTHER_LENGTHS, OTHER_SIZES, SIZES, cut, draw_scene
from eval.shapes.render import render
from eval.shapes.script import generate
from eval.shapes.world import crop, facts
from tarsier_jax.processing.sampling import sample_uniform


def test_a_crop_has_the_frames_of_the_whole() -> None:
    scene = generate(np.random.default_rng(3), frames=40, events=4)
    first, last = scene.events[0].last, scene.events[3].first
    part = crop(scene, first, last)
    assert facts(part) == facts(scene)[1:3]
    np.testing.assert_array_equal(render(part, 56, 56), render(scene, 56, 56)[first : last + 1])


def test_only_the_frames_asked_for() -> None:
    scene = generate(np.random.default_rng(4), frames=24)
    np.testing.assert_array_equal(render(scene, 42, 42, [0, 7, 7, 23]), render(scene, 42, 42)[[0, 7, 7, 23]])


@pytest.mark.parametrize("events", [1, 2, 4])
def test_a_part_of_some_events(events: int) -> None:
    starts = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scene = generate(rng, frames=48, events=4)
        part, indices = cut(rng, scene, sample_uniform(scene.frames, 16), events)
        told = facts(scene)
        starts.add(next(i for i in range(4) if told[i : i + events] == facts(part)))
        assert indices == sorted(set(indices)) and indices[0] >= 0 and indices[-1] < part.frames
        for event in part.events:  # each shows at work or done in two of the frames at least
            assert sum(event.first < i <= event.last for i in indices) >= 2
    assert starts == set(range(4 - events + 1))


def test_what_is_drawn() -> None:
    drawn = [draw_scene(np.random.default_rng(seed)) for seed in range(200)]
    assert {size for _, size in drawn} == set(SIZES) and {s.frames for s, _ in drawn} <= set(LENGTHS)
    scene, size = draw_scene(np.random.default_rng(0), OTHER_SIZES, OTHER_LENGTHS, shapes=1, events=5)
    assert len(scene.shapes) == 1 and len(scene.events) == 5
    assert size in OTHER_SIZES and scene.frames in OTHER_LENGTHS
    assert not set(OTHER_SIZES) & set(SIZES) and not set(OTHER_LENGTHS) & set(LENGTHS)
