from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from tarsier_jax.errors import InputError
from tarsier_jax.processing.perturb import PERTURBATIONS, perturb
from tarsier_jax.processing.processor import Processor
from tarsier_jax.processing.sample import open_visuals, read_messages
from tests.processing.conftest import frame_numbers, user

FRAMES = list(range(0, 160, 10))  # the 16 sampled frames of a video of 151 frames


def seeds(kind: str | None, frames: list[int], count: int = 50) -> Iterable[list[int]]:
    return [perturb(frames, kind, np.random.default_rng(seed)) for seed in range(count)]


def test_exchange_swaps_two_quarters() -> None:
    quarters = [tuple(FRAMES[i : i + 4]) for i in range(0, 16, 4)]
    orders = set()
    for frames in seeds("exchange", FRAMES):
        parts = tuple(tuple(frames[i : i + 4]) for i in range(0, 16, 4))
        assert sorted(parts) == quarters
        assert sum(part != quarter for part, quarter in zip(parts, quarters, strict=True)) == 2
        orders.add(parts)
    assert len(orders) == 6  # every pair of quarters


def test_reverse_turns_a_span_of_more_than_half() -> None:
    lengths = set()
    for frames in seeds("reverse", FRAMES, 200):
        moved = [i for i, (a, b) in enumerate(zip(frames, FRAMES, strict=True)) if a != b]
        start, end = moved[0], moved[-1] + 1
        assert frames[start:end] == FRAMES[start:end][::-1]
        lengths.add(end - start)
    assert lengths == set(range(9, 17))


def test_crop_shows_three_quarters_with_as_many_frames() -> None:
    starts = set()
    for frames in seeds("crop", FRAMES):
        assert len(frames) == 16
        assert frames == sorted(frames)
        assert frames[-1] - frames[0] == 110  # 12 of 16 frames, 10 apart
        starts.add(frames[0])
    assert starts == {0, 10, 20, 30, 40}


def test_discard_keeps_half_in_order() -> None:
    samples = list(seeds("discard", FRAMES))
    for frames in samples:
        assert len(frames) == 8
        assert frames == sorted(set(frames) & set(FRAMES))
    assert set().union(*samples) == set(FRAMES)


@pytest.mark.parametrize("n", range(2, 12))
def test_few_frames_are_perturbed_too(n: int) -> None:
    frames = list(range(0, 7 * n, 7))
    for kind in PERTURBATIONS:
        for perturbed in seeds(kind, frames, 10):
            assert perturbed != frames
            assert len(perturbed) == (n // 2 if kind == "discard" else n)
            assert 0 <= min(perturbed) <= max(perturbed) <= frames[-1]
            if kind in ("exchange", "reverse"):
                assert sorted(perturbed) == frames


def test_without_a_kind_each_may_be_drawn() -> None:
    frames = list(seeds(None, FRAMES))
    assert {len(f) for f in frames} == {8, 16}
    assert len({tuple(f) for f in frames}) > 30


def test_what_cannot_be_perturbed() -> None:
    with pytest.raises(InputError, match=r"a\.mp4 has 1 frames, too few"):
        perturb([5], "crop", np.random.default_rng(0), "a.mp4")
    with pytest.raises(InputError, match=r"'shuffle'\. The kinds are exchange, crop, reverse, discard"):
        perturb(FRAMES, "shuffle", np.random.default_rng(0))


def perturbed_video(path: Path, **way: object) -> dict:
    return user({"type": "video", "video": {"video_file": str(path), "disturb": way}})


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_a_video_item_asks_for_it(mp4: Path, kind: str) -> None:
    (visual,) = open_visuals(read_messages(perturbed_video(mp4, kind=kind, seed=3)), 8, 8, "v1", 1, None)
    expected = perturb([0, 6, 11, 17, 22, 28, 33, 39], kind, np.random.default_rng(3))
    assert frame_numbers(list(visual.frames())) == expected


def test_training_and_inference_show_the_same_frames(processor: Processor, mp4: Path) -> None:
    sample = perturbed_video(mp4, seed=5)
    examples = [processor(sample, training) for training in (False, True)]
    np.testing.assert_array_equal(examples[0].pixel_values, examples[1].pixel_values)
    other = processor(perturbed_video(mp4, seed=6))
    assert not np.array_equal(other.pixel_values, examples[0].pixel_values)


def test_black_frames_follow_what_is_left(mp4: Path) -> None:
    messages = read_messages(perturbed_video(mp4, kind="discard"))
    (visual,) = open_visuals(messages, 8, 8, "v1", 8, None)
    assert [number < 0 for number in frame_numbers(list(visual.frames()))] == [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ({"disturb": "reverse"}, r'content\[0\]: disturb must be like {"kind": "reverse", "seed": 3}, not \'reverse'),
        ({"disturb": {"kinds": "reverse"}}, "disturb must be like"),
        ({"disturb": {"kind": "shuffle"}}, "kind of disturb must be one of exchange, crop, reverse, discard"),
        ({"disturb": {"kind": ["crop"]}}, "kind of disturb must be one of"),
        ({"disturb": {"seed": -1}}, "seed of disturb must be a whole number of at least 0, not -1"),
        ({"disturb": {"seed": 1.5}}, "seed of disturb must be"),
        ({"disturb": {"seed": True}}, "seed of disturb must be"),
        ({"disturb": {}, "mask_boxes": [[]]}, "would separate frames and their mask_boxes"),
    ],
)
def test_malformed_wishes(video: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_messages(user({"type": "video", "video": {"video_file": "a.mp4", **video}}))
