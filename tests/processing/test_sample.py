import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tarsier_jax.errors import InputError
from tarsier_jax.processing.sample import Visual, mask_frames, open_visuals, read_messages
from tests.processing.conftest import frame_numbers, user, video_item


def opened(*items: dict, n_frames: int = 4, max_n_frames: int = 8, divisor: int = 1) -> list[Visual]:
    return open_visuals(read_messages(user(*items)), n_frames, max_n_frames, "v1", divisor, None)


def shown(visual: Visual) -> list[int]:
    frames = list(visual.frames())
    assert len(frames) == visual.count
    return frame_numbers(frames)


def video(path: Path, **keys: object) -> dict:
    return {"type": "video", "video": {"video_file": str(path), **keys}}


def image(**keys: object) -> dict:
    return {"type": "image", "image": keys}


@pytest.mark.parametrize(
    ("keys", "frames"),
    [
        ({}, [0, 13, 26, 39]),
        ({"frame_indices": [7, 3]}, [7, 3]),
        ({"time_indices": [0.5, 5]}, [4, 39]),
        ({"start_time": 1, "end_time": 2}, [8, 11, 13, 16]),
        ({"fps": 1}, [0, 8, 16, 24, 32]),
        ({"min_n_frames": 2}, [0, 13, 26, 39]),
    ],
)
def test_frames_of_a_video(mp4: Path, keys: dict, frames: list[int]) -> None:
    (visual,) = opened(video(mp4, **keys))
    assert shown(visual) == frames


def test_visuals_share_the_frames_in_order(mp4: Path, tmp_path: Path) -> None:
    Image.new("RGB", (30, 30), (65, 65, 65)).save(tmp_path / "a.png")
    visuals = opened(
        video(mp4), image(image_file=str(tmp_path / "a.png")), image(video_file=str(mp4), frame_indices=39), video(mp4)
    )
    assert [visual.kind for visual in visuals] == ["video", "image", "image", "video"]
    assert [shown(visual) for visual in visuals] == [[0], [9], [39], [0]]


