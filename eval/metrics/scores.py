"""Scores per subset, and their table."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from eval.predictions import Prediction

OVERALL = "OVERALL"


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a benchmark.

    Attributes:
        rows: Per subset, and for `OVERALL` where the metric has one, values by column: shares from 0 to 1, and counts.
    """

    rows: Mapping[str, Mapping[str, float]]

    def table(self, title: str) -> str:
        """Returns one line per row below a heading, with shares to three decimals."""
        columns = list(next(iter(self.rows.values()), {}))
        width = max(map(len, (title, *self.rows)))
        lines = [[title, *columns]]
        lines += [[name, *(_cell(values[column]) for column in columns)] for name, values in self.rows.items()]
        return "\n".join(f"{name:<{width}}" + "".join(f"{cell:>12}" for cell in cells) for name, *cells in lines)


def by_subset(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Groups predictions by subset, in the order in which the subsets first occur."""
    groups: dict[str, list[Prediction]] = collections.defaultdict(list)
    for prediction in predictions:
        groups[prediction.subset].append(prediction)
    return groups


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"
