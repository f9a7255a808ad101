"""Writers of metrics, texts and images: TensorBoard, and the services W&B, MLflow and Trackio.

Each service reads its own environment variables, such as WANDB_MODE, MLFLOW_TRACKING_URI and TRACKIO_SPACE_ID. The id
of the run is stored in the workdir, so a resumed run continues the run of the service.
"""

import io
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from tarsier_jax.files import atomic_write
from tarsier_jax.programs import check_packages

_PROJECT = "tarsier_jax"
_MAX_PARAMETER = 500  # characters that MLflow accepts


class MetricWriter(Protocol):
    """Writes the entries of a run. Any method may raise any exception; `train.metric_writer.BackgroundWriter` warns."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def image(self, step: int, name: str, image: Image.Image) -> None: ...

    def close(self) -> None: ...


class TensorBoardWriter:
    """Writes event files. TensorBoard ignores earlier entries after `step`, from which the run resumes."""

    def __init__(self, workdir: Path, step: int):
        # Neither TensorFlow nor PyTorch is imported by these modules, which PyTorch's own writer uses as well.
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        self._tensors: Any = tensor_pb2
        self._file = EventFileWriter(str(workdir))
        self._add(step + 1, session_log=self._events.SessionLog(status=self._events.SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._add_value(step, tag=name, simple_value=value)

    def text(self, step: int, name: str, text: str) -> None:
        plugin = self._summaries.SummaryMetadata.PluginData(plugin_name="text")
        metadata = self._summaries.SummaryMetadata(plugin_data=plugin)
        tensor = self._tensors.TensorProto(dtype="DT_STRING", string_val=[text.encode()])
        self._add_value(step, tag=name, metadata=metadata, tensor=tensor)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        png = io.BytesIO()
        image.save(png, format="PNG")
        size = {"height": image.height, "width": image.width, "colorspace": 3}
        content = self._summaries.Summary.Image(**size, encoded_image_string=png.getvalue())
        self._add_value(step, tag=name, image=content)

    def close(self) -> None:
        self._file.close()

    def _add_value(self, step: int, **fields: Any) -> None:
        value = self._summaries.Summary.Value(**fields)
        self._add(step, summary=self._summaries.Summary(value=[value]))

    def _add(self, step: int, **fields: Any) -> None:
        self._file.add_event(self._events.Event(wall_time=time.time(), step=step, **fields))
        self._file.flush()


class WandbWriter:
    """Writes to Weights & Biases."""

    def __init__(self, workdir: Path, config: Mapping[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run_id(workdir, "wandb", _new_id),
            resume="allow",
            name=workdir.name,
            dir=str(workdir),
            config=dict(config),
            settings=wandb.Settings(console="off"),
        )
        # With its own axis: W&B drops values whose step is below its last one, such as those of a resumed run.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text, "step": step})

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._run.log({name: self._image(image), "step": step})

    def close(self) -> None:
        self._run.finish()


class MlflowWriter:
    """Writes to an MLflow server, or to the files of MLFLOW_TRACKING_URI."""

    def __init__(self, workdir: Path, config: Mapping[str, Any]):
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

        self._client, self._metric = MlflowClient(), Metric
        parameters = [Param(name, str(value)[:_MAX_PARAMETER]) for name, value in config.items()]
        self._id = run_id(workdir, "mlflow", lambda: self._create(workdir.name, parameters))
        self._client.update_run(self._id, status="RUNNING")

    def _create(self, name: str, parameters: list[Any]) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        known = self._client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else self._client.create_experiment(experiment)
        new_run = self._client.create_run(number, run_name=name).info.run_id
        self._client.log_batch(new_run, params=parameters)
        return new_run

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        milliseconds = int(1000 * time.time())
        metrics = [self._metric(name, value, milliseconds, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._id, text, f"{name}/step_{step}.txt")

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._client.log_image(self._id, image, f"{name}/step_{step}.png")

    def close(self) -> None:
        self._client.set_terminated(self._id)


class TrackioWriter:
    """Writes to Trackio."""

    def __init__(self, workdir: Path, config: Mapping[str, Any]):
        import trackio  # pyright: ignore[reportMissingImports]

        self._image = trackio.Image
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=run_id(workdir, "trackio", lambda: f"{workdir.name}-{_new_id()}"),
            resume="allow",
            config=dict(config),
            embed=False,
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text}, step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._run.log({name: self._image(image)}, step)

    def close(self) -> None:
        self._run.finish()


# Names in config.writers; each is also the name of its package and of its extra in setup.py.
SERVICES: Mapping[str, Callable[[Path, Mapping[str, Any]], MetricWriter]] = {
    "wandb": WandbWriter,
    "mlflow": MlflowWriter,
    "trackio": TrackioWriter,
}


def check_services(names: tuple[str, ...]) -> None:
    """Raises InputError if the package of a service is not installed."""
    for name in names:
        check_packages(f"config.writers {name}", name, name)


def run_id(workdir: Path, service: str, create: Callable[[], str]) -> str:
    """Returns the id of the service's run, stored in WORKDIR/SERVICE_run_id.txt. The first start creates it."""
    file = workdir / f"{service}_run_id.txt"
    if not file.exists():
        content = create()
        with atomic_write(file) as partial:
            partial.write_text(content, encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def _new_id() -> str:
    return uuid.uuid4().hex[:8]
