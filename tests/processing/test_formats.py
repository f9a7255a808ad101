"""Samples of other projects, and the annotation that each becomes."""

import copy
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tarsier_jax.errors import InputError
from tarsier_jax.processing.formats import normalize_sample
from tarsier_jax.processing.processor import Processor
from tarsier_jax.processing.sample import read_messages
from tests.processing.conftest import user, video_item

ANSWER = {"role": "assistant", "content": "A ball moves."}
PICTURE = Image.new("RGB", (112, 112), "red")


def video(source: str = "a.mp4", **keys: object) -> dict:
    return {"type": "video", "video": {"video_file": source, **keys}}


def image(source: str = "a.png") -> dict:
    return {"type": "image", "image": {"image_file": source}}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def chat(content: Any, **beside: Any) -> dict:
    """A question and its answer, with keys beside the messages."""
    return {"messages": [{"role": "user", "content": content}, ANSWER], **beside}


def llava(question: str, **beside: Any) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A ball moves."}]
    return {"id": "7", "conversations": turns, **beside}


@pytest.mark.parametrize(
    ("sample", "content"),
    [
        # ms-swift, LLaMA-Factory
        (chat("<video>Describe.", videos=["a.mp4"]), [video(), text("Describe.")]),
        (chat("Describe.", videos=["a.mp4"]), [video(), text("Describe.")]),
        (chat("<video>Describe.", videos="a.mp4"), [video(), text("Describe.")]),
        (
            chat("<image>\n<video> or <image>?", images=["a.png", "b.png"], videos=["a.mp4"]),
            [image(), video(), text(" or "), image("b.png"), text("?")],
        ),
        (
            chat("<video>Describe.", videos=[["1.png", "2.png"]]),
            [{"type": "video", "video": {"frames": ["1.png", "2.png"]}}, text("Describe.")],
        ),
        (chat("<video>Describe.", videos=[{"video": "a.mp4", "fps": 2}]), [video(fps=2), text("Describe.")]),
        # TRL, also as loaded by Arrow
        (chat([{"type": "image"}, text("Which?")], images=["a.png"]), [image(), text("Which?")]),
        (
            chat([{"type": "image", "text": None}, text("Which?")], images=[{"bytes": None, "path": "a.png"}]),
            [image(), text("Which?")],
        ),
        # LLaVA, ShareGPT
        (llava("<image>\nWhich?", image="a.png"), [image(), text("Which?")]),
        (llava("Which?\n<video>", video=["a.mp4"]), [text("Which?"), video()]),
        (
            {"conversations": [{**turn, "role": None, "weight": None} for turn in llava("<image>")["conversations"]]}
            | {"image": "a.png"},
            [image()],
        ),
        # Qwen, transformers
        (chat([{"type": "video", "video": "file:///d/a.mp4", "fps": 1.0}]), [video("/d/a.mp4", fps=1.0)]),
        (
            chat([{"type": "video", "video": "a.mp4", "video_start": 1, "video_end": 2.5}]),
            [video(start_time=1, end_time=2.5)],
        ),
        (
            chat([{"type": "video", "video": ["file:///1.png", "2.png"]}]),
            [{"type": "video", "video": {"frames": ["/1.png", "2.png"]}}],
        ),
        (chat([{"type": "video", "path": "a.mp4"}, {"type": "image", "url": "a.png"}]), [video(), image()]),
        (chat([{"type": "image_url", "image_url": {"url": "a.png"}}, text("Which?")]), [image(), text("Which?")]),
        # The annotation format with Qwen's keys, and with files that are named once more beside it
        (chat([video(video_start=1), text("<video>?")]), [video(start_time=1), text("<video>?")]),
        (chat([video(), text("Describe.")], video="a.mp4"), [video(), text("Describe.")]),
    ],
)
def test_every_format_becomes_an_annotation(sample: dict, content: list) -> None:
    before = copy.deepcopy(sample)
    annotation = normalize_sample(sample)
    assert sample == before
    question, answer = read_messages(sample)
    assert question == {"role": "user", "content": content}
    assert answer == {"role": "assistant", "content": [text("A ball moves.")]}
    assert annotation.keys() <= {"messages", "id"}
    assert normalize_sample(annotation) == annotation


