"""Descriptions: every phrasing has full marks, and grounded ones have frames for every event."""

import dataclasses
import itertools

import numpy as np
import pytest

from eval.shapes.describe import describe, describe_frame, describe_grounded, event_sentences, frame_groups
from eval.shapes.judge import UNREAD, corpus_scores, events_of, score_description
from eval.shapes.words import ALONE, PLACES, article, phrasings, plain, predicates
from eval.shapes.world import PAIR_VERBS, Fact, Pose, Shape, facts, opposite, reverse
from tarsier_jax.processing.frame_sampling import sample_uniform
from tests.eval.shapes.scenes import by_hand, random_scene
from train.data.samples import check_grounding

SEEDS = range(300)


def test_plain() -> None:
    assert event_sentences(by_hand()) == [
        "The red circle moves to the left.",
        "The red circle becomes blue.",
        "The blue circle grows.",
    ]
    assert describe(by_hand()) == (
        "The red circle moves to the left. Then the red circle becomes blue. Then the blue circle grows."
    )


def test_shapes_of_a_frame() -> None:
    """Row by row, from left to right, in ninths of the frame, under the names that the shapes bear by then."""
    assert describe_frame(by_hand(), 0) == "A small red circle at the top right, a small green bar at the bottom right."
    assert (
        describe_frame(by_hand(), 30) == "A large blue circle at the top left, a small green bar at the bottom right."
    )
    pose = dataclasses.replace(by_hand().shapes[1].pose, size=0.15)
    for angle, tilt in ((0.0, ""), (60.0, "tilted clockwise "), (120.0, "tilted counterclockwise "), (180.0, "")):
        bar = Shape("bar", dataclasses.replace(pose, angle=angle))
        scene = dataclasses.replace(by_hand(), shapes=(bar,), events=())
        assert describe_frame(scene, 0) == f"A large green bar {tilt}at the bottom right."
    bar, absent = by_hand().shapes[1], Pose(0.5, 0.5, 0.1, 0.0, "red", present=False)
    middle = dataclasses.replace(by_hand(), shapes=(Shape("ring", absent), bar), events=())
    assert describe_frame(middle, 0) == "A small green bar at the bottom right."
    assert describe_frame(dataclasses.replace(middle, shapes=middle.shapes[:1]), 0) == "Nothing."
    above = dataclasses.replace(by_hand(), shapes=(bar, Shape("ring", dataclasses.replace(bar.pose, y=0.2))), events=())
    assert describe_frame(above, 0).startswith("A small green ring at the top right, a small green bar")
    shapes = {
        Shape("ring", dataclasses.replace(absent, present=True, x=x, y=y)) for x in (0.3, 0.4) for y in (0.6, 0.7)
    }
    texts = {describe_frame(dataclasses.replace(middle, shapes=(shape,)), 0) for shape in shapes}
    assert texts == {f"A small red ring {place}." for row in PLACES[1:] for place in row[:2]}


def test_random_phrasings() -> None:
    texts = {describe(by_hand(), np.random.default_rng(seed)) for seed in range(200)}
    assert len(texts) > 150
    for phrase in ("First, ", "slides left", " and then becomes blue", "After that, ", "the blue circle gets bigger"):
        assert any(phrase in text for text in texts), phrase
    assert describe(by_hand(), np.random.default_rng(7)) == describe(by_hand(), np.random.default_rng(7))


def test_every_phrase_is_read_as_what_it_says() -> None:
    for predicate, (verb, detail) in ALONE.items():
        assert predicate in predicates(verb, detail)  # no phrase means two things
        assert events_of(f"A red ring {predicate}.") == [Fact(verb, ("red ring",), detail)]
    for verb in PAIR_VERBS:
        fact = Fact(verb, ("blue cross", "red ring"))
        assert all(events_of(text) == [fact] for text in phrasings(fact, "a blue cross", article("red ring")))


def test_full_marks_for_every_description() -> None:
    for seed in SEEDS:
        scene, rng = random_scene(seed), np.random.default_rng(seed)
        texts = [describe(scene), describe(scene, rng), describe(scene, rng), describe_grounded(scene, 8, rng)]
        assert all(score_description(text, event_sentences(scene)) == (1.0, 1.0) for text in texts)
        assert events_of(" ".join(event_sentences(scene))) == facts(scene)


def test_backwards() -> None:
    scenes = [random_scene(seed) for seed in SEEDS]
    forward = [event_sentences(s) for s in scenes]
    backward = [describe(reverse(s)) for s in scenes]
    assert corpus_scores(backward, [event_sentences(reverse(s)) for s in scenes])["f1"] == 1.0
    # The other events happen either way: jumps, collisions, swaps, and pairs that undo each other.
    assert corpus_scores(backward, forward)["f1"] < 0.4
    for text, scene in zip(backward, scenes, strict=True):
        either_way = sum(opposite(fact) in facts(scene) for fact in facts(scene))
        assert score_description(text, event_sentences(scene))[0] <= either_way / len(scene.events)


def test_grounded_by_hand() -> None:
    # Of 31 frames, 4 are sampled: 0, 10, 20, 30; 16 are: 0, 2, 4, ...
    assert describe_grounded(by_hand(), 4) == (
        "<frame: 2> The red circle moves to the left. <frame: 3> Then the red circle becomes blue. "
        "<frame: 4> Then the blue circle grows."
    )
    assert frame_groups(by_hand(), 16) == [(2, 6, [0]), (7, 11, [1]), (12, 16, [2])]
    assert frame_groups(by_hand(), 3) == [(2, 2, [0, 1]), (3, 3, [2])]


@pytest.mark.parametrize("n", [4, 8, 16])
def test_grounded(n: int) -> None:
    for seed in SEEDS:
        scene = random_scene(seed)
        check_grounding(describe_grounded(scene, n), n)
        groups = frame_groups(scene, n)
        assert [i for _, _, events in groups for i in events] == list(range(len(scene.events)))
        assert all(a[1] < b[0] for a, b in itertools.pairwise(groups))
        if n == 16:
            assert len(groups) == len(scene.events)
            assert all(last > first for first, last, _ in groups)


def test_tags_cover_the_frames_that_show_an_event() -> None:
    indices = sample_uniform(32, 16)
    for seed in range(50):
        for first, last, (i,) in frame_groups(random_scene(seed), 16):
            event = random_scene(seed).events[i]
            assert indices[first - 2] <= event.first < indices[first - 1]
            assert indices[last - 1] <= event.last
            assert last == 16 or event.last < indices[last]


def test_nothing_is_left_unread() -> None:
    verbs = {
        fact.verb for seed in SEEDS for fact in events_of(describe(random_scene(seed), np.random.default_rng(seed)))
    }
    assert UNREAD not in verbs


def test_articles() -> None:
    assert plain(Fact("jump", ("orange ring",)), definite=False) == "An orange ring jumps."
