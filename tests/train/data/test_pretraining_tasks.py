import numpy as np
import pytest
from PIL import Image

from tarsier_jax.errors import InputError
from tarsier_jax.processing.processor import Processor
from tests.processing.conftest import frame_numbers
from tests.train.conftest import question_and_answer, trained_on
from train.data.samples import prepare


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Several pictures


def pictures(clip: str, dataset: str) -> dict:
    """Frames 5, 10 and 20 of the clip, and the picture 30; each text is the number of its frame."""
    texts = [{"prompt": f"Which is {i}?", "response": f"It is {i}."} for i in (5, 10, 20, 30)]
    return {
        "task": "multi_images",
        "dataset": dataset,
        "text": [[texts[0]], texts[1], [texts[2], texts[2]], texts[3]],
        "image": [{"video_file": clip, "frame_indices": [5, 10, 20]}, {"image_file": f"{clip}/30.png"}],
    }


def shown_pictures(sample: dict) -> list[int]:
    shown = []
    for item in sample["messages"][0]["content"][:-1]:
        image = item["image"]
        shown += frame_numbers([image["frames"] if "frames" in image else Image.open(image["image_file"])])
    return shown


def test_captions_begin_at_a_random_picture(clip: str) -> None:
    counts = set()
    for seed in range(40):
        sample = prepare(pictures(clip, "coco"), rng(seed), n_frames=4)
        (prompt, response), shown = question_and_answer(sample), shown_pictures(sample)
        if len(shown) == 1:
            first = 1
            assert prompt == "Describe the image in short."
        else:
            first = int(prompt.removeprefix("Describe the images starting from frame ").split()[0])
            assert prompt == f"Describe the images starting from frame {first} in short in order."
        assert response == "".join(f"It is {i}.\n" for i in shown[first - 1 :])
        counts.add((len(shown), first))
    assert {count for count, _ in counts} == {1, 2, 3, 4}
    assert len(counts) > 6


@pytest.mark.parametrize(("dataset", "how"), [("sharegpt4v_cap100k", " in detail"), ("webvid", ""), ("movie", "")])
def test_captions_of_other_lengths(clip: str, dataset: str, how: str) -> None:
    prompt, _ = question_and_answer(prepare(pictures(clip, dataset), rng(), n_frames=1))
    assert prompt == f"Describe the image{how}."