def test_sequences_of_images(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, path in enumerate(paths):
        Image.new("RGB", (8, 8), (20 + 5 * i,) * 3).save(path)
    in_list, in_directory = opened(
        {"type": "video", "video": {"image_file": paths, "frame_indices": [2, 0]}},
        {"type": "video", "video": {"video_file": str(tmp_path)}},
        n_frames=5,
    )
    assert shown(in_list) == [2, 0]
    assert shown(in_directory) == [0, 1, 2]


def test_black_frames_make_the_number_divisible(mp4: Path) -> None:
    (visual,) = opened(video(mp4, frame_indices=[5, 6, 7]), divisor=4)
    assert shown(visual) == [5, 6, 7, -4]  # -4 is brightness 0


def test_mask_boxes_black_out_and_crop() -> None:
    box = [[0.5, 0.1], [0.75, 0.1], [0.75, 0.2], [0.5, 0.2]]  # clockwise from the top left
    frames = [Image.new("RGB", (80, 100), (255, 255, 255)) for _ in range(2)]
    masked, plain = (np.asarray(frame) for frame in mask_frames(iter(frames), [[box], []]))
    assert masked.shape == (50, 80, 3)  # 30 rows below the box remain
    assert (masked[10:20, 40:60] == 0).all()
    assert masked.sum() == 255 * 3 * (50 * 80 - 10 * 20)
    np.testing.assert_array_equal(plain, np.asarray(frames[1]))


def test_mask_boxes_have_to_fit() -> None:
    frames = [Image.new("RGB", (80, 100))] * 2
    with pytest.raises(InputError, match="1 lists of boxes, too few"):
        list(mask_frames(iter(frames), [[]]))
    for box in ([0.5, 0.1], [[0, 0], [float("inf"), 0], [1, 1], [0, 1]]):
        with pytest.raises(InputError, match="four corners"):
            list(mask_frames(iter(frames), [[box], []]))
    with pytest.raises(InputError, match="a list of boxes for each frame, not 3"):
        list(mask_frames(iter(frames), [3, []]))


def test_mask_boxes_of_a_video_item(mp4: Path) -> None:
    boxes = [[[[0, 0], [1, 0], [1, 0.1], [0, 0.1]]]] * 2
    (visual,) = opened(video(mp4, frame_indices=[3, 4], mask_boxes=boxes))
    assert [frame.size for frame in visual.frames()] == [(64, 35), (64, 35)]


def test_contents_of_every_form() -> None:
    item = {"type": "text", "text": "Hi"}
    for content in ("Hi", item, [item]):
        assert read_messages({"messages": [{"role": "user", "content": content}]})[0]["content"] == [item]


def test_frames_in_memory() -> None:
    frames = [Image.new("RGB", (8, 8), (20 + 5 * i,) * 3) for i in range(6)]
    from_list, from_array = opened(
        video_item(*frames), {"type": "video", "video": {"frames": np.stack([np.asarray(f) for f in frames])}}
    )
    assert shown(from_list) == shown(from_array) == [0, 5]
    (picture,) = opened(image(frames=frames[3]))
    assert shown(picture) == [3]


def video_of(**keys: object) -> dict:
    return user({"type": "video", "video": {"video_file": "a.mp4", **keys}})


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({}, "this one has none"),
        ({"messages": []}, "this one has none"),
        ({"messages": [{"content": "Hi"}]}, r"messages\[0\] needs a role"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "system, user, assistant"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] needs a content"),
        (user({"type": "audio"}), r'messages\[0\].content\[0\] needs "type"'),
        (user("Hi", {"type": "text"}), r'content\[1\] is a text without its "text"'),
        (user({"type": "video"}), 'files in "videos" is 0, but 1 places'),
        (user({"type": "video", "video": {"file": "a.mp4"}}), "exactly one of video_file, image_file, frames"),
        (user({"type": "image", "image": {"image_file": "a.png", "video_file": "a.mp4"}}), "exactly one of"),
        (user({"type": "video", "video": {"video_file": "a.mp4", "fps": 0}}), "fps must be above 0"),
        (user({"type": "video", "video": {"video_file": "a.mp4", "start_time": "1"}}), "start_time must be a number"),
        (user({"type": "video", "video": {"video_file": "a.mp4", "frame_indices": 3}}), "must be a list of at least"),
        (video_of(start_time=math.nan), "start_time must be a number, not nan"),
        (video_of(end_time=math.inf), "end_time must be a number, not inf"),
        (video_of(fps=True), "fps must be a number, not True"),
        (video_of(fps=math.nan), "fps must be a number, not nan"),
        (video_of(start_frame=10**400), "start_frame must be a number, not 1000"),
        (video_of(min_n_frames=-1), "min_n_frames must be from 0 to"),
        (video_of(min_n_frames=10**9), "min_n_frames must be from 0 to"),  # each would take a turn of a loop
        (video_of(frame_indices=[]), r"a list of at least one number, not \[\]"),
        (video_of(time_indices=[1, math.nan]), "must be a list of at least one number"),
        (video_of(time_indices=[[1]]), "must be a list of at least one number"),
        (video_of(mask_boxes=3), "mask_boxes must be a list"),
        (user("nice \ud83d"), r"content\[0\] has '\\ud83d', half of a character, at 5"),
        ({"messages": [{"role": "user", "content": 7}]}, r"messages\[0\] needs a content: .* not 7"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, r"content\[0\] needs \"type\".* but is 'a'"),
        ({"messages": [7]}, r"messages\[0\] needs a role"),
        ([], "this one has none"),
    ],
)
def test_malformed_samples(sample: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_messages(sample)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (lambda mp4: image(video_file=str(mp4)), "needs frame_indices, the number of its frame"),
        (lambda mp4: image(video_file=str(mp4), frame_indices=[1, 2]), "one number"),
        (lambda mp4: image(image_file=["a.png", "b.png"]), "Use a video item"),
        (lambda mp4: image(image_file=str(mp4)), "is a video instead of an image"),
        (lambda mp4: image(video_file=str(mp4), frame_indices=99), "frame .* does not exist"),
        (lambda mp4: video(mp4, frame_indices=[50]), "are selected"),
        (lambda mp4: {"type": "video", "video": {"video_file": 5}}, "5 is not a clip"),
    ],
)
def test_items_that_cannot_be_opened(mp4: Path, item: Callable[[Path], dict], message: str) -> None:
    with pytest.raises(InputError, match=message):
        for visual in opened(item(mp4)):
            list(visual.frames())
