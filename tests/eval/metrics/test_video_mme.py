"""Video-MME: complete videos, durations and domains."""

from typing import Any

from eval.metrics import VIDEO_MME_ACCURACY
from eval.metrics.scores import SampleScore
from eval.predictions import Prediction
from tests.eval.rows import prediction


def question(idx: int, vid: str, text: str, reference: str = "A", duration: str = "short") -> Prediction:
    extra: dict[str, Any] = {"vid": vid, "duration": duration, "domain": "Knowledge"}
    return prediction("Video-MME", idx, text, reference, extra_info=extra)


def score(*questions: Prediction) -> list[SampleScore]:
    return VIDEO_MME_ACCURACY.score(questions, None)


def overall(scores: list[SampleScore]) -> list[str]:
    return list(VIDEO_MME_ACCURACY.tables("Video-MME", scores)[0].rows[-1])


def test_an_invalid_answer_removes_its_video() -> None:
    scores = score(question(0, "1", "A"), question(1, "1", "no"), question(2, "2", "A"), question(3, "2", "B"))
    assert overall(scores) == ["Overall", "50.0%", "0.0%", "0.0%", "50.0%"]
    assert [each.status for each in scores] == ["scored", "unreadable", "scored", "scored"]
    assert sum(each.strict["accuracy"] for each in scores) == 2
    assert VIDEO_MME_ACCURACY.notes(scores) == [
        "Readable answers left out because another answer about their video is invalid: 1."
    ]


def test_an_unknown_duration_is_left_out_and_counted() -> None:
    scores = score(question(0, "1", "A", duration="feature"), question(1, "2", "B", duration="long"))
    assert overall(scores) == ["Overall", "0.0%", "0.0%", "0.0%", "0.0%"]
    assert VIDEO_MME_ACCURACY.notes(scores) == ["Questions left out because the duration of their video is unknown: 1."]


def test_digits_start_at_one_and_references_are_compared_as_they_are() -> None:
    scores = score(question(0, "1", "1", "B"), question(1, "2", "0"), question(2, "3", "A", "(A)"))
    assert [each.details["letter"] for each in scores] == ["B", None, "A"]
    assert [each.strict["accuracy"] for each in scores] == [1, 0, 0]


def test_a_row_without_the_idx_that_the_first_version_adds_is_scored() -> None:
    assert "idx" not in question(0, "1", "A").extra_info  # the original's Tarsier2 code stops
    assert overall(score(question(0, "1", "A")))[1] == "100.0%"
