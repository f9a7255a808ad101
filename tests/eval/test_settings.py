"""Settings of a run: predictions of different settings are never mixed."""

import dataclasses
import json
from pathlib import Path

import pytest

from eval.benchmarks import select
from eval.settings import benchmark_settings, merge_settings, settings_for, weights_digest
from tarsier_jax.errors import InputError
from tests.eval.benchmarks.rows import caption_row, question_row
from tests.eval.oracle import shapes

(DREAM, TVBENCH) = select(["dream", "tvbench"])


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    """Also if no size differs. Documents and caches do not count."""
    (tmp_path / "model" / "params").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "params" / "0").write_bytes(b"weights")
    first = weights_digest(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("A model.")
    (tmp_path / "model" / ".cache").mkdir()
    (tmp_path / "model" / ".cache" / "a").write_text("")
    (tmp_path / "model").rename(tmp_path / "moved")
    assert weights_digest(tmp_path / "moved") == first
    (tmp_path / "moved" / "params" / "0").write_bytes(b"WEIGHTS")
    assert weights_digest(tmp_path / "moved") != first


def test_settings_of_a_benchmark() -> None:
    rows = [caption_row(1), caption_row(2)]
    settings = benchmark_settings(DREAM, rows)
    assert settings["n_frames"] == 16 and settings["prompt"] == "Describe the video in detail."
    assert benchmark_settings(DREAM, rows) == settings
    rows[1]["messages"][1]["content"][0]["reference"] = "Another reference."
    assert benchmark_settings(DREAM, rows)["annotations"] != settings["annotations"]
    assert benchmark_settings(TVBENCH, [question_row(1)])["prefill"] == " Answer: ("
    generated = shapes(2)
    samples = list(generated.annotations()) if callable(generated.annotations) else []
    assert benchmark_settings(dataclasses.replace(generated, n_frames=4), samples)["n_frames"] == 4


def test_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    settings = {"model": "a", "dtype": "float32", "benchmarks": {"dream": {"n_frames": 16}}}
    assert merge_settings(path, settings) == settings  # the first run
    path.write_text(json.dumps(settings))
    assert merge_settings(path, settings) == settings
    more = {**settings, "benchmarks": {"tvbench": {"n_frames": 8}}}
    merged = merge_settings(path, more)
    assert merged["benchmarks"] == {"dream": {"n_frames": 16}, "tvbench": {"n_frames": 8}}
    assert settings_for(merged, "tvbench") == {"model": "a", "dtype": "float32", "n_frames": 8}
    other = {**settings, "dtype": "bfloat16", "benchmarks": {"dream": {"n_frames": 8}}}
    message = r"dtype was 'float32' and is 'bfloat16'; benchmarks.dream.n_frames was '16' and is '8'.* another --output"
    with pytest.raises(InputError, match=message):
        merge_settings(path, other)
