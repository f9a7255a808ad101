"""The best checkpoint of a run, by a metric of its evaluations: WORKDIR/best.json, also in a gs:// workdir."""

import dataclasses
import json
import math
import os
from pathlib import Path

from etils import epath

from tarsier_jax.errors import CheckpointError
from tarsier_jax.files import atomic_write, is_remote


@dataclasses.dataclass(frozen=True)
class BestCheckpoint:
    """A checkpoint and the metric by which it is the best.

    Attributes:
        step: Step of the checkpoint.
        metric: Name of the metric.
        value: Its value.
    """

    step: int
    metric: str
    value: float

    def is_better_than(self, other: "BestCheckpoint | None") -> bool:
        """Compares the values: lower is better for a metric whose name ends with "loss", higher for others.

        A value that is not finite is never better, and one of another metric is always worse.
        """
        if not math.isfinite(self.value):
            return False
        if other is None or other.metric != self.metric:
            return True
        return self.value < other.value if self.metric.endswith("loss") else self.value > other.value


def read_best(root: str | os.PathLike[str]) -> BestCheckpoint | None:
    """Returns the record of a local or gs:// workdir; None if there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = epath.Path(root) / "best.json"
    if not file.exists():
        return None
    try:
        return BestCheckpoint(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise CheckpointError(
            f"{file} is not a record of the best checkpoint. Remove it: the next evaluation starts a new one."
        ) from None


def write_best(root: str | os.PathLike[str], best: BestCheckpoint) -> None:
    file, text = epath.Path(root) / "best.json", json.dumps(dataclasses.asdict(best))
    if is_remote(file):
        file.write_text(text)  # an object appears when it is complete
        return
    with atomic_write(Path(file)) as partial:
        partial.write_text(text, encoding="utf-8")
