"""How far two judges agree: on each verdict, and in the figures that follow from the verdicts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from eval import bootstrap
from eval.bootstrap import Difference, Estimate
from eval.judges.judge import Judge, JudgeError
from eval.metrics.autodq import AUTODQ, entailed_share, events_of_reference, extract
from eval.metrics.judging import map_predictions
from eval.metrics.open_qa import OPEN_QA, answer_task
from eval.metrics.scores import OVERALL, Metric, ScoreArrays, arrays_of
from eval.predictions import Prediction

# Positive and negative verdicts of a pair of judges, per kind of verdict.
Verdicts = Mapping[str, Sequence[tuple[bool, bool]]]
PAIRS: tuple[str, ...] = ("both yes", "only A", "only B", "both no")


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The agreement of judges A and B in a benchmark.

    Attributes:
        benchmark: Name of the benchmark.
        num_samples: Number of samples with an answer.
        num_failed: Number of these for which a judge returned no usable verdict; they are left out of `verdicts`.
        counts: Number of verdicts by kind, such as "reference events", and by PAIRS.
        verdicts: "Agreement", the share of equal verdicts, and "Cohen's kappa" by kind, with intervals.
        scores: The benchmark's figures by A and by B.
        difference: The figures by B minus those by A.
    """

    benchmark: str
    num_samples: int
    num_failed: int
    counts: Mapping[str, Mapping[str, int]]
    verdicts: Mapping[str, Estimate]
    scores: tuple[Estimate, Estimate]
    difference: Difference


def measure_agreement(
    name: str, metric: Metric, predictions: Sequence[Prediction], judges: Sequence[Judge]
) -> Agreement:
    """Scores predictions with two judges and compares their verdicts.

    Args:
        name: Name of the benchmark.
        metric: AUTODQ or OPEN_QA.
        predictions: Predictions with an answer.
        judges: A and B.

    Raises:
        InputError: a judge cannot be used.
    """
    scores = [metric.score(predictions, judge) for judge in judges]
    first, second = map(arrays_of, scores)
    index = np.flatnonzero([all(each.values for each in pair) for pair in zip(*scores, strict=True)])
    pairs = _all_verdicts(metric, [predictions[int(i)] for i in index], judges)
    kinds = list(dict.fromkeys(kind for each in pairs if each for kind in each))
    tables = {kind: _count([each[kind] if each else () for each in pairs]) for kind in kinds}
    tables |= {"all": sum(tables.values(), np.zeros((len(pairs), 4)))} if len(kinds) > 1 else {}
    return Agreement(
        benchmark=name,
        num_samples=len(predictions),
        num_failed=len(predictions) - sum(each is not None for each in pairs),
        counts={kind: dict(zip(PAIRS, map(int, table.sum(axis=0)), strict=True)) for kind, table in tables.items()},
        verdicts={
            kind: _estimate_agreement(bootstrap.select_samples(first, index), table) for kind, table in tables.items()
        },
        scores=(_estimate(metric, first), _estimate(metric, second)),
        difference=bootstrap.compare(metric, first, second),
    )


def _all_verdicts(metric: Metric, predictions: Sequence[Prediction], judges: Sequence[Judge]) -> list[Verdicts | None]:
    """Returns the verdicts on each prediction; None if a judge fails."""

    def verdicts(prediction: Prediction) -> Verdicts | None:
        try:
            return _VERDICTS[metric](prediction, judges)
        except JudgeError:
            return None

    busiest = max(judges, key=lambda judge: judge.concurrency)
    return map_predictions(verdicts, predictions, busiest, "comparing verdicts")


def event_verdicts(prediction: Prediction, judges: Sequence[Judge]) -> Verdicts:
    """Returns whether each judge finds an event entailed, for the same events: the reference's, and A's."""
    reference, description = prediction.reference.lower(), (prediction.text or "").lower()
    sides = {
        "reference events": (description, events_of_reference(judges[0], prediction), reference),
        "predicted events": (reference, extract(judges[0], description), description),
    }
    return {kind: _entailed_pairs(judges, *side) for kind, side in sides.items()}


def _entailed_pairs(
    judges: Sequence[Judge], description: str, events: Sequence[str], caption: str
) -> list[tuple[bool, bool]]:
    if not events:  # the share is 1 whatever the judges reply
        return []
    first, second = (entailed_share(judge, description, events, caption)[1] for judge in judges)
    names = [(one.relationship, another.relationship) for one, another in zip(first, second, strict=True)]
    return [(one == "entailment", another == "entailment") for one, another in names]


def answer_verdicts(prediction: Prediction, judges: Sequence[Judge]) -> Verdicts:
    """Returns whether each judge accepts an answer."""
    first, second = (judge.answer(answer_task(prediction)).pred == "yes" for judge in judges)
    return {"answers": [(first, second)]}


_VERDICTS: dict[Metric, Callable[[Prediction, Sequence[Judge]], Verdicts]] = {
    AUTODQ: event_verdicts,
    OPEN_QA: answer_verdicts,
}


def _count(verdicts: Sequence[Sequence[tuple[bool, bool]]]) -> np.ndarray:
    """Returns the number of verdicts (N, 4) of N samples by PAIRS."""
    kinds = ((True, True), (True, False), (False, True), (False, False))
    return np.array([[list(pairs).count(kind) for kind in kinds] for pairs in verdicts], float).reshape(-1, 4)


def agreement_figures(arrays: ScoreArrays, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the share of equal verdicts, and Cohen's kappa: the agreement beyond chance, at most 1.

    Kappa (Cohen, 1960) is (p - e) / (1 - e), with the share p of equal verdicts, and the share e that two independent
    judges with the same shares of positive verdicts would have. It is nan if every verdict is the same.
    """
    counts = np.stack([weights @ arrays.values[name] for name in PAIRS], axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        both, first, second, neither = (counts / counts.sum(axis=-1, keepdims=True)).T
        observed = both + neither
        chance = (both + first) * (both + second) + (neither + first) * (neither + second)
        return {"Agreement": observed, "Cohen's kappa": (observed - chance) / (1 - chance)}


_AGREEMENT = dataclasses.replace(OPEN_QA, value_names=PAIRS, figures=agreement_figures)


def _estimate_agreement(arrays: ScoreArrays, table: np.ndarray) -> Estimate:
    values = dict(zip(PAIRS, table.T, strict=True))
    return _estimate(_AGREEMENT, dataclasses.replace(arrays, values=values))


def _estimate(metric: Metric, arrays: ScoreArrays) -> Estimate:
    """Returns the estimate over all samples."""
    return next(each for each in bootstrap.estimate(metric, arrays, arrays) if each.subset == OVERALL)
