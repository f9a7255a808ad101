"""Bootstrap intervals against analytic standard errors."""

import math
import time

import numpy as np
import pytest

from eval import bootstrap
from eval.metrics.scores import OVERALL, ScoreArrays, arrays_of
from tests.eval.scores import METRIC, random_scores, sample_score

Z = 1.96


def _arrays(values: np.ndarray, videos: list[str] | None = None) -> ScoreArrays:
    keys = [str(i) for i in range(len(values))]
    return ScoreArrays(keys, ["Quiz/Plays"] * len(keys), videos or keys, "messages", {"accuracy": values})


def _width(arrays: ScoreArrays) -> float:
    low, high = bootstrap.intervals_of(bootstrap.draw_figures(METRIC, arrays), arrays)["Accuracy"]
    return high - low


def _answers(num_samples: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(num_samples) < 0.7).astype(float)


def test_the_interval_has_the_analytic_width() -> None:
    runs = [_answers(800, seed) for seed in range(8)]
    ratios = [_width(_arrays(values)) / (2 * Z * 100 * values.std() / math.sqrt(800)) for values in runs]
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.03)
    assert ratios == pytest.approx([1.0] * 8, abs=0.1)  # 2,000 draws


def test_the_interval_is_around_the_figure() -> None:
    values = _answers(400)
    (overall,) = bootstrap.estimate(METRIC, _arrays(values), _arrays(values))
    low, high = overall.intervals["Accuracy"]
    assert low < overall.figures["Accuracy"] == 100 * values.mean() < high


def test_samples_of_one_video_widen_the_interval() -> None:
    values = np.repeat(_answers(200), 4)  # four equal answers per video count as one
    clustered = _width(_arrays(values, [str(i // 4) for i in range(800)]))
    assert clustered == pytest.approx(2 * _width(_arrays(values)), rel=0.1)
    assert clustered == pytest.approx(_width(_arrays(values[::4])), rel=0.1)


def test_pairing_narrows_the_difference() -> None:
    first = _answers(1000)
    second = first.copy()
    second[:40] = 1 - second[:40]  # the runs differ in 40 samples
    difference = bootstrap.compare(METRIC, _arrays(first), _arrays(second))
    low, high = difference.intervals["Accuracy"]
    gap = second - first
    assert difference.figures["Accuracy"] == pytest.approx(100 * gap.mean()) and difference.num_shared == 1000
    assert high - low == pytest.approx(2 * Z * 100 * gap.std() / math.sqrt(1000), rel=0.1)
    assert high - low < 0.5 * _width(_arrays(first))


def test_a_run_does_not_differ_from_itself() -> None:
    arrays = _arrays(_answers(50))
    difference = bootstrap.compare(METRIC, arrays, arrays)
    assert difference.figures == {"Accuracy": 0.0} and difference.intervals == {"Accuracy": (0.0, 0.0)}


def test_only_samples_that_both_runs_have_scored_are_compared() -> None:
    first = arrays_of([sample_score(i, 1.0) for i in range(4)] + [sample_score(4, 0.0, status="unreadable")])
    second = arrays_of([sample_score(i, float(i % 2)) for i in (4, 3, 2, 1, 9)])  # another order, another sample
    shared = bootstrap.shared_samples(first, second)
    assert list(shared[0].keys) == list(shared[1].keys) == [f"Quiz/Plays_{i}" for i in (1, 2, 3)]
    assert shared[1].values["accuracy"].tolist() == [1.0, 0.0, 1.0]
    assert bootstrap.compare(METRIC, first, second).num_shared == 3


def test_runs_without_a_shared_sample() -> None:
    difference = bootstrap.compare(METRIC, _arrays(np.array([])), _arrays(_answers(3)))
    assert difference.num_shared == 0 and math.isnan(difference.figures["Accuracy"])
    assert np.isnan(difference.intervals["Accuracy"]).all()


def test_subsets() -> None:
    scores = random_scores(60, ["Quiz/B", "Quiz/A"])
    estimates = bootstrap.estimate(METRIC, arrays_of(scores), arrays_of(scores, strict=True))
    assert [each.subset for each in estimates] == ["Quiz/A", "Quiz/B", OVERALL]
    assert [each.num_samples for each in estimates] == [30, 30, 60]
    values = [score.values["accuracy"] for score in scores if score.prediction.dataset == "Quiz/A" and score.values]
    assert estimates[0].figures["Accuracy"] == pytest.approx(100 * np.mean(values))
    assert estimates[0].strict_figures["Accuracy"] == pytest.approx(100 * sum(values) / 30)


def test_there_is_no_interval_of_one_video_or_without_a_value() -> None:
    same_video = [sample_score(i, float(i), vid="a.mp4") for i in range(2)]
    unscored = [sample_score(i, 0.0, status="missing") for i in range(3)]
    for scores, value in ((same_video, 50.0), (unscored, math.nan)):
        (overall,) = bootstrap.estimate(METRIC, arrays_of(scores), arrays_of(scores, strict=True))
        assert overall.figures["Accuracy"] == pytest.approx(value, nan_ok=True)
        assert np.isnan(overall.intervals["Accuracy"]).all()


def test_draws_are_repeatable_and_fast() -> None:
    arrays = _arrays(_answers(8000))
    start = time.process_time()
    drawn = bootstrap.draw_figures(METRIC, arrays)["Accuracy"]
    assert time.process_time() - start < 10
    assert drawn.shape == (bootstrap.NUM_DRAWS,)
    np.testing.assert_array_equal(drawn, bootstrap.draw_figures(METRIC, arrays)["Accuracy"])
