"""Held-out annotations that cannot be used."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tarsier_jax.errors import InputError
from train.config import TrainConfig
from train.data.packing import DataConfig
from train.sft import sft_objective
from train.validation import Evaluation


def make_evaluation(held_out: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    monkeypatch.setattr("train.validation.make_eval_step", lambda *_: None)
    monkeypatch.setattr("train.validation.build_model", lambda *_: None)
    config = TrainConfig(data=DataConfig(eval=str(held_out)))
    spec: Any = SimpleNamespace(graph=None, config=SimpleNamespace(dtype="float32"))
    run: Any = SimpleNamespace(config=config, spec=spec, objective=sft_objective(config))
    return Evaluation(run)


def test_a_missing_file_is_found_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl cannot be read \(No such file"):
        make_evaluation(tmp_path / "none.jsonl", monkeypatch)


def test_bad_lines_have_no_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.jsonl").write_text("3\n{\n")
    state: Any = SimpleNamespace(params={}, frozen={})
    assert make_evaluation(tmp_path / "bad.jsonl", monkeypatch).captions(state) == []