def test_questions_about_each_picture(processor: Processor, clip: str) -> None:
    line = pictures(clip, "mine")
    one = prepare(line, rng(), n_frames=1)
    (number,) = shown_pictures(one)
    assert question_and_answer(one) == (f"Which is {number}?\n", f"It is {number}.\n")
    several = next(s for s in (prepare(line, rng(seed), 4) for seed in range(40)) if len(shown_pictures(s)) == 2)
    a, b = shown_pictures(several)
    expected = f"Answer to question of frame 1:\nIt is {a}.\nAnswer to question of frame 2:\nIt is {b}.\n"
    assert question_and_answer(several) == (
        f"Question for frame 1:\nWhich is {a}?\nQuestion for frame 2:\nWhich is {b}?\n",
        expected,
    )
    assert trained_on(processor, several) == f"{expected}<|im_end|>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, 'multi_images needs "text", a list'),
        ({"image": []}, 'multi_images needs "image"'),
        ({"image": ["a.png"]}, "objects with a file, not 'a.png'"),
        ({"image": [{"image_file": "a.png"}]}, "4 texts for 1 pictures"),
        ({"image": [{"video_file": "a.mp4"}]}, r"a\.mp4 need frame_indices"),
        ({"text": [{"prompt": "What?", "response": ""}] * 4}, 'needs a "prompt" and a "response"'),
    ],
)
def test_malformed_pictures(clip: str, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare({**pictures(clip, "coco"), **change}, rng())


# The order of frames


def test_frames_to_put_in_order(processor: Processor, clip: str) -> None:
    counts = set()
    for seed in range(30):
        line = {"dataset": "video_permutation", "video": [{"video_file": clip}]}
        sample = prepare(line, rng(seed))
        (prompt, response), frames = question_and_answer(sample), sample["messages"][0]["content"][0]["video"]["frames"]
        head, *given, tail = prompt.split("\n")
        n = len(frames)
        assert head.endswith(f"scrambled video frames. The order of the first {3 * n // 8} ones are:")
        assert tail == "Output the order of the following frames:"
        assert len(given) == 3 * n // 8
        order = [int(place) for place in [*given, *response.split("\n")]]
        by_brightness = np.argsort(np.argsort(frame_numbers(frames))) + 1
        np.testing.assert_array_equal(order, by_brightness)
        counts.add(n)
    assert {min(counts), max(counts)} <= set(range(8, 25))
    assert len(counts) > 8
    assert processor.replace(n_frames=4)(sample, training=True).grid_thw[0, 0] == n  # all, for any n_frames


def test_a_task_may_name_the_order_of_frames(clip: str) -> None:
    line = {"task": "video_permutation", "video": [{"video_file": clip, "start_frame": 10, "end_frame": 14}]}
    frames = prepare(line, rng())["messages"][0]["content"][0]["video"]["frames"]
    assert sorted(frame_numbers(frames)) == [10, 11, 12, 13, 14]


def test_too_few_frames_to_put_in_order(clip: str) -> None:
    line = {"task": "video_permutation", "video": [{"video_file": clip, "frame_indices": [1, 2]}]}
    with pytest.raises(InputError, match="2 frames is too short"):
        prepare(line, rng())


# Tracking


def tracking(clip: str, **keys: object) -> dict:
    """Frame 2 i has the box (i, i) to (32 + i, 24 + i) in 64 x 48 pixels."""
    boxes = [[i, i, 32 + i, 24 + i] for i in range(10)]
    objects = {"0": {"phrase": "cat", "all_frame_bounding_boxes": boxes}, "1": None}
    return {
        "task": "video/object_tracking",
        "video_file": clip,
        "frame_indices": list(range(0, 20, 2)),
        "objects": objects,
        **keys,
    }


def test_boxes_are_fractions_of_the_frame(processor: Processor, clip: str) -> None:
    sample = prepare(tracking(clip), rng(), n_frames=3)
    frames = sample["messages"][0]["content"][0]["video"]["frames"]
    numbers = frame_numbers(frames)
    assert numbers == sorted(set(numbers)) and len(numbers) == 3
    boxes = [
        [round(x, 2) for x in (i / 64, i / 48, (32 + i) / 64, (24 + i) / 48)]
        for i in (number // 2 for number in numbers)
    ]
    assert question_and_answer(sample) == (
        "Given the bounding box coordinates of these objects in the first frame, output the bounding box coordinates "
        f"in the following frames.\nobject 1: {boxes[0]}\n",
        f"object 1: {boxes[1:]}",
    )
    assert trained_on(processor, sample) == f"object 1: {boxes[1:]}<|im_end|>"
    assert prepare(tracking(clip, task="object_tracking"), rng(), n_frames=3)["messages"] != []


def test_frames_and_boxes_are_padded_to_squares(processor: Processor, clip: str) -> None:
    config = {"do_padding": True, "max_pixels": 5000}
    sample = prepare(tracking(clip, image_processing_config=config), rng(), n_frames=10)
    _, response = question_and_answer(sample)
    assert response.startswith("object 1: [[0.02, 0.14, 0.52, 0.52], ")  # 8 rows are above frame 2, where i is 1
    frame = np.asarray(sample["messages"][0]["content"][0]["video"]["frames"][0])
    assert frame.shape == (64, 64, 3)
    assert (frame[:8] == 0).all() and (frame[8:56] == 20).all() and (frame[56:] == 0).all()
    assert sample["image_processing_config"] == {"max_pixels": 5000}
    np.testing.assert_array_equal(processor(sample, training=True).grid_thw, [[10, 4, 4]])


@pytest.mark.parametrize("dataset", ["hdvila", "hdvila_in_and_out_boxes"])
def test_boxes_of_some_datasets_are_those_of_squares(clip: str, dataset: str) -> None:
    sample = prepare(tracking(clip, dataset=dataset), rng(), n_frames=10)
    assert sample["messages"][0]["content"][0]["video"]["frames"][0].size == (256, 256)
    assert question_and_answer(sample)[1].startswith("object 1: [[0.0, 0.0, 0.13, 0.1], ")  # 1, 1, 33, 25 of 256


def test_four_objects_are_tracked(clip: str) -> None:
    line = tracking(clip)
    line["objects"] = {str(i): line["objects"]["0"] for i in range(6)}
    _, response = question_and_answer(prepare(line, rng()))
    assert [part.split(":")[0] for part in response.split("\n")] == [f"object {i}" for i in range(1, 5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects": {}}, 'needs "objects", a dict'),
        ({"objects": {"0": None}}, "two frames and an object, not 10 frames and 0 objects"),
        ({"objects": {"0": {"all_frame_bounding_boxes": [[0, 0, 1, 1]]}}}, "one for each of the 10"),
        ({"objects": {"0": {"all_frame_bounding_boxes": [[0, 0, 1]] * 10}}}, r"\[0, 0, 1\] in all_frame_bound"),
        ({"video_file": None}, "needs exactly one of video_file"),
        ({"image_processing_config": {"do_crop": True}}, "do_crop is not supported"),
    ],
)
def test_malformed_tracks(processor: Processor, clip: str, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        processor(prepare(tracking(clip, **change), rng()), training=True)


def test_all_choices_come_from_the_generator(clip: str) -> None:
    permutation = {"dataset": "video_permutation", "video": [{"video_file": clip}]}
    for line in (pictures(clip, "coco"), tracking(clip), permutation):
        texts = [question_and_answer(prepare(line, rng(seed), n_frames=4)) for seed in (1, 1, *range(10))]
        assert texts[0] == texts[1]
        assert len(set(texts)) > 3
