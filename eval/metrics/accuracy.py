"""Accuracy of answers that are right or wrong."""

from collections.abc import Callable, Sequence

from eval.metrics.scores import OVERALL, Scores, by_subset
from eval.predictions import Prediction


def accuracy(predictions: Sequence[Prediction], judge: Callable[[Prediction], bool | None]) -> Scores:
    """Returns the accuracy per subset and over all samples. An answer that cannot be read is wrong.

    Args:
        judge: Returns whether the answer is right, or None if it cannot be read.
    """
    groups = {**by_subset(predictions), OVERALL: list(predictions)}
    return Scores({subset: _row([judge(prediction) for prediction in group]) for subset, group in groups.items()})


def _row(verdicts: Sequence[bool | None]) -> dict[str, float]:
    num_correct, num_unreadable = verdicts.count(True), verdicts.count(None)
    return {"accuracy": num_correct / len(verdicts), "samples": len(verdicts), "unreadable": num_unreadable}
