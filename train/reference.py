"""DPO's reference log-probabilities on disk: computed once, read by the data pipeline."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tarsier_jax.errors import InputError


def sample_key(sample: Mapping[str, Any]) -> str:
    """What a sample is found by: a hash of what it says."""
    return hashlib.sha256(json.dumps(sample, sort_keys=True).encode()).hexdigest()[:24]


class ReferenceFile:
    """JSON lines {"key", "chosen", "rejected"}, one file a process: FILE.0, FILE.1, ..."""

    def __init__(self, path: str):
        self.path = Path(path)
        self._known: dict[str, tuple[float, float]] | None = None

    def known(self) -> dict[str, tuple[float, float]]:
        """Log-probabilities of the chosen and the rejected answer, by key; a line cut short is left out."""
        found = {}
        for file in sorted(self.path.parent.glob(f"{self.path.name}.*")):
            for line in file.read_text().splitlines():
                try:
                    record = json.loads(line)
                    found[record["key"]] = (record["chosen"], record["rejected"])
                except (ValueError, KeyError, TypeError):
                    continue
        return found

    def of(self, sample: Mapping[str, Any]) -> np.ndarray:
        """float32 (2,). Raises InputError for a sample that the file does not hold."""
        if self._known is None:
            self._known = self.known()
        values = self._known.get(sample_key(sample))
        if values is None:
            raise InputError(f"{self.path} holds no reference log-probabilities of the sample. Compute them again.")
        return np.array(values, np.float32)
