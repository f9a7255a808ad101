"""A line of moving shapes is a seed; its clip and conversation are drawn on loading."""

import json
from pathlib import Path

import numpy as np
import pytest

from eval.shapes.annotations import GROUNDED_PROMPT, IMAGE_PROMPT, VIDEO_PROMPT
from eval.shapes.judge import events_of
from tarsier_jax.errors import InputError
from tarsier_jax.processing.processor import Processor
from tests.train.conftest import trained_on
from train.data.annotations import mix_files
from train.micro.curriculum import write_seeds
from train.micro.samples import prepare_line


def sample(**line: object) -> dict:
    return prepare_line({"task": "moving_shapes", **line}, np.random.default_rng(0), 16)


def frames_of(chat: dict) -> np.ndarray:
    return np.stack(chat["messages"][0]["content"][0]["video"]["frames"])


def test_a_seed_is_a_clip() -> None:
    first, again, other = sample(seed=3), sample(seed=3), sample(seed=4)
    np.testing.assert_array_equal(frames_of(first), frames_of(again))
    assert first["messages"][1] == again["messages"][1] != other["messages"][1]


def test_what_is_asked(processor: Processor) -> None:
    """Descriptions, grounded ones, and descriptions with up to two questions; answers are trained on."""
    asked = {VIDEO_PROMPT: 0, GROUNDED_PROMPT: 0, "question": 0}
    for seed in range(200):
        chat = sample(seed=seed)
        prompt = chat["messages"][0]["content"][1]["text"]
        asked[prompt if prompt in asked else "question"] += 1
        learnt = trained_on(processor, chat)
        if prompt != GROUNDED_PROMPT:
            answers = [part for part in learnt.split("<|im_end|>") if part.strip()]
            (description,) = [answer for answer in answers if "Answer: (" not in answer]
            assert all(event.verb != "unread" for event in events_of(description))
            assert len(answers) == len(chat["messages"]) // 2 <= 3
    assert min(asked.values()) >= 5


@pytest.mark.parametrize("events", [1, 4])
def test_so_many_events(events: int) -> None:
    for seed in range(20):
        chat = sample(seed=seed, events=events)
        assert len(events_of(chat["messages"][1]["content"][0]["text"])) == events
        assert 3 * events <= len(frames_of(chat)) <= 16


def test_a_still() -> None:
    named = set()
    for seed in range(20):
        asked, answer = sample(seed=seed, still=True)["messages"]
        assert asked["content"][0]["image"]["frames"].shape[2] == 3 and asked["content"][1]["text"] == IMAGE_PROMPT
        named.add(answer["content"][0]["text"])
    assert len(named) > 10 and any(text.count(" ") >= 5 for text in named)


def test_lines_keep_their_order(tmp_path: Path) -> None:
    path = write_seeds(tmp_path / "seeds.jsonl", [(2, [{"events": 1}]), (3, [{}, {"events": 2}])], first=7)
    lines = mix_files(str(path), seed=0, repeat=True, shuffle=False)
    read = [json.loads(lines[i].text) for i in range(6)]
    assert [line["seed"] for line in read] == [7, 8, 9, 10, 11, 7]
    assert [line.get("events") for line in read] == [1, 1, None, 2, None, 1]


@pytest.mark.parametrize("seed", [None, -1, "3"])
def test_a_line_without_a_seed(seed: object) -> None:
    with pytest.raises(InputError, match="needs a seed"):
        sample(seed=seed)
