import copy
import functools
import json

import numpy as np
import pytest

from tarsier_jax.errors import InputError
from tarsier_jax.processing.packing import RowShape
from tarsier_jax.processing.processor import Processor
from tests.train.conftest import question_and_answer, trained_on
from train.data.annotations import AnnotationLine
from train.data.packing import BadSample, LoadLine, PackingConfig, PackUnit
from train.data.samples import check_grounding, prepare, split_preference


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def video(path: str = "a.mp4", **keys: object) -> dict:
    return {"type": "video", "video": {"video_file": path, **keys}}


def chat(*turns: dict | str | list, visual: dict | None = None, **keys: object) -> dict:
    """User and assistant by turns; the user shows the visual first."""
    turns = ([visual or video(), {"type": "text", "text": "Describe the video in detail."}], *turns)
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)], **keys}


def answer(text: str | None = "", **keys: object) -> list[dict]:
    return [{"type": "text", "text": text, **keys}]


# Chats


def test_a_chat_stays_as_it_is() -> None:
    line = chat("A cat.", "And then?", "It sleeps.", visual=video(fps=2), dataset="x", idx=3)
    before = copy.deepcopy(line)
    sample = prepare(line, rng())
    assert line == before
    assert (sample["dataset"], sample["idx"]) == ("x", 3)
    assert sample["messages"][0]["content"] == line["messages"][0]["content"]
    assert [m["content"][0]["text"] for m in sample["messages"][1:]] == ["A cat.", "And then?", "It sleeps."]


def test_the_reference_is_the_answer_where_the_text_is_empty() -> None:
    def last(content: list[dict]) -> list[str]:
        return [item["text"] for item in prepare(chat(content), rng())["messages"][-1]["content"]]

    assert last(answer("", reference="A cat sleeps.")) == ["A cat sleeps."]
    assert last(answer(None, reference="A cat sleeps.", video=None)) == ["A cat sleeps."]
    assert last(answer("Mine.", reference="Theirs.")) == ["Mine."]
    # Multiple-choice benchmarks contain the start of the answer, and the rest as a reference.
    assert last(answer(" Answer: (") + answer("", reference="B")) == [" Answer: (", "B"]


def test_chats_of_other_formats() -> None:
    expected = chat("A cat.")
    question, reply = "<video>Describe the video in detail.", {"from": "gpt", "value": "A cat."}
    swift = {"messages": [{"role": "user", "content": question}, *chat("A cat.")["messages"][1:]], "videos": ["a.mp4"]}
    llava = {"conversations": [{"from": "human", "value": question}, reply], "video": "a.mp4"}
    for line in (swift, llava):
        assert prepare(line, rng()) == prepare(expected, rng())
    with pytest.raises(InputError, match='files in "videos" is 0'):
        prepare({**swift, "videos": []}, rng())


def test_preferences_of_other_formats() -> None:
    question = {"from": "human", "value": "<video>Describe the video in detail."}
    answers = {"chosen": {"from": "gpt", "value": "A cat."}, "rejected": {"from": "gpt", "value": "A dog."}}
    pair = split_preference({"conversations": [question], "videos": ["a.mp4"], **answers})
    own = split_preference(chat(answer("", chosen="A cat.", rejected="A dog.")))
    assert [prepare(half, rng()) for half in pair] == [prepare(half, rng()) for half in own]


