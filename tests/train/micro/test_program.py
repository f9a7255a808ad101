"""`python -m train.micro`: the files that it writes, and a run from random weights to scores."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.micro import get_config
from eval.answers import Engines
from eval.shapes.clips import HELD_OUT
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.processor import Processor
from tests.eval.oracle import OracleEngines, reference_of
from train.config import read_config
from train.micro import __main__ as program
from train.micro.curriculum import STAGES


def test_it_writes_the_checkpoint_and_the_seeds(tmp_path: Path) -> None:
    config = program.write_inputs(read_config(get_config()), tmp_path)
    assert config.model == str(tmp_path / "untrained_model") and (tmp_path / "untrained_model" / "config.json").exists()
    seeds = [json.loads(line)["seed"] for line in Path(config.data.train).read_text().splitlines()]
    assert seeds == list(range(sum(count for count, _ in STAGES)))
    assert min(json.loads(line)["seed"] for line in Path(config.data.eval).read_text().splitlines()) == HELD_OUT
    weights = tmp_path / "untrained_model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert program.write_inputs(read_config(get_config()), tmp_path) == config
    assert weights.stat().st_mtime_ns == written  # a run that resumes writes nothing again


def test_a_model_and_data_of_the_configuration_stay(tmp_path: Path) -> None:
    config = read_config(get_config())
    config = dataclasses.replace(config, model="m", data=dataclasses.replace(config.data, train="a.jsonl"))
    assert program.write_inputs(config, tmp_path) == config and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_trains_and_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Path(program.__file__).parents[2] / "configs" / "micro.py"
    flags = ("--config.num_train_steps=2", "--config.optimizer.warmup_steps=1", "--config.eval_every=0")
    monkeypatch.setattr("sys.argv", ["micro", f"--config={recipe}", f"--workdir={tmp_path}", "--score_clips=3", *flags])
    monkeypatch.setattr(program, "keep_freed_memory", lambda: None)  # it lasts for the process
    loads: list[Callable[[], tuple[Tarsier, Processor]]] = []

    def engines(load: Callable[[], tuple[Tarsier, Processor]]) -> Engines:  # tests/eval runs the real ones
        loads.append(load)
        return OracleEngines(reference_of)

    monkeypatch.setattr(program, "Engines", engines)
    assert program.main() == 0
    (load,) = loads
    assert isinstance(load()[0], Tarsier)
    tables = capsys.readouterr().out
    assert re.search(r"OVERALL +\|  +1\.0 .*\| +18 ", tables)  # three clips in six variants
    assert re.search(r"OVERALL +\| +100\.0 +\| +3 ", tables)
    assert (tmp_path / "model").is_dir() and not list(tmp_path.glob("bad_samples*"))
