"""Annotations of texts without media, which cost nothing to load."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grain
import numpy as np

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import InputError
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.packing import RowShape
from train.data.annotations import AnnotationLine, mix_files
from train.data.loading import RowLoader
from train.data.packing import PackingConfig, PackUnit

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


def open_rows(files: str, packer: PackingConfig, repeat: bool = True, **options: Any) -> RowLoader:
    options = {"num_rows": ROWS, "seed": 0, "media_root": "", "load": load, **options}
    return RowLoader(mix_files(files, options["seed"], repeat), config=packer, **options)


def former_state(rows: Sequence[Mapping[str, Any]], workers: int = 0) -> dict[str, Any]:
    """The state of a process in earlier versions: grain's iterator of its rows, or of threads of several rows each."""

    def index(number: int) -> dict[str, int]:
        return {"next_index": number}

    states: list[Any] = [
        {
            "samples": index(row["num_drawn"]),
            "waiting": [index(number) for number in row["waiting"]],
            "seen": row["num_drawn"],
            "bad": row["num_bad"],
        }
        for row in rows
    ]
    if workers:
        states = [{"turn": 0, "streams": states[worker::workers]} for worker in range(workers)]
    return {
        "next_index_in_cycle": 0,
        "next_index_in_datasets": len(states),
        "iterators_in_use_indices": list(range(len(states))),
        "iterators_in_use_states": states,
        "exhausted": [0] * len(states),
        "future_states": {},
    }


def open_numbers(row: int = 0, num_rows: int = 1) -> RowLoader:
    """A loader of one row, which packs one text per step: "r", "r + n", ... in row r of n."""
    processor: Any = SimpleNamespace(config=ModelConfig(), pad_token_id=0)
    config = PackingConfig(processor, RowShape(8, 0, 4, 1, 1), 1, 0.0, "float32")
    texts: Any = [AnnotationLine("a.jsonl", i, json.dumps({"id": str(i), "tokens": 8})) for i in range(100)]
    lines = grain.MapDataset.source(texts)
    return RowLoader(lines, load, config, seed=0, media_root="", num_rows=num_rows, local_rows=[row])


def next_number(rows: RowLoader) -> int:
    (row,) = next(rows)
    return int(row.keys[0])
