"""F1 of events in descriptions (AutoDQ, arXiv 2407.00634)."""

from collections.abc import Callable, Sequence

from eval.metrics.scores import Scores, by_subset
from eval.predictions import Prediction


def event_f1(predictions: Sequence[Prediction], judge: Callable[[Prediction], tuple[float, float]]) -> Scores:
    """Returns recall, precision and F1 of the events per subset.

    Args:
        judge: Returns the share of the reference's events that the prediction contains, and the share of the
            prediction's events that the reference contains.
    """
    rows = {}
    for subset, group in by_subset(predictions).items():
        rows[subset] = {**mean_event_scores([judge(prediction) for prediction in group]), "samples": len(group)}
    return Scores(rows)


def mean_event_scores(scores: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Returns the means of (recall, precision) pairs, and F1 of these means: keys f1, recall, precision."""
    recall, precision = (sum(values) / len(scores) for values in zip(*scores, strict=True))
    total = recall + precision
    return {"f1": 2 * recall * precision / total if total else 0.0, "recall": recall, "precision": precision}
