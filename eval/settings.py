"""The settings of a run: everything that its predictions depend on, stored beside them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.annotations import messages_of
from eval.benchmarks.benchmark import Benchmark
from eval.predictions import AnnotatedSample, Prediction
from eval.texts import flatten_settings
from tarsier_jax.errors import InputError
from tarsier_jax.mirror import destination
from tarsier_jax.processing.jsonl import parse_json
from tarsier_jax.storage import local_source
from tarsier_jax.weights.digest import digest_files

_DIGITS = 16  # of a digest
_BENCHMARKS = "benchmarks"  # key of the settings of single benchmarks


def weights_digest(directory: Path) -> str:
    """Returns a digest of the names and contents of a checkpoint's files, without documents and hidden files."""
    files = [file for file in directory.rglob("*") if file.is_file() and _is_content(file.relative_to(directory))]
    return digest_files(directory, files).hex()[:_DIGITS]


def model_digest(directory: Path, adapter: str | None) -> str:
    """Returns the digests of a checkpoint and of the adapter that is merged into it, as one text."""
    directories = [directory, Path(local_source(adapter))] if adapter else [directory]
    return "+".join(map(weights_digest, directories))


def benchmark_settings(benchmark: Benchmark, rows: Sequence[AnnotatedSample]) -> dict[str, Any]:
    """Returns the settings of a benchmark: frames, tokens, the prompt, and a digest of all its samples, `rows`."""
    prompts, samples = {}, []
    for row in rows:
        messages, prediction = messages_of(benchmark, row), Prediction.of(row)
        text = "".join(item["text"] for message in messages for item in message["content"] if item["type"] == "text")
        prompts[text] = None
        samples.append([prediction.key, messages, prediction.references, prediction.extra_info])
    return {
        "n_frames": benchmark.n_frames,
        "max_new_tokens": benchmark.max_new_tokens,
        "prompt": next(iter(prompts)) if len(prompts) == 1 else f"{len(prompts)} prompts",
        "prefill": benchmark.prefill,
        "annotations": _short_digest(json.dumps(samples)),
    }


def merge_settings(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a run, and of other benchmarks that earlier runs stored in `path`.

    Raises:
        InputError: `path` contains another value of a setting.
    """
    stored = parse_json(path.read_text(encoding="utf-8"), str(path)) if path.exists() else {}
    earlier, current = flatten_settings(stored), flatten_settings(settings)
    differences = [
        f"{name} was {earlier[name]!r:.100} and is {current[name]!r:.100}"
        for name in current
        if earlier.get(name, current[name]) != current[name]
    ]
    if differences:
        raise InputError(
            f"{destination(path.parent)} contains predictions with other settings: {'; '.join(differences)}. Choose "
            "another --output, or remove the directory."
        )
    return {**settings, _BENCHMARKS: {**stored.get(_BENCHMARKS, {}), **settings[_BENCHMARKS]}}


def settings_for(settings: Mapping[str, Any], benchmark: str) -> dict[str, Any]:
    """Returns the settings that the scores of one benchmark depend on."""
    common = {name: value for name, value in settings.items() if name != _BENCHMARKS}
    return {**common, **settings.get(_BENCHMARKS, {}).get(benchmark, {})}


def _is_content(path: Path) -> bool:
    return path.suffix != ".md" and not any(part.startswith(".") for part in path.parts)


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