def test_a_chat_needs_an_answer() -> None:
    for line in (chat(), chat(""), chat(answer(" ")), chat(answer("", reference=None))):
        with pytest.raises(InputError, match="nothing to train on"):
            prepare(line, rng())
    with pytest.raises(InputError, match=r"messages\[1\] needs a content"):
        prepare({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant"}]}, rng())
    with pytest.raises(InputError, match="this one has none"):
        prepare({"messages": []}, rng())


def test_lines_of_unknown_tasks() -> None:
    with pytest.raises(InputError, match=r"messages, or a task that is one of multi_images, .*, not juggling"):
        prepare({"task": "juggling"}, rng())


def test_a_prepared_chat_is_processed(processor: Processor, clip: str) -> None:
    line = chat(answer("", reference="<frame: 1-2> It brightens."), visual=video(clip, frame_indices=[3, 30]))
    assert trained_on(processor, prepare(line, rng())) == "<frame: 1-2> It brightens.<|im_end|>"


# Frame tags


def test_tags_that_fit() -> None:
    check_grounding("<frame: 1> He sits. <frame: 2-5> He rises. <frame: 8-16> He leaves.", 16)
    check_grounding("No tag at all, 3 < 5.", 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<frame: 1-5> a <frame: 6-17> b", "<frame: 6-17> does not match the 16 frames"),
        ("<frame: 0-3> a", "<frame: 0-3> does not match"),
        ("<frame: 5-3> a", "<frame: 5-3> does not match"),
        ("<frame: 1-5> a <frame: 5-7> b", "<frame: 5-7> does not come after frame 5 .*of 16 frames"),
        ("<frame: 4> a <frame: 2> b", "<frame: 2> does not come after frame 4"),
        ("<frame: 1 to 5> a", "'<frame: 1 to 5>' is not a frame tag"),
        ("<frame:1> a", "'<frame:1>' is not a frame tag"),
        ("<frame: 3 a", "'<frame: 3 a' is not a frame tag"),
    ],
)
def test_tags_that_do_not(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_grounding(text, 16)


def test_tags_are_checked_against_the_frames_of_the_video() -> None:
    line = chat("<frame: 1-8> He sits.")
    prepare(line, rng(), n_frames=8)
    with pytest.raises(InputError, match="<frame: 1-8> does not match the 7 frames"):
        prepare(line, rng(), n_frames=7)
    listed = chat("<frame: 1-3> He sits.", visual=video(frame_indices=[0, 9]))
    with pytest.raises(InputError, match="<frame: 1-3> does not match the 2 frames"):
        prepare(listed, rng(), n_frames=16)
    with pytest.raises(InputError, match="has 0 videos"):
        prepare(chat("<frame: 1>", visual={"type": "image", "image": {"image_file": "a.png"}}), rng())


# Turns with a loss


def with_losses(line: dict, *losses: object) -> dict:
    """The line with a loss for each turn, unless that is "absent"."""
    messages = zip(line["messages"], losses, strict=True)
    return {**line, "messages": [m if loss == "absent" else {**m, "loss": loss} for m, loss in messages]}


def test_turns_without_a_loss_are_context(processor: Processor, clip: str) -> None:
    line = chat("Grey.", "And then?", "Lighter.", "And then?", "White <|im_end|>.", visual=video(clip))
    small = processor.replace(n_frames=4)

    def trained(*losses: object) -> str:
        return trained_on(small, prepare(with_losses(line, *losses), rng(), n_frames=4))

    assert trained(None, False, False, True, "absent", "absent") == "Lighter.<|im_end|>White <|im_end|>.<|im_end|>"
    assert trained("absent", True, "absent", False, None, None) == "Grey.<|im_end|>White <|im_end|>.<|im_end|>"
    assert trained("absent", False, "absent", False, "absent", False) == ""


def test_losses_that_mean_nothing() -> None:
    with pytest.raises(InputError, match=r'messages\[0\] is of the user and has "loss": true'):
        prepare(with_losses(chat("A cat."), True, True), rng())
    for loss in ("false", 0, 1.0, []):
        with pytest.raises(InputError, match=r"messages\[1\]: loss must be true or false, not"):
            prepare(with_losses(chat("A cat."), None, loss), rng())


def test_a_line_without_any_loss_is_bad(processor: Processor, clip: str) -> None:
    def load(processor: Processor, sample: dict, rng: np.random.Generator) -> PackUnit:
        return PackUnit([processor(prepare(sample, rng, 4), training=True)], {})

    packer = PackingConfig(processor.replace(n_frames=4), RowShape(512, 8, 16, 16, 4), 1, 0.01, "float32")
    line = with_losses(chat("Grey.", visual=video(clip)), None, False)
    load_line = LoadLine(functools.partial(load, packer.processor), packer)
    bad = load_line.random_map(AnnotationLine("a.jsonl", 1, json.dumps(line)), rng())
    assert (
        isinstance(bad, BadSample)
        and 'Nothing of the sample is trained on: its answer is empty, has "loss": false' in bad.reason
    )


# Preferences


def test_a_preference_becomes_two_chats(processor: Processor, clip: str) -> None:
    content = answer("", chosen="It brightens.", rejected="It darkens.")
    line = chat("Grey.", "And then?", content, visual=video(clip), train_task="dpo")
    before = copy.deepcopy(line)
    halves = [prepare(half, rng(), n_frames=4) for half in split_preference(line)]
    assert line == before
    small = processor.replace(n_frames=4)
    assert [trained_on(small, half) for half in halves] == [
        "Grey.<|im_end|>It brightens.<|im_end|>",
        "Grey.<|im_end|>It darkens.<|im_end|>",
    ]


def test_a_preference_on_a_turn_with_a_loss(processor: Processor, clip: str) -> None:
    line = chat("Grey.", "And then?", answer("", chosen="Lighter.", rejected="Darker."), visual=video(clip))
    halves = [prepare(half, rng(), n_frames=4) for half in split_preference(with_losses(line, None, False, None, None))]
    small = processor.replace(n_frames=4)
    assert [trained_on(small, half) for half in halves] == ["Lighter.<|im_end|>", "Darker.<|im_end|>"]
    with pytest.raises(InputError, match='are equal, or of a turn with "loss": false'):
        split_preference(with_losses(line, None, None, None, False))


def test_every_turn_may_have_a_preference() -> None:
    line = chat(answer("", chosen="a", rejected="b"), "And then?", answer("", chosen="same", rejected="same"))
    texts = [[m["content"][0]["text"] for m in half["messages"][1::2]] for half in split_preference(line)]
    assert texts == [["a", "same"], ["b", "same"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("A cat.", "but has neither"),
        (answer("", chosen=None, rejected=None), "but has neither"),
        (answer("", chosen="A cat."), 'needs a text "rejected", not None'),
        (answer("", chosen=" ", rejected="A dog."), "needs a text \"chosen\", not ' '"),
        (answer("", chosen="A cat.", rejected="A cat."), "are equal"),
    ],
)
def test_malformed_preferences(content: str | list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        split_preference(chat(content))


def test_preferences_need_messages() -> None:
    for line in ({}, {"messages": "Hi"}, {"messages": [{"role": "user", "content": "Hi"}]}):
        with pytest.raises(InputError, match="but has neither"):
            split_preference(line)


def test_a_preference_is_no_chat_without_a_text() -> None:
    pair = {"chosen": "A cat.", "rejected": "A dog."}
    assert question_and_answer(prepare(chat(answer("A cat.", **pair)), rng()))[1] == "A cat."
    with pytest.raises(InputError, match="Train on it with DPO"):
        prepare(chat(answer("", **pair)), rng())
