"""Open questions: a judge compares the answer with the right one (the original's evaluate_qa_oe_gpt.py)."""

from collections.abc import Sequence

import numpy as np

from eval.judges.judge import Judge, JudgeError
from eval.judges.tasks import AnswerComparison
from eval.metrics.judging import map_predictions
from eval.metrics.scores import (
    Metric,
    SampleScore,
    ScoreArrays,
    Table,
    exact_mean,
    most_common,
    rounded,
    status_of,
    weighted_mean,
)
from eval.predictions import Prediction


def score_answers(predictions: Sequence[Prediction], judge: Judge | None) -> list[SampleScore]:
    """Returns the judge's verdicts: accuracy 0 or 1, and a score from 0 to 5.

    The judge receives the question as it is, and both answers in lower case.
    """
    assert judge is not None

    def compare(prediction: Prediction) -> SampleScore:
        task = answer_task(prediction)
        try:
            verdict = judge.answer(task)
        except JudgeError as error:
            failed = {"accuracy": 0.0, "score": 0.0}
            status = status_of(prediction, "judge failed")
            return SampleScore(prediction, status, {}, failed, {"judge_error": str(error)})
        values = {"accuracy": float(verdict.pred == "yes"), "score": float(verdict.score)}
        return SampleScore(prediction, status_of(prediction), values, values, {"question": task.question})

    return map_predictions(compare, predictions, judge, "judging answers")


def answer_task(prediction: Prediction) -> AnswerComparison:
    """Returns the task of a judge."""
    question = prediction.prompt if prediction.question is None else prediction.question
    return AnswerComparison(question, prediction.reference.lower(), (prediction.text or "").lower())


def _figures(arrays: ScoreArrays, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the share of right answers in percent, and the mean score."""
    return {
        "Accuracy": 100 * weighted_mean(arrays.values["accuracy"], weights),
        "Average Score": weighted_mean(arrays.values["score"], weights),
    }


def _tables(dataset: str, scores: Sequence[SampleScore]) -> list[Table]:
    """Returns a table of one row."""
    values = [score.values for score in scores if score.values]
    accuracy = rounded(100 * exact_mean([value["accuracy"] for value in values]), 1)
    mean_score = rounded(exact_mean([value["score"] for value in values]), 3)
    columns = ["Dataset", "Accuracy", "Average Score", "Success", "Failed"]
    row = [dataset, accuracy, mean_score, str(len(values)), str(len(scores) - len(values))]
    return [Table("Evaluation Summary", columns, [row])]


def _records(dataset: str, scores: Sequence[SampleScore]) -> dict[str, str]:
    _, accuracy, mean_score, num_successful, num_failed = _tables(dataset, scores)[0].rows[0]
    text = (
        f"Dataset: {dataset}\tMetric: GPT Accuracy\n#Successful Results: {num_successful}\n"
        f"#Failed Results: {num_failed}\nAccuracy: {accuracy}\nAverage Score: {mean_score}\n"
    )
    return {f"{dataset}_eval_result.txt": text}


def _notes(scores: Sequence[SampleScore]) -> list[str]:
    has_question = all(score.prediction.question is not None for score in scores if score.status != "missing")
    return [] if has_question else ["Rows have no question: the judge receives the prompt. The original stops."]


OPEN_QA = Metric(
    value_names=("accuracy", "score"),
    figures=_figures,
    score=score_answers,
    tables=_tables,
    records=_records,
    constant_answers=lambda predictions: most_common(each.reference for each in predictions)[:1],
    notes=_notes,
    needs_judge=True,
)