def test_annotations_stay_as_they_are() -> None:
    items = [{**video(), "reference": None, "text": None}, {**text("Describe."), "video": None}]
    reference = [{**text(""), "reference": "A ball moves."}]
    sample = {**chat(items), "dataset": "DREAM", "idx": 1, "extra_info": {"videos": 3}, "vid": "1"}
    sample["messages"][1] = {"role": "assistant", "content": reference, "loss": False}
    assert normalize_sample(sample) == sample
    assert normalize_sample({"task": "video_permutation", "video": ["a.mp4"]}) == {
        "task": "video_permutation",
        "video": ["a.mp4"],
    }


def test_a_system_prompt_and_several_turns() -> None:
    turns = [("human", "<image>Which?"), ("gpt", "Red, no <video>."), ("human", "<image>And this?")]
    sample = {"conversations": [{"from": role, "value": value} for role, value in turns], "system": "Be brief."}
    messages = read_messages({**sample, "images": ["a.png", "b.png"]})
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in messages] == [
        [text("Be brief.")],
        [image(), text("Which?")],
        [text("Red, no <video>.")],
        [image("b.png"), text("And this?")],
    ]


def test_turns_that_are_not_trained_on() -> None:
    for key in ({"loss": False}, {"weight": 0}, {"train": False}):
        sample = {"messages": [{"role": "user", "content": "Hi"}, {**ANSWER, **key}]}
        assert read_messages(sample)[1] == {"role": "assistant", "content": [text("A ball moves.")], "loss": False}
    answers = {"messages": [{"role": "user", "content": "Hi"}, {**ANSWER, "loss": False}], "rejected_response": "B."}
    assert normalize_sample(answers)["messages"][1]["loss"] is False
    with pytest.raises(InputError, match=r"messages\[0\]: loss must be true or false, not 'no'"):
        read_messages({"messages": [{**ANSWER, "loss": "no"}]})


