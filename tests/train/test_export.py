"""A checkpoint of a run becomes a model, and the best one by the held-out loss stays."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import tarsier_jax
from tarsier_jax.errors import CheckpointError, InputError
from tests.train.programs import weights
from tests.train.test_checkpoints import flip_all
from tests.train.test_loop import debug_config, train_sft
from train.best import BestCheckpoint, read_best
from train.checkpoints import load_parameters, saved_steps
from train.export import main, parse
from train.model_export import export_checkpoint

STEPS = 3


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose learning rate rises from 0 to a value that destroys the model."""
    workdir = tmp_path_factory.mktemp("run")
    over = {"best_metric": "eval_loss", "eval_every": 1, "eval_captions": 0, "save_every": 2, "max_to_keep": 1}
    over |= {"optimizer.peak_lr": 3.0, "optimizer.warmup_steps": STEPS, "num_train_steps": STEPS}
    train_sft(debug_config(**over), workdir)
    return workdir


@pytest.fixture
def workdir(tmp_path: Path, finished_run: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.mark.slow
def test_the_best_checkpoint_stays(finished_run: Path) -> None:
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    lowest = min(losses, key=losses.__getitem__)
    assert lowest < STEPS and saved_steps(finished_run) == [lowest, STEPS]
    assert read_best(finished_run) == BestCheckpoint(lowest, "eval_loss", losses[lowest])


@pytest.mark.slow
def test_the_export_is_the_model_that_the_run_wrote(workdir: Path) -> None:
    before = weights(workdir)
    shutil.rmtree(workdir / "random_clips")
    out = export_checkpoint(workdir)
    assert out == workdir / f"model-{STEPS}"
    shutil.rmtree(workdir / "model")
    shutil.copytree(out, workdir / "model")
    after = weights(workdir)
    assert before.keys() == after.keys()
    jax.tree.map(np.testing.assert_array_equal, before, after)
    tarsier_jax.load(out)


@pytest.mark.slow
def test_the_best_is_exported(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "best" / "model"
    out.parent.mkdir()
    assert main(parse([str(workdir), "--step", "best", "--output", str(out)])) == 0
    assert capsys.readouterr().out.strip() == str(out)
    best = read_best(workdir)
    assert best is not None and best.step < STEPS
    saved = load_parameters(workdir, best.step, "float32")
    exported = weights(out.parent)
    assert exported.keys() == {path.replace("/", ".") for path in saved}
    for path, values in saved.items():
        np.testing.assert_array_equal(exported[path.replace("/", ".")], values)


@pytest.mark.slow
def test_steps_that_cannot_be_exported(workdir: Path) -> None:
    steps = ", ".join(map(str, saved_steps(workdir)))
    with pytest.raises(InputError, match=f"no checkpoint of step 2. It has the steps {steps}"):
        export_checkpoint(workdir, "2")
    (workdir / "best.json").unlink()
    with pytest.raises(InputError, match=r"no best checkpoint: the run has no --config\.best_metric"):
        export_checkpoint(workdir, "best")
    flip_all(workdir / "checkpoints" / str(STEPS) / "state")
    with pytest.raises(CheckpointError, match=rf"checkpoints/{STEPS} is damaged \(.*Choose another step"):
        export_checkpoint(workdir)
    assert not (workdir / f"model-{STEPS}").exists()
