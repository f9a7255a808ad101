"""Records of a workdir: the facts that must not change, and every start."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from tarsier_jax.errors import InputError
from tarsier_jax.versions import versions
from train.config import TrainConfig, default_config, read_config
from train.record import check_run_metadata, flatten, record_start

FACTS = {"program": "sft", "data.global_batch_size": 4, "optimizer.freeze": (), "text": {"num_layers": 2}}


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """A workdir of a run with a checkpoint."""
    check_run_metadata(tmp_path, FACTS)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    return tmp_path


def test_a_run_of_the_same_facts_continues(started: Path) -> None:
    before = (started / "run.json").read_text()
    check_run_metadata(started, FACTS)
    assert (started / "run.json").read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.global_batch_size": 8}, "data.global_batch_size was 4 and is now 8"),
        ({"optimizer.freeze": ("vision/.*",)}, r"optimizer.freeze was \[\] and is now \['vision/\.\*'\]"),
        ({"program": "dpo"}, "program was 'sft' and is now 'dpo'"),
        ({"text": {"num_layers": 4}}, "text was {'num_layers': 2} and is now {'num_layers': 4}"),
    ],
)
def test_a_run_of_other_facts_is_refused(started: Path, change: dict[str, Any], message: str) -> None:
    before = (started / "run.json").read_text()
    with pytest.raises(InputError, match=rf"belongs to another run: {message}. Choose another --workdir, or use the"):
        check_run_metadata(started, {**FACTS, **change})
    assert (started / "run.json").read_text() == before


def test_without_a_checkpoint_everything_may_change(tmp_path: Path) -> None:
    check_run_metadata(tmp_path, FACTS)
    check_run_metadata(tmp_path, {**FACTS, "data.global_batch_size": 8})
    assert json.loads((tmp_path / "run.json").read_text())["data.global_batch_size"] == 8


def test_facts_that_an_earlier_version_did_not_write(started: Path) -> None:
    (started / "run.json").write_text(json.dumps({"program": "sft", "rows": 4, "workers": 2, "freeze": []}))
    with pytest.raises(InputError, match=r"data\.global_batch_size was 4 and is now 8"):
        check_run_metadata(started, {**FACTS, "data.global_batch_size": 8})
    check_run_metadata(started, FACTS)  # the towers are not compared
    assert json.loads((started / "run.json").read_text()) == json.loads(json.dumps(FACTS))


@pytest.mark.parametrize("content", ["", "{", "[]", "7"])
def test_a_file_that_is_no_json(started: Path, content: str) -> None:
    (started / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run.json is not a JSON object.*another --workdir"):
        check_run_metadata(started, FACTS)


def test_former_names_are_read(tmp_path: Path) -> None:
    """A workdir of an earlier version resumes, and its settings are compared under their new names."""
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "run.json").write_text(json.dumps({"data.rows": 4, "data.tokens": 320, "optimizer.muon": []}))
    facts = {"data.global_batch_size": 4, "data.seq_len": 320, "optimizer.muon_params": ()}
    check_run_metadata(tmp_path, facts)
    assert json.loads((tmp_path / "run.json").read_text()) == json.loads(json.dumps(facts))
    with pytest.raises(InputError, match=r"data\.seq_len was 320 and is now 448"):
        check_run_metadata(tmp_path, {**facts, "data.seq_len": 448})
    record_start(tmp_path, {"keep": 2, "data": {"workers": 3}})
    changes = record_start(tmp_path, {"max_to_keep": 2, "data": {"num_workers": 2}})
    assert changes == ["data.num_workers was 3 and is now 2"]


def test_every_start_is_recorded(tmp_path: Path) -> None:
    config = default_config()
    config.num_train_steps, config.optimizer.warmup_steps, config.optimizer.freeze = 40, 2, ("vision/.*",)
    assert record_start(tmp_path, config.to_dict()) == []
    (start,) = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    config.update(start["config"])
    assert read_config(config).optimizer.freeze == ("vision/.*",) and read_config(config).num_train_steps == 40
    assert start["command"] == sys.argv and start["processes"] == 1 and start["versions"] == versions()
    assert start["versions"]["jax"] == jax.__version__ and start["versions"]["python"].startswith("3.")
    assert start["devices"].endswith(jax.devices()[0].device_kind)


def test_changes_are_named(tmp_path: Path) -> None:
    config = flatten(default_config().to_dict())
    record_start(tmp_path, config)
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"config": {"optim')  # cut short
    changes = record_start(tmp_path, {**config, "optimizer.peak_lr": 1e-6, "data.num_workers": 8})
    assert changes == ["data.num_workers was 4 and is now 8", "optimizer.peak_lr was 2e-05 and is now 1e-06"]
    assert record_start(tmp_path, {**config, "optimizer.peak_lr": 1e-6, "data.num_workers": 8}) == []
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 4


def test_flat_names() -> None:
    flat = flatten(default_config().to_dict())
    assert (
        flat["num_train_steps"] == TrainConfig().num_train_steps
        and flat["data.global_batch_size"] == TrainConfig().data.global_batch_size
    )
