"""The judge parses every phrase, and every kind of mistake has its cost."""

import numpy as np
import pytest

from eval.judges.tasks import AnswerComparison, AnswerVerdict, EventEntailment, EventExtraction
from eval.shapes.clips import draw_clip_scene
from eval.shapes.describe import describe, event_sentences
from eval.shapes.judge import UNREAD, RulesJudge, corpus_scores, events_of, match_events, score_description
from eval.shapes.world import Fact
from tarsier_jax.errors import InputError

EVENTS = [
    "The red circle moves to the left.",
    "The red circle becomes blue.",
    "The blue circle and the green bar swap places.",
    "The green bar turns clockwise.",
]
MOVE = Fact("move", ("red circle",), "left")


def test_pronouns_and_joined_sentences() -> None:
    text = "First, a red circle moves left and then turns blue. It swaps places with a green bar. It spins clockwise."
    assert events_of(text) == [fact for event in EVENTS for fact in events_of(event)]
    assert score_description(text, EVENTS) == (1.0, 1.0)


@pytest.mark.parametrize(
    "text",
    [
        "the red circle moves to the left",
        "THE RED CIRCLE SLIDES LEFT!",
        "Then, red circle  glides to the left",
        "<frame: 2-5> A red circle moves left.",
        "And then the red circle moves to the left;",
    ],
)
def test_small_variations(text: str) -> None:
    assert events_of(text) == [MOVE]


@pytest.mark.parametrize(
    ("text", "recall", "precision"),
    [
        (" ".join(EVENTS), 1, 1),
        (" ".join(EVENTS[:3]), 3 / 4, 1),  # missing
        (" ".join(EVENTS) + " The green bar jumps.", 1, 4 / 5),  # extra
        (" ".join([EVENTS[1], EVENTS[0], *EVENTS[2:]]), 3 / 4, 3 / 4),  # two in the wrong order
        (" ".join(reversed(EVENTS)), 1 / 4, 1 / 4),
        (" ".join(["The red circle moves to the right.", *EVENTS[1:]]), 3 / 4, 3 / 4),  # wrong direction
        (" ".join([*EVENTS[:3], "The green bar turns counterclockwise."]), 3 / 4, 3 / 4),
        (" ".join(["The blue circle moves to the left.", *EVENTS[1:]]), 3 / 4, 3 / 4),  # wrong colour
        (" ".join([EVENTS[0], "It turns green.", *EVENTS[2:]]), 3 / 4, 3 / 4),
        (" ".join([*EVENTS[:3], "The green ring turns clockwise."]), 3 / 4, 3 / 4),  # wrong shape
        (" ".join([EVENTS[0]] * 4), 1 / 4, 1 / 4),  # the same again and again
        (f"{EVENTS[0]} Wonderful colours abound.", 1 / 4, 1 / 2),
        ("Nothing that can be read", 0, 0),
        ("It moves to the left.", 0, 0),  # without a subject
        ("Moves to the left.", 0, 0),
        ("", 0, 1),
    ],
)
def test_costs(text: str, recall: float, precision: float) -> None:
    assert score_description(text, EVENTS) == pytest.approx((recall, precision))


def test_rubbish_is_one_event_a_sentence() -> None:
    events = events_of("The red circle moves left and then dances. Blah. The red circle and the ring collide.")
    assert [fact.verb for fact in events] == ["move", UNREAD, UNREAD, UNREAD]
    assert match_events(events, events) == (0,)  # rubbish matches nothing, not even itself


def test_the_two_of_a_pair_may_come_in_either_order() -> None:
    texts = ["A red ring collides with a blue ring.", "The blue ring and the red ring bump into each other."]
    assert events_of(texts[0]) == events_of(texts[1]) == [Fact("collide", ("blue ring", "red ring"))]


def test_it_is_the_shape_named_last() -> None:
    text = "A red ring runs into a blue cross. It jumps."
    assert events_of(text)[1] == Fact("jump", ("blue cross",))
    text = "A red ring runs into a blue cross and then jumps."
    assert events_of(text)[1] == Fact("jump", ("red ring",))


def test_reference_without_events() -> None:
    assert score_description("A red circle jumps.", []) == (1.0, 0.0)
    assert score_description("", []) == (1.0, 1.0)


def test_corpus() -> None:
    scores = corpus_scores([" ".join(EVENTS), EVENTS[0]], [EVENTS, EVENTS])
    assert scores == pytest.approx({"recall": 5 / 8, "precision": 1.0, "f1": 2 * 5 / 8 / (13 / 8)})
    assert corpus_scores(["Rubbish."], [EVENTS]) == {"recall": 0.0, "precision": 0.0, "f1": 0.0}
    with pytest.raises(InputError, match="equally many"):
        corpus_scores([], [])
    with pytest.raises(InputError, match="2 descriptions and 1 lists"):
        corpus_scores(["", ""], [EVENTS])


def task_scores(description: str, reference: str, reference_events: list[str]) -> tuple[float, float]:
    """Returns recall and precision as the metric computes them from tasks (`eval.metrics.autodq`)."""
    judge, shares = RulesJudge(), []
    description, reference = description.lower(), reference.lower()
    events = judge.answer(EventExtraction(description.replace('"', "'")))
    for text, items, caption in ((description, reference_events, reference), (reference, events, description)):
        verdicts = judge.answer(EventEntailment(text, tuple(items), caption))
        entailed = [verdict for verdict in verdicts if verdict.relationship == "entailment"]
        shares.append(len(entailed) / len(items) if items else 1.0)
    return shares[0], shares[1]


JUNK = ["", "Blah, blah.", "It jumps.", 'Moves to the "left" and then dances', "<frame: 2> <frame", "Le chat dort!?"]


def alter(sentences: list[str], rng: np.random.Generator) -> str:
    """Returns sentences in random order, repeated, omitted, and with text that cannot be parsed."""
    indices = rng.integers(len(sentences), size=rng.integers(0, 9))
    texts = [*(sentences[i] for i in indices), *rng.choice(JUNK, size=rng.integers(0, 3))]
    return " ".join(rng.permutation(texts)) if texts else ""


def test_the_tasks_have_the_scores_of_descriptions() -> None:
    pairs = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        scene, other = (draw_clip_scene(rng)[0] for _ in range(2))
        events = event_sentences(scene)
        descriptions = [
            describe(scene, rng),
            describe(other),
            alter([*events, *event_sentences(other)], rng),
            alter([describe(scene, rng), *JUNK], rng),
        ]
        pairs += [(text, describe(scene), events) for text in descriptions]
        pairs += [(JUNK[seed % len(JUNK)], "", [])]
    scores = [task_scores(*pair) for pair in pairs]
    assert scores == [score_description(description, events) for description, _, events in pairs]
    assert len({score for score in scores}) > 50


def test_verdicts() -> None:
    judge = RulesJudge()
    verdicts = judge.answer(EventEntailment(EVENTS[1], (*EVENTS[:2], "Rubbish.", "")))
    names = [verdict.relationship for verdict in verdicts]
    assert names == ["contradiction", "entailment", "contradiction", "contradiction"]
    assert [verdict.event for verdict in verdicts] == [*EVENTS[:2], "Rubbish.", ""]
    assert judge.answer(EventExtraction("A red circle slides left. Rubbish!")) == [EVENTS[0], "rubbish"]
    assert judge.answer(AnswerComparison("who?", "A man", "a man.")) == AnswerVerdict("yes", 5.0)
    assert judge.answer(AnswerComparison("who?", "A man", "a boy")) == AnswerVerdict("no", 0.0)
    assert judge.settings == {"judge": "rules"}
