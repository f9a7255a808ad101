"""AutoDQ (arXiv 2407.00634, section 4.2): a judge compares the events of a description with those of the reference.

As in the original's evaluate_dream_gpt.py: recall is the share of the reference's events that the prediction entails,
precision the share of the prediction's events that the reference entails. A neutral event does not count, and the
share of an empty list is 1. F1 is that of mean recall and mean precision; OVERALL is the mean of subsets.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.judges.judge import Judge, JudgeError
from eval.judges.tasks import EventEntailment, EventExtraction, EventVerdict
from eval.metrics.judging import map_predictions
from eval.metrics.scores import (
    OVERALL,
    Metric,
    SampleScore,
    ScoreArrays,
    Table,
    exact_mean,
    group_by_subset,
    macro_mean,
    most_common,
    rounded,
    status_of,
)
from eval.predictions import Prediction
from tarsier_jax.processing.jsonl import to_json

_SMALL_BUCKETS = {"<=1": (0, 1), "==2": (2, 2), "==3": (3, 3), ">=4": (4, 10**9)}
_EVENT_BUCKETS = {"<=3": (0, 3), "in [4, 5]": (4, 5), "in [6, 7]": (6, 7), ">=8": (8, 10**9)}
_BUCKETS = {
    "#subjects": ("n_subjects", _SMALL_BUCKETS),
    "#shots": ("n_shots", _SMALL_BUCKETS),
    "#events": ("n_events", _EVENT_BUCKETS),
}


def score_descriptions(predictions: Sequence[Prediction], judge: Judge | None) -> list[SampleScore]:
    """Returns recall and precision of the events of each description.

    The judge receives captions in lower case. The reference's events are those of the annotation, if it has a list of
    them, even an empty one.
    """
    assert judge is not None
    return map_predictions(lambda prediction: _score(prediction, judge), predictions, judge, "judging descriptions")


def _score(prediction: Prediction, judge: Judge) -> SampleScore:
    reference, description = prediction.reference.lower(), (prediction.text or "").lower()
    details: dict[str, Any] = {"gt": reference, "pred": description}
    zeros = {"recall": 0.0, "precision": 0.0}
    try:
        reference_events = events_of_reference(judge, prediction)
        predicted_events = extract(judge, description)
        recall, reference_verdicts = entailed_share(judge, description, reference_events, reference)
        precision, predicted_verdicts = entailed_share(judge, reference, predicted_events, description)
    except JudgeError as error:
        status = status_of(prediction, "judge failed")
        return SampleScore(prediction, status, {}, zeros, {**details, "judge_error": str(error)})
    details |= {
        "events_gt": [_record(verdict) for verdict in reference_verdicts],
        "hit_num_recall": _hits(reference_verdicts, reference_events),
        "events_pred": [_record(verdict) for verdict in predicted_verdicts],
        "hit_num_precision": _hits(predicted_verdicts, predicted_events),
    }
    values = {"recall": recall, "precision": precision}
    return SampleScore(prediction, status_of(prediction), values, zeros if prediction.is_missing else values, details)


def events_of_reference(judge: Judge, prediction: Prediction) -> list[str]:
    """Returns the events in the annotation, if it has a list of them, or else the extracted ones. Raises JudgeError."""
    events = prediction.extra_info.get("events")
    return events if isinstance(events, list) else extract(judge, prediction.reference.lower())


def extract(judge: Judge, caption: str) -> list[str]:
    """Returns the events of a caption. Raises JudgeError."""
    return judge.answer(EventExtraction(caption.replace('"', "'")))


def entailed_share(
    judge: Judge, description: str, events: Sequence[str], caption: str
) -> tuple[float, list[EventVerdict]]:
    """Returns the share of the events that the description entails, and the verdicts.

    Args:
        judge: The judge.
        description: The description.
        events: The events.
        caption: The text that the events come from. It is judged in place of an empty list; the share is 1 then.

    Raises:
        JudgeError: there is no verdict.
    """
    verdicts = judge.answer(EventEntailment(description, tuple(events), caption))
    num_entailed = sum(verdict.relationship == "entailment" for verdict in verdicts)
    return num_entailed / len(events) if events else 1.0, verdicts


def _record(verdict: EventVerdict) -> dict[str, Any]:
    fields = {"event": verdict.event, "relationship": verdict.relationship, "reason": verdict.reason}
    return dict(verdict.item) or fields


def _hits(verdicts: Sequence[EventVerdict], events: Sequence[str]) -> str:
    num_entailed = sum(verdict.relationship == "entailment" for verdict in verdicts) if events else 0
    return f"hit: {num_entailed} / {len(events)}"


def _figures(arrays: ScoreArrays, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Returns F1, recall and precision, each 0 to 1: means of the means of subsets, and F1 of the two."""
    recall, precision = (macro_mean(arrays, name, weights) for name in ("recall", "precision"))
    return {"F1 Score": f1_score(recall, precision), "Action Recall": recall, "Action Precision": precision}


