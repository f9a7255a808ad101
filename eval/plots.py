"""Plots of the figures of a run, and of several runs side by side, as PNG files."""

import io
import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.bootstrap import Estimate, Interval
from eval.metrics.scores import OVERALL
from eval.texts import NO_VALUE, digits_of, subset_names, with_interval

# Paul Tol's bright colours, which readers with colour blindness can tell apart.
_COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#AA3377", "#66CCEE", "#777777")
_MARKERS = "osD^vPX"
_BAR, _OVERALL_BAR, _INK, _MUTED = "#A9C2DA", "#5F8FBF", "#222222", "#777777"
_WIDTH, _ROW_HEIGHT, _FRAME_HEIGHT = 9.0, 0.34, 1.5  # inches
_MAX_NAME = 44  # characters
# Units of figures and the ends of their axes.
_UNITS = {"Accuracy": "%", "Overall": "%", "Average Score": "0 to 5", "CIDEr": "0 to 1000"}
_MAXIMA = {"%": 100.0, "0 to 5": 5.0, "0 to 1": 1.0}


def plot_scores(title: str, estimates: Sequence[Estimate]) -> bytes:
    """Plots the headline figure of each subset and overall: bars with 95% intervals, and strict figures as diamonds."""
    name = next(iter(estimates[-1].figures))
    values = [each.figures[name] for each in estimates]
    strict = [each.strict_figures[name] for each in estimates]
    intervals = [each.intervals[name] for each in estimates]
    figure, axes = _new_figure(title, name, estimates, 1)
    rows = _row_positions([each.subset for each in estimates])
    colours = [_OVERALL_BAR if each.subset == OVERALL else _BAR for each in estimates]
    axes.barh(rows, [0.0 if math.isnan(value) else value for value in values], height=0.62, color=colours)
    _draw_intervals(axes, rows, values, intervals, _INK)
    diamond = {"color": "white", "markeredgecolor": _INK, "markersize": 5.5, "zorder": 4, "clip_on": False}
    axes.plot(strict, rows, "D", label="strict figure", **diamond)
    axes.plot([], [], "-", color=_INK, linewidth=1.4, label="95% interval over videos")
    texts = [with_interval(*each, digits_of(name)) for each in zip(values, intervals, strict=True)]
    texts = [NO_VALUE if math.isnan(value) else text for value, text in zip(values, texts, strict=True)]
    _finish(axes, name, rows, texts, _largest([*values, *strict], intervals))
    return _png(figure)


def plot_runs(title: str, figure_name: str, runs: Mapping[str, Sequence[Estimate]]) -> bytes:
    """Plots a figure of several runs side by side, as points with 95% intervals.

    Args:
        runs: Estimates by name of the run. Subsets are shown in the order in which they first occur, OVERALL last.
    """
    labels = {each.subset: each for run in reversed([*runs.values()]) for each in run}
    subsets = sorted(labels, key=lambda subset: (subset == OVERALL, subset))
    figure, axes = _new_figure(title, figure_name, [labels[subset] for subset in subsets], len(runs))
    rows = _row_positions(subsets)
    largest = 0.0
    for k, (name, estimates) in enumerate(runs.items()):
        by_subset = {each.subset: each for each in estimates}
        offset = (k - (len(runs) - 1) / 2) * 0.8 / len(runs)
        present = [i for i, subset in enumerate(subsets) if subset in by_subset]
        values = [by_subset[subsets[i]].figures.get(figure_name, math.nan) for i in present]
        intervals = [by_subset[subsets[i]].intervals.get(figure_name, (math.nan, math.nan)) for i in present]
        places = [rows[i] + offset for i in present]
        colour, marker = _COLOURS[k % len(_COLOURS)], _MARKERS[k % len(_MARKERS)]
        _draw_intervals(axes, places, values, intervals, colour)
        axes.plot(values, places, marker, color=colour, markersize=5.5, label=_shorten(name), clip_on=False)
        for value, place in zip(values, places, strict=True):
            if math.isnan(value):
                axes.annotate(f" {NO_VALUE}", (0, place), va="center", fontsize=8, color=colour)
        largest = max(largest, _largest(values, intervals))
    for row in rows[1:]:
        axes.axhline(row - 0.5, color="#EEEEEE", linewidth=0.8, zorder=0)
    _finish(axes, figure_name, rows, ["" for _ in rows], largest)
    return _png(figure)


def _new_figure(title: str, name: str, estimates: Sequence[Estimate], lines: int) -> tuple[Figure, Axes]:
    """Returns a figure with one labelled row per estimate, each of up to `lines` points."""
    height = _FRAME_HEIGHT + _ROW_HEIGHT * len(estimates) * max(1.0, 0.5 * lines) + 0.06 * lines
    figure = Figure(figsize=(_WIDTH, height), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontweight="bold", fontsize=12, pad=10, parse_math=False)
    axes.set_xlabel(f"{name} ({_unit(name)})", fontsize=10, parse_math=False)
    subsets = [each.subset for each in estimates]
    labels = [_label(each, subset) for each, subset in zip(estimates, subset_names(subsets), strict=True)]
    axes.set_yticks(_row_positions(subsets), labels, fontsize=9.5, parse_math=False)
    return figure, axes


def _label(estimate: Estimate, subset: str) -> str:
    is_whole = estimate.num_scored == estimate.num_samples
    samples = f"{estimate.num_scored:,}" + ("" if is_whole else f" of {estimate.num_samples:,}")
    return f"{_shorten(subset)}  (n = {samples})"


def _row_positions(subsets: Sequence[str]) -> list[float]:
    """Returns the position of each row; OVERALL is a little apart."""
    return [i + 0.3 * (subset == OVERALL and i > 0) for i, subset in enumerate(subsets)]


def _draw_intervals(
    axes: Axes, rows: Sequence[float], values: Sequence[float], intervals: Sequence[Interval], colour: str
) -> None:
    for row, value, (low, high) in zip(rows, values, intervals, strict=True):
        if not math.isnan(value) and not math.isnan(low):
            axes.plot([low, high], [row, row], color=colour, linewidth=1.4, solid_capstyle="butt", zorder=3)


def _largest(values: Sequence[float], intervals: Sequence[Interval]) -> float:
    ends = [high for _, high in intervals]
    return max((value for value in [*values, *ends] if math.isfinite(value)), default=0.0)


def _unit(name: str) -> str:
    return _UNITS.get(name, "0 to 1")


def _finish(axes: Axes, name: str, rows: Sequence[float], texts: Sequence[str], largest: float) -> None:
    """Sets the limits and the style, and writes a text at the right of each row."""
    axes.set_xlim(0, _MAXIMA.get(_unit(name), max(1.1 * largest, 100.0)))
    axes.set_ylim(rows[-1] + 0.6, -0.6)
    for row, text in zip(rows, texts, strict=True):
        colour = _MUTED if text == NO_VALUE else _INK
        place = {"xy": (1.02, row), "xycoords": axes.get_yaxis_transform(), "annotation_clip": False}
        axes.annotate(text, **place, va="center", fontsize=9.5, color=colour, family="monospace")
    axes.grid(axis="x", color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        legend = axes.figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _shorten(text: str) -> str:
    """Replaces the middle of a long name, since names differ most often at their ends."""
    half = _MAX_NAME // 2
    return text if len(text) <= _MAX_NAME else f"{text[: half - 1]}…{text[-half:]}"


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
