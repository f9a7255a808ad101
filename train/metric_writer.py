"""The logs of a run: metrics.jsonl, TensorBoard files and services, the console, and the bad samples."""

import contextlib
import dataclasses
import functools
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from tarsier_jax.files import atomic_write, warn
from train.data.packing import BadSample
from train.writers import SERVICES, MetricWriter, TensorBoardWriter

_CAPACITY = 1000  # entries that wait for a writer
_PATIENCE = 30.0  # seconds that the end of a run waits for a writer


class Log:
    """Logs scalars, texts, images and lines in process 0.

    metrics.jsonl is written at once; other writers have a thread each. A writer that fails is warned about, and the run
    continues. Scalars after `step`, from which the run resumes, are dropped.

    Args:
        workdir: Directory of the run.
        step: Step from which the run resumes.
        services: Names in `train.writers.SERVICES`.
        config: Settings of the run by their flat names, for the services.
    """

    def __init__(self, workdir: Path, step: int, services: Sequence[str] = (), config: Mapping[str, Any] | None = None):
        self._prints = jax.process_index() == 0
        self._file = workdir / "metrics.jsonl"
        self._writers: list[BackgroundWriter] = []
        if self._prints:
            self._keep_until(step)
            self._writers = [BackgroundWriter("TensorBoard", functools.partial(TensorBoardWriter, workdir, step))]
            for name in services:
                self._writers.append(BackgroundWriter(name, functools.partial(SERVICES[name], workdir, config or {})))

    def _keep_until(self, step: int) -> None:
        if not self._file.exists():
            return
        lines = [line for line in self._file.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        with atomic_write(self._file) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._prints:
            self._append({"step": step, **values})
        for writer in self._writers:
            writer.submit("scalars", step, values)

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as e:
            warn(f"{self._file} cannot be written ({e.strerror}): metrics are missing in it.")

    def text(self, step: int, name: str, text: str) -> None:
        for writer in self._writers:
            writer.submit("text", step, name, text)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        for writer in self._writers:
            writer.submit("image", step, name, image)

    def line(self, text: str) -> None:
        if self._prints:
            print(text, flush=True)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


class BackgroundWriter:
    """Writes in a thread of its own: a writer that is slow or fails neither delays nor stops the run.

    The first failure is warned about, and every failing entry is dropped. If the writer cannot be made, all are.

    Args:
        name: Name of the writer in warnings.
        make: Returns the writer. It is called in the thread.
    """

    def __init__(self, name: str, make: Callable[[], MetricWriter]):
        self._name, self._make, self._has_failed = name, make, False
        self._calls: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(_CAPACITY)
        self._thread = threading.Thread(target=self._write_all, name=f"{name} writer", daemon=True)
        self._thread.start()

    def submit(self, method: str, *arguments: Any) -> None:
        """Calls a method of the writer later. Drops the call while too many wait."""
        try:
            self._calls.put_nowait((method, arguments))
        except queue.Full:
            warn(f"{self._name} is slower than the run: a part of the metrics is missing in it.")

    def close(self) -> None:
        """Waits until everything is written, but not longer than half a minute."""
        deadline = time.monotonic() + _PATIENCE
        with contextlib.suppress(queue.Full):
            self._calls.put(None, timeout=_PATIENCE)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            warn(f"{self._name} did not end within {_PATIENCE:.0f} s: the last metrics may be missing in it.")

    def _write_all(self) -> None:
        writer = self._try(self._make)
        while call := self._calls.get():
            if writer is not None:
                method, arguments = call
                self._try(getattr(writer, method), *arguments)
        if writer is not None:
            self._try(writer.close)

    def _try(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as e:  # a service raises any type
            self._warn_once(e)
            return None

    def _warn_once(self, error: Exception) -> None:
        if not self._has_failed:
            self._has_failed = True
            reason = (str(error).strip() or "no message").splitlines()[0]
            warn(
                f"{self._name} failed ({type(error).__name__}: {reason}): metrics are missing in it. The run continues."
            )


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short


class BadSamples:
    """WORKDIR/bad_samples_PROCESS.jsonl: file, line and reason of every bad sample, without repetitions."""

    def __init__(self, workdir: Path):
        self.file = workdir / f"bad_samples_{jax.process_index()}.jsonl"
        self._lines = set(self.file.read_text(encoding="utf-8").splitlines()) if self.file.exists() else set()

    def write(self, samples: Sequence[BadSample]) -> None:
        lines = dict.fromkeys(json.dumps(dataclasses.asdict(sample)) for sample in samples)
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines if line not in self._lines)
        self._lines.update(lines)


def console_line(step: int, steps: int, values: Mapping[str, float]) -> str:
    """Returns one line: the loss, its other metrics, the rates and the remaining time."""
    texts = {"loss": f"{values['loss']:.4f}", "lr": f"{values['lr']:.2e}", "grad": f"{values['grad_norm']:.2f}"}
    texts |= {name: f"{values[name]:.3f}" for name in ("accuracy", "margin") if name in values}
    texts |= {"tokens/s": f"{values['tokens_per_s']:,.0f}", "samples/s": f"{values['samples_per_s']:.2f}"}
    texts |= {"mfu": f"{values['mfu']:.1%}"} if "mfu" in values else {}
    texts |= {"data wait": f"{values['data_wait']:.1%}", "padding": f"{values['padding']:.1%}"}
    remaining = (steps - step) * values["seconds_per_step"]
    return f"step {step}/{steps}  " + "  ".join(f"{k} {v}" for k, v in texts.items()) + f"  left {duration(remaining)}"


def duration(seconds: float) -> str:
    """Formats seconds: 3725 -> "1:02:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