@pytest.mark.parametrize(
    ("sample", "first"),
    [
        (chat("<image>Which?", images=["a.png"], rejected_response="B."), "A ball moves."),
        (
            {
                "conversations": [{"from": "human", "value": "<image>Which?"}],
                "images": ["a.png"],
                "chosen": {"from": "gpt", "value": "A ball moves."},
                "rejected": {"from": "gpt", "value": "B."},
            },
            "",
        ),
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "image"}, text("Which?")]}],
                "images": ["a.png"],
                "chosen": [{"role": "assistant", "content": [text("A ball moves.")]}],
                "rejected": [{"role": "assistant", "content": "B."}],
            },
            "",
        ),
    ],
)
def test_preferences(sample: dict, first: str) -> None:
    annotation = normalize_sample(sample)
    question, answer = annotation["messages"]
    assert question["content"] == [image(), text("Which?")]
    assert answer["content"] == [{**text(first), "chosen": "A ball moves.", "rejected": "B."}]
    assert annotation.keys() == {"messages"}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (chat("<video>Describe."), 'files in "videos" is 0, but 1 places'),
        (chat([text("<image>Describe.")]), 'files in "images" is 0, but 1 places'),
        (chat([{"type": "video"}, text("Describe.")]), 'files in "videos" is 0, but 1 places'),
        (llava("<image>\nWhich?"), "The sample '7': the number of"),
        (chat("<video><video>", videos=["a.mp4"], idx=3), 'The sample 3: the number of files in "videos" is 1, but 2'),
        (chat("<video>", videos=["a.mp4", "b.mp4"]), 'files in "videos" is 2, but 1 places'),
        (chat("<image>Describe.", videos=["a.mp4"]), 'files in "images" is 0, but 1 places'),
        (chat([video(), text("Describe.")], videos=["b.mp4"]), 'files in "videos" is 1, but 0 places'),
        (chat([video()], video="a.mp4", videos=["a.mp4"]), 'has both "video" and "videos"'),
        (chat("Describe.", audios=["a.wav"]), 'has "audios" beside its messages, which is not read'),
        (chat("Describe.", video_file="a.mp4"), 'has "video_file" beside its messages'),
        ({"messages": [{**ANSWER, "images": ["a.png"]}]}, r'messages\[0\] has "images" beside its content'),
        ({"messages": [ANSWER], "videos": ["a.mp4"]}, "no message of the user to put them in"),
        (chat([{**text("Hi"), "video": "a.mp4"}]), r'content\[0\] has the type text and also "video"'),
        (chat("<video>", videos=["a.mp4"], video_start=1), 'has "video_start" beside its messages, which is not read'),
        (llava("<video>", video="a.mp4", fps=2), 'has "fps" beside its messages, which is not read'),
        (chat("Describe.", media=["a.mp4"]), 'has "media" beside its messages, which is not read'),
        ({"messages": [{**ANSWER, "video_file": "a.mp4"}]}, r'messages\[0\] has "video_file" beside its content'),
        (chat([{**text("Hi"), "video_file": "a.mp4"}]), 'has the type text and also "video_file"'),
        (chat([{"type": "video", "video": "a.mp4", "text": "Hi"}]), "has the type video and also a text"),
        (chat([video(video_start=1, start_time=2)]), 'has "start_time" twice'),
        (chat("<video>", videos=["a.mp4"], conversations=[]), "both messages and conversations"),
        (chat("Hi", rejected_response=["B."]), "preferences that are not two answers"),
        (chat("Hi", chosen="A.", rejected="B."), "preferences that are not two answers"),
        (chat("Hi", rejected_messages=[ANSWER]), 'has "rejected_messages"'),
        ({"conversations": [{"from": "observation", "value": "x"}]}, r"messages\[0\] needs a role"),
        # Keys that the annotation format does not have
        (chat([video(start=1, end=2)]), "has the key 'start', .* Use start_time, in seconds"),
        (chat([video(strat_time=1)]), "has the key 'strat_time', .* Use start_time if you mean that"),
        (chat([{"type": "video", "video": "a.mp4", "nframes": 4}]), "the key 'nframes', .* option n_frames"),
        (chat([{"type": "video", "video": "a.mp4", "total_pixels": 4}]), "the key 'total_pixels', .* max_pixels"),
        (chat([{"type": "image", "image": "a.png", "start_time": 4}]), "the image has the key 'start_time'"),
        (chat("<image>", images=[{"bytes": b"x", "path": None}]), "exactly one of .* but has bytes"),
        (chat("<video>", videos=[""]), "empty name in place of a file"),
        (chat("<video>", videos=[None]), "exactly one of .* but has none"),
        (chat([{"type": "image", "image": "a.png", "max_pixels": 9}, image()]), "max_pixels differs"),
    ],
)
def test_nothing_is_lost_in_silence(sample: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_messages(sample)


def test_limits_of_pixels_of_an_item(processor: Processor) -> None:
    """Those of all items of the sample limit it as its image_processing_config does."""
    plain = user({"type": "image", "image": {"frames": PICTURE}}, "Which?")
    limited = user({"type": "image", "image": PICTURE, "max_pixels": 56 * 56}, "Which?")
    expected = processor({**plain, "image_processing_config": {"max_pixels": 56 * 56}})
    np.testing.assert_array_equal(processor(limited).pixel_values, expected.pixel_values)
    assert len(expected.pixel_values) < len(processor(plain).pixel_values)


def test_a_sample_without_placeholders(processor: Processor) -> None:
    sample = {"messages": [{"role": "user", "content": "Explain <image> and <video>."}]}
    with pytest.raises(InputError, match="places need one"):
        processor(sample)
    example = processor({**sample, "placeholders": False})
    assert "Explain <image> and <video>." in processor.tokenizer.decode(example.input_ids)
    assert not example.selections


def test_a_placeholder_beside_items_is_text(processor: Processor) -> None:
    sample = user(video_item(PICTURE), "Explain the tag <image>.")
    assert "Explain the tag <image>." in processor.tokenizer.decode(processor(sample).input_ids)
