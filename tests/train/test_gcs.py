"""Runs in gs:// workdirs, on a server on this machine. `tests.train.gcs_runs` has complete runs that are killed."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tarsier_jax
from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.mirror import last_upload, mirrored
from tarsier_jax.weights import resolve
from tests.gcs import gcs_server
from tests.train.programs import weights
from tests.train.test_checkpoints import a_state, assert_restored, shapes
from tests.train.test_loop import debug_config
from tests.train.test_processes import both
from tests.train.texts import next_number, open_numbers
from train.best import BestCheckpoint, read_best
from train.checkpoints import Checkpoints, DataProgress, load_parameters
from train.debug_data import write_debug_data
from train.export import main, parse
from train.loop import _Loop
from train.model_export import export_trained
from train.run import open_run
from train.sft import sft_objective
from train.state import TrainState, init_state
from train.workdir import RunStore, open_workdir, saved_steps

URL = "gs://bucket/run"


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with gcs_server() as store:
        yield store


@pytest.fixture
def store(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server's file system without a run; the cache of this process is that of one of several machines."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if server.exists(URL):
        server.rm(URL, recursive=True)
    return server


def test_checkpoints(store: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, rows = Checkpoints(URL, keep=2), open_numbers()
    for step in (3, 6, 9):
        assert [next_number(rows) for _ in range(3)][-1] == step - 1
        checkpoints.save(step, a_state(step), rows, DataProgress(samples=step))
        if step == 3:
            checkpoints.keep_best(BestCheckpoint(3, "eval_loss", 1.0))
    checkpoints.wait()
    checkpoints.close()
    assert saved_steps(URL) == [3, 6, 9] and read_best(URL) == BestCheckpoint(3, "eval_loss", 1.0)
    store.rm(f"{URL}/checkpoints/9/commit_success.txt")  # as after a run that is killed while it saves
    assert saved_steps(URL) == [3, 6]
    frozen = load_parameters(URL, 6, "float32")["vision/norm/weight"]
    np.testing.assert_array_equal(frozen, a_state(6).frozen["vision/norm/weight"])
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"6 cannot be read \(.*start again"):
        patch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.restore", unauthorized)
        assert_restored(URL, 6)
    sizes = {name: info["size"] for name, info in store.find(f"{URL}/checkpoints/6/state", detail=True).items()}
    content = bytearray(store.cat_file(values := max(sizes, key=lambda name: sizes[name])))
    content[len(content) // 2] ^= 0x01
    store.pipe_file(values, bytes(content))
    assert_restored(URL, 3)
    assert f"{URL}/checkpoints/6 is damaged" in capsys.readouterr().out
    names = {name.partition("/checkpoints/")[2].split("/")[0] for name in store.find(f"{URL}/checkpoints")}
    assert names == {"3", "6.damaged"}  # 9 was removed


def unauthorized(*_: Any, **__: Any) -> None:
    from gcsfs.retry import HttpError

    raise HttpError({"code": 401, "message": "Invalid credentials"})


@pytest.mark.slow
def test_one_process_resumes_two_that_are_killed(store: Any, tmp_path: Path) -> None:
    """Both are killed while they save step 9. The machine that resumes has an empty cache."""
    assert [status for status, _ in both("killed_in_gs", tmp_path)] == [-signal.SIGKILL] * 2
    with open_workdir(URL) as (directory, run_store):
        assert run_store is not None and run_store.url == URL
        checkpoints, rows = Checkpoints(URL, keep=2), open_numbers(1, 2)
        state, progress = checkpoints.restore(shapes(TrainState(jnp.int32(0), {"w": jnp.zeros((2, 8))}, {}, ())), rows)
        checkpoints.close()
        step = progress.samples
        assert step in (6, 9) and [int(state.step), next_number(rows)] == [step, 2 * step + 1]
        np.testing.assert_array_equal(state.params["w"], np.full((2, 8), step))
        assert [line["line"] for line in lines_in(directory / "bad_samples_0.jsonl")] == [3, 6, 9]
    with last_upload(f"{URL}/process_1", "bad_samples_1.jsonl") as directory:  # process 0 does not remove its parts
        assert [line["line"] for line in lines_in(directory / "bad_samples_1.jsonl")] == [3, 6, 9]


def lines_in(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_exports(store: Any, tmp_path: Path) -> None:
    url = "gs://bucket/exported"
    with open_workdir(url) as (directory, run_store):
        config = write_debug_data(debug_config(), directory)
        run = open_run(config, directory, sft_objective(config), run_store)
        checkpoints, state = Checkpoints(run.root, keep=1), init_state(run.spec, run.model_directory)
        checkpoints.save(1, state, open_numbers(), DataProgress())
        for _ in range(2):  # the second one replaces the first
            assert str(export_trained(run, state)) == f"{url}/model"
        checkpoints.close()
        assert not (directory / "model").exists() and not (directory / "checkpoints").exists()
    assert main(parse([url])) == 0
    for name in ("model", "model-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(resolve(f"{url}/{name}"))
    ours = weights(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "model-1"), ours)
    model, _ = tarsier_jax.load(f"{url}/model", dtype="float32")
    np.testing.assert_array_equal(model.decoder.embed.weight[...], ours["decoder.embed.weight"])
    with pytest.raises(CheckpointError, match=f"{url}/model-1 exists already"):
        main(parse([url]))
    with pytest.raises(InputError, match=r"gs://bucket/none lacks runs\.jsonl"):
        main(parse(["gs://bucket/none"]))


def test_logs_are_uploaded_before_a_checkpoint() -> None:
    """Another machine that resumes from the checkpoint needs the logs up to it."""
    calls: list[str] = []
    store = RunStore(URL, lambda: calls.append("upload"))
    checkpoints = SimpleNamespace(save=lambda *_: calls.append("save"))
    loop: Any = SimpleNamespace(
        run=SimpleNamespace(store=store), checkpoints=checkpoints, step=1, state=None, rows=None
    )
    loop._check_pending = loop._progress = lambda: None
    _Loop._save(loop)
    assert calls == ["upload", "save"]


def test_a_workdir_of_an_earlier_version(store: Any) -> None:
    with mirrored(URL) as directory:
        (directory / "checkpoints" / "3").mkdir(parents=True)
        (directory / "checkpoints" / "3" / "state").write_text("three")
    with pytest.raises(InputError, match=rf"{URL} was written by an earlier version.*copy them"), open_workdir(URL):
        pass
    assert store.cat_file(f"{URL}/checkpoints/3/state") == b"three"