def f1_score(recall: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Returns F1; nan where recall and precision are 0, as in the original."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return 2 * recall * precision / (recall + precision)


def _tables(dataset: str, scores: Sequence[SampleScore]) -> list[Table]:
    """Returns the summary and the tables of buckets. A subset without a success has a row of nan.

    A table of buckets is left out if a sample lacks its number of subjects, shots or events.
    """
    rows, means = [], []
    for subset, group in group_by_subset(scores).items():
        recall, precision = _means(group)
        rows.append(_row(subset, recall, precision, group))
        means += [(recall, precision)] if recall == recall else []
    recall, precision = (exact_mean([pair[i] for pair in means]) for i in (0, 1))
    rows.append(_row(OVERALL, recall, precision, scores))
    columns = ["Task", "F1 Score", "Action Recall", "Action Precision", "Success", "Failed"]
    summary = Table(f"{dataset} Evaluation Summary", columns, rows)
    return [summary, *(table for name in _BUCKETS for table in _bucket_tables(dataset, name, scores))]


def _means(scores: Sequence[SampleScore]) -> tuple[float, float]:
    values = [score.values for score in scores if score.values]
    return exact_mean([value["recall"] for value in values]), exact_mean([value["precision"] for value in values])


def _cells(recall: float, precision: float) -> tuple[str, str, str]:
    f1 = float(f1_score(np.array(recall), np.array(precision)))
    return rounded(f1, 3), rounded(recall, 3), rounded(precision, 3)


def _row(name: str, recall: float, precision: float, scores: Sequence[SampleScore]) -> list[str]:
    num_successful = sum(bool(score.values) for score in scores)
    return [name, *_cells(recall, precision), str(num_successful), str(len(scores) - num_successful)]


def _bucket_tables(dataset: str, name: str, scores: Sequence[SampleScore]) -> list[Table]:
    key, buckets = _BUCKETS[name]
    scores = [score for score in scores if score.values]
    if any(not isinstance(score.prediction.extra_info.get(key), int) for score in scores):
        return []
    columns = []
    for low, high in buckets.values():
        group = [score for score in scores if low <= score.prediction.extra_info[key] <= high]
        f1, recall, precision = _cells(*_means(group))
        columns.append([recall, precision, f1, str(len(group))])
    rows = [[label, *cells] for label, *cells in zip(("Recall", "Precision", "F1", "Count"), *columns, strict=True)]
    return [Table(f"{dataset} Evaluation Split by Bucket {name}", ["Score", *buckets], rows)]


def _records(dataset: str, scores: Sequence[SampleScore]) -> dict[str, str]:
    """Returns the original's two files. The first also contains the tables of buckets, which the original prints."""
    summary, *buckets = _tables(dataset, scores)
    result = "\n".join([f"{summary}", *(f"\n{table.title}\n{table}" for table in buckets)])
    groups = group_by_subset([score for score in scores if score.values]).values()
    infos = [_info(score) for group in groups for score in group]
    return {f"{dataset}_eval_result.txt": f"{result}\n", f"{dataset}_eval_infos.jsonl": "".join(infos)}


def _info(score: SampleScore) -> str:
    names = ("gt", "pred", "events_gt", "hit_num_recall", "events_pred", "hit_num_precision")
    return to_json({"idx": score.prediction.key, **{name: score.details[name] for name in names}}) + "\n"


def _notes(scores: Sequence[SampleScore]) -> list[str]:
    tables_by_bucket = {name: _bucket_tables("", name, scores) for name in _BUCKETS}
    keys = [_BUCKETS[name][0] for name, bucket_tables in tables_by_bucket.items() if not bucket_tables]
    if not keys:
        return []
    return [f"A sample has no {' or '.join(keys)}: the table of these buckets is left out. The original stops."]


AUTODQ = Metric(
    value_names=("recall", "precision"),
    figures=_figures,
    score=score_descriptions,
    tables=_tables,
    records=_records,
    constant_answers=lambda predictions: most_common(each.reference for each in predictions)[:1],
    notes=_notes,
    needs_judge=True,
)
