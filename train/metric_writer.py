"""The logs of a run: TensorBoard files, metrics.jsonl, the console, and the bad samples."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

from tarsier_jax.files import atomic_write
from train.data.packing import BadSample


class Log:
    """Logs scalars, texts and lines in process 0. Entries after `step`, from which the run resumes, are dropped."""

    def __init__(self, workdir: Path, step: int):
        self._writer = None
        if jax.process_index() == 0:
            self._writer = SummaryWriter(str(workdir), purge_step=step + 1)
            self._file = workdir / "metrics.jsonl"
            self._keep_until(step)

    def _keep_until(self, step: int) -> None:
        if not self._file.exists():
            return
        lines = [line for line in self._file.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        with atomic_write(self._file) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def text(self, step: int, name: str, text: str) -> None:
        if self._writer:
            self._writer.add_text(name, text, step)

    def line(self, text: str) -> None:
        if self._writer:
            print(text, flush=True)

    def close(self) -> None:
        if self._writer:
            self._writer.close()


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
