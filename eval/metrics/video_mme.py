"""Video-MME: accuracy by duration and domain (the original's evaluate_video_mme.py).

An invalid answer removes all questions of its video from the tables, and so does a duration that is not short, medium
or long. Digits are read from 1, and a reference is compared as it is.
"""

from collections.abc import Sequence

import numpy as np

from eval.judges.judge import Judge
from eval.metrics.letters import constant_letters, flat_figures, letter_of, strict_letter
from eval.metrics.scores import Metric, SampleScore, ScoreArrays, Table, status_of
from eval.predictions import Prediction

_DURATIONS = ("short", "medium", "long")
_DOMAINS = (
    "Knowledge",
    "Film & Television",
    "Sports Competition",
    "Artistic Performance",
    "Life Record",
    "Multilingual",
)
_ALL = "entire dataset"


def score_questions(predictions: Sequence[Prediction], judge: Judge | None = None) -> list[SampleScore]:
    """Returns whether each answer is right; the questions of a video that the tables leave out have no value."""
    letters = [letter_of(prediction.text or "", first_digit=1) for prediction in predictions]
    first: dict[str, Prediction] = {}
    for prediction in predictions:
        first.setdefault(_video(prediction), prediction)
    omitted = {_video(each) for each, letter in zip(predictions, letters, strict=True) if letter is None}
    omitted |= {name for name, each in first.items() if each.extra_info.get("duration") not in _DURATIONS}
    scores = []
    for prediction, letter in zip(predictions, letters, strict=True):
        value = {"accuracy": float(letter == prediction.reference)}
        video = _video(prediction)
        details = {
            "letter": letter,
            "strict_letter": strict_letter(prediction.text or "", prediction.prompt),
            # The original takes the categories of a video from its first question.
            **{key: first[video].extra_info.get(key) for key in ("duration", "domain")},
        }
        status = status_of(prediction, "unreadable" if letter is None else "scored")
        scores.append(SampleScore(prediction, status, {} if video in omitted else value, value, details))
    return scores


def _video(prediction: Prediction) -> str:
    return str(prediction.extra_info.get("vid", prediction.vid))


def _figures(arrays: ScoreArrays, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the accuracy in percent over all questions of complete videos."""
    return {"Overall": flat_figures(arrays, weights)["Accuracy"]}


def _tables(dataset: str, scores: Sequence[SampleScore]) -> list[Table]:
    """Returns the accuracy per domain for each duration and the entire dataset."""
    columns = [_column(scores, duration) for duration in (*_DURATIONS, None)]
    names = [*_DOMAINS, "Overall"]
    rows = [[name, *(column[name] for column in columns)] for name in names]
    return [Table("Evaluation Summary", ["Domain", *_DURATIONS, _ALL], rows)]


def _column(scores: Sequence[SampleScore], duration: str | None) -> dict[str, str]:
    scores = [score for score in scores if score.values and duration in (None, score.details["duration"])]
    column = {d: _percent([score for score in scores if score.details["domain"] == d]) for d in _DOMAINS}
    return {**column, "Overall": _percent(scores)}


def _percent(scores: Sequence[SampleScore]) -> str:
    correct = sum(score.values["accuracy"] for score in scores)
    return f"{100 * correct / len(scores) if scores else 0:.1f}%"


def _records(dataset: str, scores: Sequence[SampleScore]) -> dict[str, str]:
    """Returns the original's file: one block per duration, with a blank before each percentage."""
    (table,) = _tables(dataset, scores)
    blocks = []
    for i, name in enumerate(table.columns[1:], 1):
        heading = f"Evaluation on the {name}" if name == _ALL else f"Evaluation on video Type: {name}"
        lines = [f"{row[0]}:  {row[i]}" for row in table.rows]
        if name == _ALL:
            lines[-1:] = ["*" * 37, "Overall Performance", "*" * 37, lines[-1]]
        blocks += ["=" * 37, heading, "=" * 37, "-" * 37, "Video Categories", "-" * 37, *lines]
    return {f"{dataset}_eval_result.txt": "\n".join(blocks) + "\n"}


def _notes(scores: Sequence[SampleScore]) -> list[str]:
    unknown = [s for s in scores if s.status != "missing" and s.details["duration"] not in _DURATIONS]
    omitted = sum(not score.values and score.status == "scored" for score in scores) - len(unknown)
    sentences = []
    if omitted:
        sentences.append(f"Readable answers left out because another answer about their video is invalid: {omitted}.")
    if unknown:
        sentences.append(f"Questions left out because the duration of their video is unknown: {len(unknown)}.")
    return sentences


VIDEO_MME_ACCURACY = Metric(
    value_names=("accuracy",),
    figures=_figures,
    score=score_questions,
    tables=_tables,
    records=_records,
    constant_answers=constant_letters,
    notes=_notes,
)
