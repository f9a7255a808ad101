"""Metrics reach every writer, and no writer stops a run."""

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tarsier_jax.errors import InputError
from tarsier_jax.files import warn
from train import metric_writer
from train.config import TrainConfig
from train.metric_writer import BackgroundWriter, Log
from train.writers import check_services, run_id

PICTURE = Image.new("RGB", (40, 30), "red")


def run_until(log: Log, step: int) -> None:
    log.scalars(step, {"loss": step / 10})
    log.text(step, "caption_0", f"A circle at step {step}.")
    log.image(step, "caption_0_frames", PICTURE)
    log.close()


def test_tensorboard_reads_the_files(tmp_path: Path) -> None:
    """Without the entries after the step from which the run resumes."""
    log = Log(tmp_path, 0)
    log.scalars(10, {"loss": 0.5, "lr": 0.1})
    log.scalars(20, {"loss": 9.0})
    log.close()
    run_until(Log(tmp_path, 10), 15)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 0.5), (15, 1.5)]
    (picture,), (text,) = events.Images("caption_0_frames"), events.Tensors("caption_0")
    assert (picture.step, picture.width, picture.height) == (15, 40, 30)
    assert text.tensor_proto.string_val[0] == b"A circle at step 15."


class Broken:
    """A writer that fails at odd steps, and blocks at step 100 until the event is set."""

    def __init__(self) -> None:
        self.steps, self.released = list[int](), threading.Event()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step == 100:
            self.released.wait(60)
        if step % 2:
            raise ConnectionError(f"no route at step {step}")
        self.steps.append(step)

    def text(self, step: int, name: str, text: str) -> None: ...

    def image(self, step: int, name: str, image: Image.Image) -> None: ...

    def close(self) -> None:
        raise RuntimeError("closed twice")


def test_a_writer_that_fails_is_warned_about_once(recwarn: pytest.WarningsRecorder) -> None:
    warn.cache_clear()
    broken = Broken()
    writer = BackgroundWriter("Broken", lambda: broken)
    for step in range(6):
        writer.submit("scalars", step, {"loss": 1.0})
    writer.close()
    assert broken.steps == [0, 2, 4]
    (message,) = [str(w.message) for w in recwarn if "Broken" in str(w.message)]
    assert (
        message == "Broken failed (ConnectionError: no route at step 1): metrics are missing in it. The run continues."
    )


def test_a_writer_that_cannot_start_loses_only_its_own_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def refuse(workdir: Path, config: Mapping[str, Any]) -> Any:
        raise ConnectionError("no network")

    warn.cache_clear()
    monkeypatch.setitem(metric_writer.SERVICES, "wandb", refuse)  # pyright: ignore[reportArgumentType]
    run_until(Log(tmp_path, 0, ("wandb",)), 5)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 5, "loss": 0.5}
    assert any("wandb failed (ConnectionError: no network)" in str(w.message) for w in recwarn)


def test_a_writer_that_hangs_delays_nothing(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    warn.cache_clear()
    monkeypatch.setattr(metric_writer, "_CAPACITY", 2)
    monkeypatch.setattr(metric_writer, "_PATIENCE", 0.05)
    broken = Broken()
    writer, start = BackgroundWriter("Slow", lambda: broken), time.monotonic()
    for step in range(100, 120, 2):
        writer.submit("scalars", step, {})
    writer.close()
    assert time.monotonic() - start < 5
    messages = " ".join(str(w.message) for w in recwarn)
    assert "Slow is slower than the run" in messages and "Slow did not end within" in messages
    broken.released.set()


def test_a_full_disk_stops_no_run(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    warn.cache_clear()
    log = Log(tmp_path, 0)
    (tmp_path / "metrics.jsonl").mkdir()  # as a file that cannot be written
    log.scalars(1, {"loss": 1.0})
    log.close()
    assert any("metrics.jsonl cannot be written" in str(w.message) for w in recwarn)


def test_services_are_checked_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"writers is \('wandbx',\), but must be a tuple of wandb, mlflow, trackio"):
        TrainConfig(writers=("wandbx",))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"config.writers trackio needs trackio: pip install -e '\.\[trackio\]'"):
        check_services(("trackio",))


def test_the_id_of_a_run_is_created_once(tmp_path: Path) -> None:
    assert run_id(tmp_path, "wandb", lambda: "a1") == run_id(tmp_path, "wandb", lambda: "b2") == "a1"


def test_mlflow_continues_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for start, step in ((0, 3), (2, 4)):
        run_until(Log(tmp_path, start, ("mlflow",), {"seed": 7, "optimizer.peak_lr": 1e-3}), step)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("tarsier_jax").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params == {"seed": "7", "optimizer.peak_lr": "0.001"}
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(3, 0.3), (4, 0.4)]
    pictures = client.download_artifacts(run.info.run_id, "caption_0_frames")
    assert np.asarray(Image.open(Path(pictures) / "step_4.png")).shape == (30, 40, 3)


def test_wandb_continues_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for start, step in ((0, 3), (2, 4)):
        run_until(Log(tmp_path, start, ("wandb",), {"seed": 7}), step)
    number = (tmp_path / "wandb_run_id.txt").read_text()
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{number}/run-{number}.wandb"))) == 2
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/caption_0_frames_*.png"))) == 2


def test_trackio_continues_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

    for start, step in ((0, 3), (2, 4)):
        run_until(Log(tmp_path, start, ("trackio",), {"seed": 7}), step)
    name = (tmp_path / "trackio_run_id.txt").read_text()
    rows = [row for row in SQLiteStorage.get_logs("tarsier_jax", name) if "loss" in row]
    assert [(row["step"], row["loss"]) for row in rows] == [(3, 0.3), (4, 0.4)]
