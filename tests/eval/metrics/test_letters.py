"""Letters of answers, as the original reads them, and accuracy of subtasks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.metrics import ACCURACY, SUBTASK_ACCURACY
from eval.metrics.letters import letter_of, reference_letter, strict_letter
from eval.metrics.scores import arrays_of
from eval.predictions import RowFormat
from tarsier_jax.errors import InputError
from tests.eval.rows import prediction

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = json.loads((GOLDENS / "letters.json").read_text(encoding="utf-8"))
READERS: dict[str, tuple[int, RowFormat]] = {"tarsier2": (0, "messages"), "v1": (1, "text"), "video_mme": (1, "text")}


@pytest.mark.parametrize("case", CASES, ids=[f"{case['answer']!r} for {case['reference']!r}" for case in CASES])
@pytest.mark.parametrize("name", READERS)
def test_letters_equal_the_original(case: dict[str, Any], name: str) -> None:
    first_digit, row_format = READERS[name]
    expected, letter = case[name], letter_of(case["answer"], first_digit)
    reference = reference_letter(case["reference"], row_format)
    if "error" in expected:  # the original stops
        assert reference == ""
        return
    assert (letter is not None) == expected["valid"]
    assert (letter is not None and letter == reference) == expected["correct"]
    assert letter == expected["letter"] or (expected["letter"] == "other" and letter not in "ABCDEF")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" (B) ", "B"),
        ("B. To the left", "B"),
        ("B) To the left", "B"),
        ("The answer is B.", "B"),
        ("Answer: (A)", "A"),
        ("A man opens a door", None),
        ("I think so", None),
        ("The left one", None),
        ("E", None),  # the question has two options
        ("", None),
    ],
)
def test_a_strict_reader_reads_options_only(answer: str, letter: str | None) -> None:
    assert strict_letter(answer, "Question: Where?\n(A) Right\n(B) Left") == letter


def test_invalid_answers_leave_the_denominator_of_the_comparable_figure_only() -> None:
    rows = [prediction("TVBench/One", i, text, "A") for i, text in enumerate(["A", "A", "B", "no idea"])]
    scores = SUBTASK_ACCURACY.score(rows, None)
    assert [score.status for score in scores] == ["scored", "scored", "scored", "unreadable"]
    assert SUBTASK_ACCURACY.tables("TVBench", scores)[0].rows == [
        ["One", "66.7", "3", "1"],
        ["OVERALL", "66.7", "3", "1"],
    ]
    weights = np.ones((1, 4))
    assert SUBTASK_ACCURACY.figures(arrays_of(scores), weights)["Accuracy"][0] == pytest.approx(200 / 3)
    assert SUBTASK_ACCURACY.figures(arrays_of(scores, strict=True), weights)["Accuracy"][0] == 50


def test_a_subtask_without_a_valid_answer_keeps_its_row() -> None:
    rows = [prediction("TVBench/One", 1, "A", "A"), prediction("TVBench/Two", 1, "none", "A")]
    scores = SUBTASK_ACCURACY.score(rows, None)
    expected = [["One", "100.0", "1", "0"], ["Two", "nan", "0", "1"], ["OVERALL", "100.0", "1", "1"]]
    assert SUBTASK_ACCURACY.tables("TVBench", scores)[0].rows == expected
    assert SUBTASK_ACCURACY.notes(scores) == ["No answer is valid in TVBench/Two. The original omits the row."]


def test_the_overall_of_the_first_version_is_the_mean_of_subtasks() -> None:
    texts = {"MVBench/Action Count": "AAAB", "MVBench/Scene": "B"}
    rows = [prediction(name, i, x, "A", row_format="text") for name, xs in texts.items() for i, x in enumerate(xs)]
    scores = SUBTASK_ACCURACY.score(rows, None)
    expected = [["AC", "75.0", "4", "0"], ["S", "0.0", "1", "0"], ["OVERALL", "37.5", "5", "0"]]
    assert SUBTASK_ACCURACY.tables("MVBench", scores)[0].rows == expected
    assert SUBTASK_ACCURACY.figures(arrays_of(scores), np.ones((1, 5)))["Accuracy"][0] == 37.5
    assert ACCURACY.figures(arrays_of(scores), np.ones((1, 5)))["Accuracy"][0] == 60


def test_halves_round_to_even() -> None:
    rows = [prediction("EgoSchema", i, "A" if i < 1 else "B", "A") for i in range(16)]
    assert ACCURACY.tables("EgoSchema", ACCURACY.score(rows, None))[0].rows[0][1] == "6.2"


def test_a_reference_without_a_letter_is_refused() -> None:
    with pytest.raises(InputError, match=r"TVBench/One_1 has the reference '\(\)', which contains no letter"):
        SUBTASK_ACCURACY.score([prediction("TVBench/One", 1, "A", "()")], None)


def test_the_best_constant_answer_is_the_most_frequent_reference() -> None:
    rows = [prediction("TVBench/One", i, "", letter) for i, letter in enumerate("ABBC")]
    assert SUBTASK_ACCURACY.constant_answers(rows)[0] == "B"
