"""Frames: changes during events only, clips backwards, other sizes, and files."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from eval.shapes.render import render_scene, write_clip
from eval.shapes.script import draw_scene
from eval.shapes.world import COLOURS, reverse
from tarsier_jax.errors import InputError
from tarsier_jax.processing.frame_sampling import sample_uniform
from tarsier_jax.processing.video import open_clip
from tests.eval.shapes.scenes import by_hand, random_scene

SEEDS = range(60)


def _pixels_changed(a: np.ndarray, b: np.ndarray) -> int:
    return int((np.abs(a.astype(int) - b).max(-1) > 8).sum())


def test_shapes_are_where_the_script_says() -> None:
    frames = render_scene(by_hand(), 100, 100)
    assert frames.shape == (31, 100, 100, 3) and frames.dtype == np.uint8
    for frame, (x, y), colour in [(0, (70, 30), "red"), (10, (30, 30), "red"), (20, (30, 30), "blue")]:
        assert tuple(frames[frame, y, x]) == COLOURS[colour]
    assert tuple(frames[0, 80, 70]) == COLOURS["green"]
    assert tuple(frames[10, 30, 70]) == (220, 220, 220)
    assert tuple(frames[5, 30, 50]) == COLOURS["red"]  # half-way
    assert tuple(frames[20, 30, 45]) == (220, 220, 220) and tuple(frames[30, 30, 45]) == COLOURS["blue"]  # it has grown


def test_edges_are_smooth() -> None:
    levels = {tuple(pixel) for pixel in render_scene(by_hand(), 100, 100)[0][:50].reshape(-1, 3)}
    assert len(levels) > 8  # ground, red, and shades between them


def test_nothing_changes_outside_spans() -> None:
    for seed in SEEDS:
        scene = random_scene(seed)
        frames = render_scene(scene, 56, 56)
        for i in range(1, scene.frames):
            if not any(event.first < i <= event.last for event in scene.events):
                assert np.array_equal(frames[i - 1], frames[i])


def test_every_event_shows_in_two_of_sixteen_sampled_frames() -> None:
    for seed in SEEDS:
        scene = random_scene(seed)
        frames = render_scene(scene, 56, 56)
        steps = list(itertools.pairwise(sample_uniform(scene.frames, 16)))
        for event in scene.events:
            # Steps are cut at the ends of the span: other events must not count.
            cut = [(max(a, event.first), min(b, event.last)) for a, b in steps]
            changed = [_pixels_changed(frames[a], frames[b]) for a, b in cut if a < b]
            assert sum(count >= 4 for count in changed) >= 2, (seed, event.verb, changed)


@pytest.mark.parametrize("size", [(56, 56), (48, 90)])
def test_reversed_scene_is_the_clip_backwards(size: tuple[int, int]) -> None:
    for seed in SEEDS:
        assert np.array_equal(
            render_scene(reverse(random_scene(seed)), *size), render_scene(random_scene(seed), *size)[::-1]
        )


def test_wide_scene_fills_a_wide_frame() -> None:
    scenes = [draw_scene(np.random.default_rng(seed), aspect=1.5) for seed in range(20)]
    assert max(shape.pose.x for m in scenes for shape in m.shapes) > 1.2
    assert render_scene(scenes[0], 64, 96).shape == (32, 64, 96, 3)


@pytest.mark.parametrize(
    ("name", "size", "tolerance"), [("clip.mp4", (64, 90), 3.0), ("clip.gif", (57, 91), 1.0), ("C.GIF", (64, 64), 1.0)]
)
def test_files_have_every_frame(tmp_path: Path, name: str, size: tuple[int, int], tolerance: float) -> None:
    frames = render_scene(random_scene(3), *size)
    assert any(np.array_equal(a, b) for a, b in itertools.pairwise(frames))  # which GIF writers like to drop
    clip = open_clip(write_clip(tmp_path / name, frames, rate=20))
    read = np.stack([np.asarray(frame) for frame in clip.read(range(clip.length))])
    assert read.shape == frames.shape and clip.rate == pytest.approx(20)
    assert np.abs(read.astype(int) - frames).mean(axis=(1, 2, 3)).max() < tolerance


def test_refuses_what_the_formats_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="even height"):
        write_clip(tmp_path / "odd.mp4", render_scene(random_scene(0), 57, 56))
    with pytest.raises(InputError, match="one of the two endings"):
        write_clip(tmp_path / "clip.avi", render_scene(random_scene(0), 56, 56))
