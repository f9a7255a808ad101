"""Annotations of texts without media, which cost nothing to load."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from tarsier_jax.errors import InputError
from tarsier_jax.processing.batch import Example
from train.data.annotations import mix_files
from train.data.packing import PackingConfig, PackUnit, make_rows

ROWS = 4  # of a step


def load(sample: Mapping[str, Any], rng: np.random.Generator) -> PackUnit:
    """A text of `tokens` tokens, the last of them drawn; without any, the sample is bad."""
    n = sample["tokens"]
    if not n:
        raise InputError(f"Sample {sample['id']} is empty.")
    ids = np.array([*[7] * (n - 1), rng.integers(8, 200)], np.int32)
    positions = np.tile(np.arange(n, dtype=np.int32), (3, 1))
    no_visuals = np.zeros((0, 1176), np.float32), np.zeros((0, 3), np.int32)
    text = Example(ids, ids, *no_visuals, positions, num_truncated=sample.get("cut", 0))
    return PackUnit([text], {"weight": np.array([n], np.float32)}, key=sample["id"])


def write_lines(path: Path, lines: Sequence[Any]) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def write_texts(path: Path, tokens: Sequence[int]) -> str:
    """Annotations for `load`: texts of so many tokens, named "0", "1", ..."""
    return write_lines(path, [{"id": str(i), "tokens": n} for i, n in enumerate(tokens)])


def open_rows(files: str, packer: PackingConfig, repeat: bool = True, **options: Any) -> grain.DatasetIterator:
    options = {"rows": ROWS, "seed": 0, "media_root": "", "load": load, **options}
    return iter(make_rows(mix_files(files, options["seed"], repeat), packer=packer, **options))
