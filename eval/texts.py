"""Figures, intervals and settings as text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval.bootstrap import Interval

NO_VALUE = "no value"
_PERCENT_LIKE = ("Accuracy", "Overall", "CIDEr")


def digits_of(name: str) -> int:
    """Returns the number of decimal places that the original prints for a figure."""
    return 1 if name in _PERCENT_LIKE else 3


def figure_text(value: float, digits: int, sign: bool = False) -> str:
    """Returns a figure with `digits` decimal places, and with a plus sign if `sign`."""
    return "nan" if math.isnan(value) else f"{value:{'+' if sign else ''}.{digits}f}"


def interval_text(interval: Interval, digits: int, sign: bool = False) -> str:
    """Returns an interval as "[low, high]"; an empty text without one."""
    if math.isnan(interval[0]):
        return ""
    return f"[{figure_text(interval[0], digits, sign)}, {figure_text(interval[1], digits, sign)}]"


def with_interval(value: float, interval: Interval, digits: int, sign: bool = False) -> str:
    """Returns a figure and its interval."""
    return f"{figure_text(value, digits, sign)} {interval_text(interval, digits, sign)}".rstrip()


def subset_names(subsets: Sequence[str]) -> list[str]:
    """Returns the names of subsets without the dataset, if it is the same in all of them."""
    datasets = {subset.split("/", 1)[0] for subset in subsets if "/" in subset}
    return [subset.split("/", 1)[-1] for subset in subsets] if len(datasets) == 1 else list(subsets)


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns nested settings as texts by name, such as "judge.model"."""
    texts = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        texts.update(flatten_settings(value, f"{name}.") if isinstance(value, Mapping) else {name: str(value)})
    return texts
