"""Bootstrap intervals of figures, clustered by video: questions about one video are not independent.

The interval is the percentile interval of Efron, over draws of whole videos with replacement.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from eval.metrics.scores import OVERALL, Metric, ScoreArrays

Interval = tuple[float, float]
NUM_DRAWS = 2000
_QUANTILES = (0.025, 0.975)
_CHUNK = 100  # draws at once; a chunk of 8,000 samples has 6 MB
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Figures of some samples of a benchmark.

    Attributes:
        subset: A `dataset`, or OVERALL.
        num_samples: Number of samples.
        num_scored: Number of samples that the figures are computed from.
        figures: The original's figures by name, the headline first.
        intervals: Their 95% intervals; nan for fewer than two videos.
        strict_figures: The figures where unreadable, failed and missing samples are wrong.
    """

    subset: str
    num_samples: int
    num_scored: int
    figures: Mapping[str, float]
    intervals: Mapping[str, Interval]
    strict_figures: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Figures of a second run minus those of a first, over the samples that both have scored.

    Attributes:
        num_shared: Number of these samples.
        figures: Differences by name.
        intervals: Their 95% intervals, from the same draws of videos in both runs.
    """

    num_shared: int
    figures: Mapping[str, float]
    intervals: Mapping[str, Interval]


def estimate(metric: Metric, values: ScoreArrays, strict: ScoreArrays) -> list[Estimate]:
    """Returns the estimates of each subset, in order, and then of all samples.

    Args:
        values: The original's values of the samples.
        strict: The strict values of the same samples.
    """
    subsets = np.array(values.subsets)
    groups = {subset: np.flatnonzero(subsets == subset) for subset in sorted(set(values.subsets))}
    groups = {**(groups if len(groups) > 1 else {}), OVERALL: np.arange(len(subsets))}
    return [
        _estimate_group(metric, name, select_samples(values, i), select_samples(strict, i))
        for name, i in groups.items()
    ]


def _estimate_group(metric: Metric, subset: str, values: ScoreArrays, strict: ScoreArrays) -> Estimate:
    return Estimate(
        subset=subset,
        num_samples=len(values.keys),
        num_scored=int(_has_values(values).sum()),
        figures=point_figures(metric, values),
        intervals=intervals_of(draw_figures(metric, values), values),
        strict_figures=point_figures(metric, strict),
    )


def compare(metric: Metric, first: ScoreArrays, second: ScoreArrays) -> Difference:
    """Compares two runs of a benchmark over the samples that both have scored."""
    first, second = shared_samples(first, second)
    differences = _subtract(draw_figures(metric, second), draw_figures(metric, first))
    return Difference(
        num_shared=len(first.keys),
        figures=_subtract(point_figures(metric, second), point_figures(metric, first)),
        intervals=intervals_of(differences, first),
    )


def shared_samples(first: ScoreArrays, second: ScoreArrays) -> tuple[ScoreArrays, ScoreArrays]:
    """Returns the samples with values in both runs, in the order of the first, with the subsets and videos of it."""
    positions = {key: i for i, key in enumerate(second.keys)}
    has_values = _has_values(first), _has_values(second)
    pairs = [(i, positions[key]) for i, key in enumerate(first.keys) if key in positions]
    pairs = np.array([(i, j) for i, j in pairs if has_values[0][i] and has_values[1][j]], dtype=int).reshape(-1, 2)
    first, second = select_samples(first, pairs[:, 0]), select_samples(second, pairs[:, 1])
    return first, dataclasses.replace(second, subsets=first.subsets, videos=first.videos)


def select_samples(arrays: ScoreArrays, index: np.ndarray) -> ScoreArrays:
    """Returns the samples at positions `index`."""
    return dataclasses.replace(
        arrays,
        keys=[arrays.keys[i] for i in index],
        subsets=[arrays.subsets[i] for i in index],
        videos=[arrays.videos[i] for i in index],
        values={name: values[index] for name, values in arrays.values.items()},
    )


def point_figures(metric: Metric, arrays: ScoreArrays) -> dict[str, float]:
    """Returns the figures with every sample once."""
    figures = metric.figures(arrays, np.ones((1, len(arrays.keys))))
    return {name: float(values[0]) for name, values in figures.items()}


def draw_figures(metric: Metric, arrays: ScoreArrays) -> dict[str, np.ndarray]:
    """Returns the figures (NUM_DRAWS,) of random draws of videos with replacement; the seed is fixed."""
    chunks = [metric.figures(arrays, weights) for weights in _draw_weights(arrays.videos)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def intervals_of(figures: Mapping[str, np.ndarray], arrays: ScoreArrays) -> dict[str, Interval]:
    """Returns 95% intervals of drawn figures. A draw without a figure is left out."""
    if len(set(arrays.videos)) < 2:  # each draw would be the same
        return {name: (np.nan, np.nan) for name in figures}
    return {name: _interval(values[~np.isnan(values)]) for name, values in figures.items()}


def _interval(values: np.ndarray) -> Interval:
    if not values.size:
        return np.nan, np.nan
    low, high = np.quantile(values, _QUANTILES)
    return float(low), float(high)


def _draw_weights(videos: Sequence[str]) -> Iterator[np.ndarray]:
    """Yields weights (_CHUNK, N): how often the video of each sample is drawn."""
    names, clusters = np.unique(np.array(videos, dtype=str), return_inverse=True)
    generator = np.random.default_rng(_SEED)
    for _ in range(0, NUM_DRAWS, _CHUNK):
        draws = generator.integers(len(names), size=(_CHUNK, len(names))) if len(names) else np.empty((_CHUNK, 0), int)
        flat = draws + np.arange(_CHUNK)[:, None] * len(names)  # one range of numbers per draw
        counts = np.bincount(flat.ravel(), minlength=_CHUNK * len(names)).reshape(_CHUNK, len(names))
        yield counts[:, clusters].astype(np.float64)


def _has_values(arrays: ScoreArrays) -> np.ndarray:
    return np.any([~np.isnan(values) for values in arrays.values.values()] or [[False] * len(arrays.keys)], axis=0)


def _subtract(second: Mapping, first: Mapping) -> dict:
    return {name: second[name] - first[name] for name in first}
