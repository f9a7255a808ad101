"""Open questions: the request to the judge, and failed samples."""

import numpy as np
import pytest

from eval.judges.judge import JudgeError
from eval.judges.tasks import AnswerComparison, AnswerVerdict
from eval.metrics import OPEN_QA
from eval.metrics.scores import arrays_of
from eval.predictions import Prediction
from tests.eval.metrics.judges import FakeJudge
from tests.eval.rows import prediction, row


def verdict(task: AnswerComparison) -> AnswerVerdict:
    if task.prediction == "fail":
        raise JudgeError("The reply could not be read.")
    return AnswerVerdict("yes", 4.5) if task.answer in task.prediction else AnswerVerdict("no", 1)


def test_accuracy_and_mean_score_of_successes() -> None:
    texts = ["A DOG.", "a cat", "fail"]
    rows = [prediction("MSVD-QA-val", i, text, "Dog", "text") for i, text in enumerate(texts)]
    scores = OPEN_QA.score(rows, FakeJudge({AnswerComparison: verdict}))
    assert [score.status for score in scores] == ["scored", "scored", "judge failed"]
    assert OPEN_QA.tables("MSVD-QA-val", scores)[0].rows == [["MSVD-QA-val", "50.0", "2.75", "2", "1"]]
    strict = OPEN_QA.figures(arrays_of(scores, strict=True), np.ones((1, 3)))
    assert strict["Accuracy"][0] == pytest.approx(100 / 3)


def test_the_judge_receives_the_question_as_it_is_and_answers_in_lower_case() -> None:
    sample = row("MSVD-QA-val", 1, "A Dog", "DOG", "text", prompt="USER: <video> Who?")
    sample["text"]["question"] = "Who Runs?"
    judge = FakeJudge({AnswerComparison: verdict})
    scores = OPEN_QA.score([Prediction.of(sample)], judge)
    assert judge.tasks == [AnswerComparison("Who Runs?", "dog", "a dog")] and not OPEN_QA.notes(scores)


def test_a_row_without_a_question_uses_the_prompt_and_says_so() -> None:
    judge = FakeJudge({AnswerComparison: verdict})
    scores = OPEN_QA.score([prediction("MSVD-QA-val", 1, "a dog", "dog", prompt="Who runs?")], judge)
    assert judge.tasks == [AnswerComparison("Who runs?", "dog", "a dog")]
    assert OPEN_QA.notes(scores) == ["Rows have no question: the judge receives the prompt. The original stops."]
