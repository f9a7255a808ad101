"""Questions have one right option; annotations are lines that the trainer and the programs take."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.shapes.annotations import GROUNDED_PROMPT, annotation, question_annotation
from eval.shapes.describe import describe, describe_grounded
from eval.shapes.judge import events_of
from eval.shapes.questions import LETTERS, Question, false_events, letter_in, questions
from eval.shapes.render import render_scene, write_clip
from eval.shapes.words import DIRECTION_PHRASES
from eval.shapes.world import DIRECTIONS, Scene, facts
from tarsier_jax.processing.sample import open_visuals, read_messages
from tests.eval.shapes.scenes import by_hand, random_scene
from train.data.samples import prepare

SEEDS = range(200)


def _questions(seed: int) -> list[Question]:
    return questions(random_scene(seed), np.random.default_rng(seed))


def _right(scene: Scene, question: Question) -> list[str]:
    """The letters of all options that are right, derived from the text alone."""
    events = facts(scene)
    if question.kind == "direction":
        name = question.text.removeprefix("In which direction does the ").removesuffix(" move?")
        ways = [fact.detail for fact in events if fact.verb == "move" and fact.names == (name,)]
        right = [f"{DIRECTION_PHRASES[way][0].capitalize()}." for way in ways]
        return [letter for letter, option in zip(LETTERS, question.options, strict=True) if option in right]
    if question.kind == "antonym":
        right = events
    elif "right after" in question.text:
        before = events_of(question.text.removeprefix("What happens right after ").removesuffix("?"))[0]
        right = [events[events.index(before) + 1]]
    else:
        right = [events[0] if "first" in question.text else events[-1]]
    return [letter for letter, option in zip(LETTERS, question.options, strict=True) if events_of(option)[0] in right]


def test_exactly_one_option_is_right() -> None:
    kinds, answers = Counter(), Counter()
    for seed in SEEDS:
        candidates = _questions(seed)
        assert candidates
        for question in candidates:
            assert len(set(question.options)) == len(question.options) == 4
            assert _right(random_scene(seed), question) == [question.answer], question
            kinds[question.kind] += 1
            answers[question.answer] += 1
    assert min(kinds[kind] for kind in ("order", "direction", "antonym")) > 20
    assert min(answers[letter] for letter in LETTERS) > 0.2 * answers.total()


def test_by_hand() -> None:
    candidates = {q.text: q for q in questions(by_hand(), np.random.default_rng(0))}
    first = candidates["What happens first?"]
    assert first.options[LETTERS.index(first.answer)] == "The red circle moves to the left."
    assert {"The red circle becomes blue.", "The blue circle grows."} < set(first.options)  # right, at another time
    way = candidates["In which direction does the red circle move?"]
    assert set(way.options) == {f"{DIRECTION_PHRASES[way][0].capitalize()}." for way in DIRECTIONS}
    assert way.options[LETTERS.index(way.answer)] == "To the left."
    assert way.prompt().splitlines()[1] == f"(A) {way.options[0]}"


def test_wrong_options_are_not_half_true() -> None:
    rng = np.random.default_rng(0)
    assert not [fact for fact in false_events(by_hand(), rng) if fact.verb == "move" and "circle" in fact.names[0]]
    for seed in SEEDS:
        assert not set(false_events(random_scene(seed), rng)) & set(facts(random_scene(seed)))


def _answer(line: dict[str, Any]) -> str:
    return "".join(item["text"] for item in line["messages"][1]["content"])


def test_annotation_of_a_file(tmp_path: Path) -> None:
    write_clip(tmp_path / "0.mp4", render_scene(by_hand(), 56, 56), rate=10)
    line = json.loads(json.dumps(annotation(by_hand(), {"video_file": str(tmp_path / "0.mp4")}, 5, rate=10)))
    assert (line["dataset"], line["task"], line["idx"]) == ("Shapes/3_events", "video/caption", 5)
    assert line["extra_info"] == {
        "duration": 3.1,
        "events": ["The red circle moves to the left.", "The red circle becomes blue.", "The blue circle grows."],
        "spans": [[0, 10], [10, 20], [21, 30]],
        "n_events": 3,
        "n_shots": 1,
        "n_subjects": 2,
    }
    assert line["messages"][1]["content"][0]["text"] == ""  # a program that generates must not see the reference
    chat = prepare(line, np.random.default_rng(0))
    assert _answer(chat) == describe(by_hand())
    (visual,) = open_visuals(read_messages(chat), 16, 256, "v1", 1, None)
    assert [frame.size for frame in visual.frames()] == [(56, 56)] * 16


@pytest.mark.parametrize("n", [4, 8, 16])
def test_grounded_annotation_of_frames_in_memory(n: int) -> None:
    for seed in range(30):
        text = describe_grounded(random_scene(seed), n)
        video = {"frames": np.zeros((32, 8, 8, 3), np.uint8)}
        line = annotation(random_scene(seed), video, seed, reference=text, prompt=GROUNDED_PROMPT)
        assert _answer(prepare(line, np.random.default_rng(0), n_frames=n)) == text


def test_question_annotation() -> None:
    for i, question in enumerate(_questions(1)):
        line = json.loads(json.dumps(question_annotation(question, {"video_file": "1.mp4"}, i, vid=1)))
        assert line["task"] == "video/QA" and line["dataset"].startswith("ShapesQA/")
        assert line["messages"][0]["content"][1]["text"].startswith("Question: ")
        assert _answer(prepare(line, np.random.default_rng(0))) == question.reply()
        right = dict(zip(LETTERS, question.options, strict=True))[question.answer]
        assert question.reply() == f" {right} Answer: ({question.answer})"


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        (" The red bar grows. Answer: (C)", "C"),
        ("B", "B"),
        (" (D).", "D"),
        ("Not (A), but (B) The red bar grows.", "B"),
        ("A red bar grows.", ""),
        (" The red bar grows. Answer: (", ""),
    ],
)
def test_the_letter_in_a_reply(reply: str, letter: str) -> None:
    assert letter_in(reply) == letter
