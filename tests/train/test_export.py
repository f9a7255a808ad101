"""A checkpoint of a run becomes a model."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.weights.orbax import is_converted
from tests.train.programs import weights
from tests.train.test_checkpoints import flip_all
from tests.train.test_loop import debug_config
from tests.train.texts import open_numbers
from train.best import BestCheckpoint
from train.checkpoints import Checkpoints, DataProgress, load_parameters
from train.debug_data import write_debug_data
from train.export import main, parse
from train.model_export import export_checkpoint, export_trained
from train.run import open_run
from train.sft import sft_objective
from train.state import init_state
from train.workdir import saved_steps

STEP, BEST = 3, 1


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with a model and checkpoints of the steps 1, the best, and 3, whose state the model has."""
    workdir = tmp_path_factory.mktemp("run")
    config = write_debug_data(debug_config(**{"optimizer.freeze": ("vision/.*",)}), workdir)
    run = open_run(config, workdir, sft_objective(config))
    checkpoints, state = Checkpoints(workdir, keep=1), init_state(run.spec, run.model_directory)
    for step in (BEST, STEP):
        params = {path: jnp.asarray(np.asarray(x) + np.float32(0.01 * step)) for path, x in state.params.items()}
        state = dataclasses.replace(state, step=jnp.int32(step), params=params)
        checkpoints.save(step, state, open_numbers(), DataProgress())
        if step == BEST:
            checkpoints.keep_best(BestCheckpoint(BEST, "eval_loss", 2.0))
    checkpoints.wait()
    checkpoints.close()
    export_trained(run, state)
    return workdir


@pytest.fixture
def workdir(tmp_path: Path, stopped_run: Path) -> Path:
    return Path(shutil.copytree(stopped_run, tmp_path / "run"))


@pytest.mark.slow
def test_the_export_is_the_model_that_the_run_wrote(workdir: Path) -> None:
    before = weights(workdir)
    shutil.rmtree(workdir / "random_clips")
    out = export_checkpoint(workdir)
    assert out == workdir / f"model-{STEP}"
    shutil.rmtree(workdir / "model")
    shutil.copytree(out, workdir / "model")
    after = weights(workdir)
    assert before.keys() == after.keys()
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert is_converted(Path(out))


@pytest.mark.slow
def test_the_best_is_exported(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "best" / "model"
    out.parent.mkdir()
    assert main(parse([str(workdir), "--step", "best", "--output", str(out)])) == 0
    assert capsys.readouterr().out.strip() == str(out)
    saved = load_parameters(workdir, BEST, "float32")
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
    flip_all(workdir / "checkpoints" / str(STEP) / "state")
    with pytest.raises(CheckpointError, match=rf"checkpoints/{STEP} is damaged \(.*Choose another step"):
        export_checkpoint(workdir)
    assert not (workdir / f"model-{STEP}").exists()
