"""Plots: the length of bars, rows without a figure, names of any length."""

import dataclasses
import io
import math
import warnings

import numpy as np
import pytest
from PIL import Image

from eval import bootstrap, plots
from eval.metrics.scores import arrays_of
from tests.eval.scores import METRIC, random_scores, sample_score

BAR, OVERALL_BAR = (0xA9, 0xC2, 0xDA), (0x5F, 0x8F, 0xBF)


def _estimates(scores: list) -> list[bootstrap.Estimate]:
    return bootstrap.estimate(METRIC, arrays_of(scores), arrays_of(scores, strict=True))


def _pixels(png: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(png)).convert("RGB"))


def _longest_run(png: bytes, colour: tuple[int, int, int]) -> int:
    return int((_pixels(png) == colour).all(axis=-1).sum(axis=1).max())


def test_bars_have_the_length_of_the_figure() -> None:
    lengths = {}
    for num_correct in (20, 40):
        scores = [sample_score(i, float(i < num_correct)) for i in range(40)]
        lengths[num_correct] = _longest_run(plots.plot_scores("quiz", _estimates(scores)), OVERALL_BAR)
    assert lengths[20] == pytest.approx(lengths[40] / 2, rel=0.05) and lengths[20] > 100


def test_a_subset_without_a_figure_has_a_row_and_no_bar() -> None:
    scored, unread = [sample_score(0, 1.0, "Quiz/A")], [sample_score(1, 0.0, "Quiz/B", status="unreadable")]
    one, both = (plots.plot_scores("quiz", _estimates(scores)) for scores in (scored, scored + unread))
    assert len(_pixels(both)) > len(_pixels(one))
    bars = (_pixels(both) == BAR).all(axis=-1).any(axis=1)
    assert np.count_nonzero(np.diff(bars.astype(int)) == 1) == 1


@pytest.mark.parametrize("num_subsets", [1, 40])
def test_names_of_any_length_and_content(num_subsets: int) -> None:
    subsets = [
        f"Quiz/{i} costs $5_{{a}}$ and has a name that is longer than the label of a row" for i in range(num_subsets)
    ]
    estimates = _estimates(random_scores(4 * num_subsets, subsets))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns if the layout does not fit
        image = _pixels(plots.plot_scores("$quiz", estimates))
        runs = {"runs/$a": estimates, "b" * 80: estimates[-1:]}
        _pixels(plots.plot_runs("$quiz", "Accuracy", runs))
    assert image.shape[1] == 1080 and image.shape[0] > 30 * num_subsets


def test_runs_have_colours_of_their_own() -> None:
    estimates = _estimates(random_scores(40, ["Quiz/A", "Quiz/B"]))
    published = [dataclasses.replace(each, intervals={}) for each in estimates[:1]]  # lacks a subset and intervals
    nothing = [dataclasses.replace(each, figures={"Accuracy": math.nan}) for each in estimates]
    image = _pixels(plots.plot_runs("quiz", "Accuracy", {"a": estimates, "b": published, "c": nothing}))
    for colour in ((0x44, 0x77, 0xAA), (0xEE, 0x66, 0x77), (0x22, 0x88, 0x33)):
        assert (image == colour).all(axis=-1).any()
