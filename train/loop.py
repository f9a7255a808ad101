"""The training loop of SFT and DPO: data, steps, reports, evaluation, checkpoints, and a clean end."""

import dataclasses
import os
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from infer.contact_sheet import contact_sheet
from tarsier_jax.errors import InputError, TarsierError
from tarsier_jax.mirror import destination
from tarsier_jax.programs import Compilations
from train.best import BestCheckpoint
from train.checkpoints import Checkpoints, DataProgress
from train.config import TrainConfig
from train.data.annotations import mix_files
from train.data.packing import PackedRow, check_share
from train.mesh import global_batch
from train.metric_writer import BadSamples, Log, console_line, duration
from train.model_export import export_trained
from train.optimizer import make_schedule
from train.record import flatten
from train.run import Objective, TrainRun, open_run
from train.state import TrainState, complete_state, init_state, make_train_step
from train.throughput import Meter, Work, work_of
from train.validation import Evaluation
from train.workdir import RunStore
from train.writers import check_services

_TRACED = 3  # steps of a profile
_WARM_UP = 2  # steps that may compile


class NonFiniteLoss(TarsierError):
    """The loss, or the norm of its gradient, is not finite."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """The result of a run.

    Attributes:
        step: Last step.
        loss: Its loss.
        stop_signal: SIGTERM or SIGINT if it ended the run early; 0 for a finished run.
        compilations: Compilations after the first steps; a correct run has none.
        data_wait: Fraction of the time after the first steps in which steps waited for data.
    """

    step: int
    loss: float
    stop_signal: int
    compilations: int
    data_wait: float

    @property
    def exit_status(self) -> int:
        """Exit status of the program: 0, or 128 plus the signal, as in a shell."""
        return 128 + self.stop_signal if self.stop_signal else 0


def train(config: TrainConfig, workdir: Path, objective: Objective, store: RunStore | None = None) -> Summary:
    """Trains from the start, or from the workdir's last checkpoint, to config.num_train_steps.

    Args:
        workdir: Local directory of the run, see `train.workdir.open_workdir`.
        store: The store of a gs:// workdir.

    Raises:
        TarsierError: the configuration, the data or the disk cannot be used.
    """
    if config.best_metric and not _evaluates(config):
        raise InputError(
            f"config.best_metric is {config.best_metric!r}, but the run has no evaluation. Set config.eval_every, and "
            "config.data.eval or config.benchmark.name."
        )
    check_services(config.writers)
    run = open_run(config, workdir, objective, store)
    with jax.set_mesh(run.spec.mesh):
        if run.objective.before:
            run.objective.before(run)
        loop = _Loop(run)
        try:
            return loop.run_to_the_end()
        finally:
            loop.close()


def _evaluates(config: TrainConfig) -> bool:
    return config.eval_every > 0 and bool(config.data.eval or config.benchmark.name)


class _Loop:
    def __init__(self, run: TrainRun):
        self.run, self.config, self.workdir = run, run.config, run.workdir
        self.checkpoints = Checkpoints(run.root, run.config.max_to_keep)
        data = run.config.data
        lines = mix_files(data.train, run.config.seed, repeat=True, shuffle=data.shuffle)
        self.rows = run.rows(lines, data.global_batch_size, run.config.grad_accum_steps)
        self.evaluation, self.benchmark = Evaluation(run), None
        self.evaluates = _evaluates(run.config)
        if self.evaluates and run.config.benchmark.name:
            from train.benchmark import BenchmarkEvaluation  # imports `eval`, which no other run needs

            self.benchmark = BenchmarkEvaluation(run)
        self.train_step = make_train_step(run.spec, run.objective.loss)
        self.schedule = make_schedule(run.config.optimizer, run.config.num_train_steps)
        self.state, self.before = self._start()
        self.first = self.step = int(self.state.step)
        self.log = Log(run.workdir, self.first, run.config.writers, flatten(dataclasses.asdict(run.config)))
        self.bad_samples = BadSamples(run.workdir)
        vision_trained = any(path.startswith("vision/blocks/") for path in run.spec.shapes.params)
        lora = run.config.lora.rank > 0
        self.meter, self.whole = (Meter(run.spec.config, vision_trained, lora) for _ in range(2))
        self.counts = DataProgress()  # of this process, since the start
        self.pending: tuple[int, dict[str, jax.Array], list[PackedRow]] | None = None
        self.recent: list[dict[str, float]] = []
        self.loss = float("nan")
        self.compilations, self.late_compilations = Compilations(), 0

    def _start(self) -> tuple[TrainState, DataProgress]:
        if self.checkpoints.latest() is None:
            return init_state(self.run.spec, self.run.model_directory, self.config.seed), DataProgress()
        state, progress = self.checkpoints.restore(self.run.spec.shapes, self.rows)
        return complete_state(self.run.spec, state, self.run.model_directory), progress

    def run_to_the_end(self) -> Summary:
        self._log_start()
        steps, stop = self.config.num_train_steps, Terminator(self.checkpoints)
        with stop, self.compilations:
            while self.step < steps and not stop.requested(self.step):
                self._advance()
                self._trace()
                self._report_if_due()
                if self._due(self.config.save_every) or self._last:
                    self._save()  # before the evaluation, in case the held-out samples cannot be used
                self._evaluate_if_due()
            self._check_pending()
            if self.step > self.first:
                self._save()
            self.checkpoints.wait()
        return self._finish(stop_signal=stop.signal if self.step < steps else 0)

    def _advance(self) -> None:
        """Starts one step. The device computes it while the host checks the previous one and fetches the next rows."""
        start, compiled = time.perf_counter(), self.compilations.count
        rows = next(self.rows)
        waited = time.perf_counter() - start
        with jax.profiler.StepTraceAnnotation("train", step_num=self.step):
            batch = global_batch(rows, self.config.grad_accum_steps, self.run.spec.mesh)
            self.state, metrics = self.train_step(self.state, batch)
        self._check_pending()
        if self.step >= self.first + _WARM_UP:
            self.late_compilations += self.compilations.count - compiled
        self.step += 1
        self.pending = (self.step, metrics, rows)
        work = sum((work_of(row.batch) for row in rows), Work())
        self.meter.add(work, waited)
        if self.step == self.first + _WARM_UP:
            self.whole.reset()
        self.whole.add(work, waited)
        self._count(rows, work)

    def _count(self, rows: list[PackedRow], work: Work) -> None:
        bad = [sample for row in rows for sample in row.bad]
        self.counts += DataProgress(
            samples=work.samples,
            tokens=work.tokens,
            num_truncated=sum(row.num_truncated for row in rows),
            num_bad=len(bad),
            num_drawn=sum(row.num_drawn for row in rows),
        )
        if bad:
            self.bad_samples.write(bad)
            check_share(self.counts.num_bad, self.counts.num_drawn, self.config.data.max_bad_fraction, bad[-1])

    def _check_pending(self) -> None:
        """Waits for the last step and fetches its metrics."""
        if self.pending is None:
            return
        (step, metrics, rows), self.pending = self.pending, None
        values = {name: float(value) for name, value in metrics.items()}
        if not np.isfinite([values["loss"], values["grad_norm"]]).all():
            raise self._non_finite(step, values, rows)
        self.loss = values["loss"]
        self.recent.append(values)

    def _non_finite(self, step: int, values: dict[str, float], rows: list[PackedRow]) -> NonFiniteLoss:
        file = self.workdir / f"non_finite_step_{step}_process_{jax.process_index()}.npz"
        _write_rows(file, rows)
        last = self.checkpoints.latest()
        origin = "the beginning (nothing is saved yet)" if last is None else f"the last checkpoint (step {last})"
        return NonFiniteLoss(
            f"At step {step} the loss is {values['loss']} and the norm of its gradient {values['grad_norm']}. The rows "
            f"are in {file}. To continue from {origin}, lower optimizer.peak_lr and start again."
        )

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    @property
    def _last(self) -> bool:
        return self.step == self.config.num_train_steps

    def _report_if_due(self) -> None:
        if self._due(self.config.log_every) or self._last:
            self._check_pending()
            values = {name: float(np.mean([v[name] for v in self.recent])) for name in self.recent[0]}
            values |= {"lr": float(np.asarray(self.schedule(self.step - 1))), **self.meter.rates()}
            self.recent.clear()
            self.meter.reset()
            self.log.scalars(self.step, values)
            self.log.line(console_line(self.step, self.config.num_train_steps, values))

    def _evaluate_if_due(self) -> None:
        if not self.evaluates or not (self._due(self.config.eval_every) or self._last):
            return
        self._check_pending()
        values = self.evaluation.losses(self.state) if self.config.data.eval else {}
        values |= self.benchmark.scores(self.state) if self.benchmark else {}
        self.log.scalars(self.step, values)
        self.log.line(f"step {self.step}  " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))
        self._keep_if_best(values)
        if self.config.data.eval:
            self._log_captions()
        self.meter.reset()

    def _log_captions(self) -> None:
        for i, caption in enumerate(self.evaluation.captions(self.state)):
            self.log.text(self.step, f"caption_{i}", caption.text)
            if caption.frames:
                self.log.image(self.step, f"caption_{i}_frames", contact_sheet(caption.frames, caption.text))
            self.log.line(f"  {caption.name}: {caption.text}")

    def _keep_if_best(self, values: Mapping[str, float]) -> None:
        metric = self.config.best_metric
        if not metric:
            return
        if metric not in values:
            self._save()
            raise InputError(f"config.best_metric is {metric!r}, but an evaluation has {', '.join(values)}.")
        best = BestCheckpoint(self.step, metric, values[metric])
        if best.is_better_than(self.checkpoints.best):
            self._save()
            self.checkpoints.keep_best(best)

    def _trace(self) -> None:
        at = self.config.profile_step
        if at and self.step in (at, at + _TRACED):
            self._check_pending()  # a trace contains whole steps
            if self.step == at:
                jax.profiler.start_trace(str(self.workdir))
            else:
                jax.profiler.stop_trace()

    def _save(self) -> None:
        self._check_pending()  # raises before a state that is not finite is saved
        if self.run.store:
            self.run.store.upload()  # another machine that resumes from this checkpoint finds the logs up to it
        self.checkpoints.save(self.step, self.state, self.rows, self._progress())

    def _progress(self) -> DataProgress:
        """Sums the counts of all processes and of earlier starts."""
        counts = np.array(dataclasses.astuple(self.counts))
        if jax.process_count() > 1:
            counts = multihost_utils.process_allgather(counts).sum(axis=0)
        return self.before + DataProgress(*(int(count) for count in counts))

    def _log_start(self) -> None:
        run, mesh = self.run, self.run.spec.mesh
        trained = sum(int(np.prod(x.shape)) for x in run.spec.shapes.params.values())
        frozen = sum(int(np.prod(x.shape)) for x in run.spec.shapes.frozen.values())
        axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        device, data = mesh.devices.flat[0], self.config.data
        self.log.line(
            f"{run.objective.name} of {run.model_directory}: {trained:,} parameters trained, {frozen:,} frozen, "
            f"{run.spec.config.dtype}\n{mesh.size} x {device.device_kind} ({axes}), "
            f"{data.global_batch_size} rows of {data.seq_len} tokens per step, {self.config.num_train_steps} steps"
            + (f", resumed from step {self.first}" if self.first else "")
        )
        for change in run.changes if self.first else ():
            self.log.line(f"config.{change}")

    def _finish(self, stop_signal: int) -> Summary:
        progress, rates, best = self._progress(), self.whole.rates(), self.checkpoints.best
        exported = "" if stop_signal else destination(export_trained(self.run, self.state))
        loss = f"loss {self.loss:.4f}" if self.step > self.first else "no step remained"
        self.log.line(
            f"{'stopped at' if stop_signal else 'finished'} step {self.step}: {loss}, "
            f"{progress.samples:,} samples and {progress.tokens:,} tokens trained on, "
            f"{progress.num_truncated} truncated, {progress.num_bad} bad"
            + (f" (see {destination(self.bad_samples.file)})" if progress.num_bad else "")
            + f"\n{duration(rates['seconds_per_step'] * (self.step - self.first))} in all, "
            f"{rates['tokens_per_s']:,.0f} tokens/s, data wait {rates['data_wait']:.1%}, padding "
            f"{rates['padding']:.1%}, {self.late_compilations} compilations after step {self.first + _WARM_UP}\n"
            + (f"best: {best.metric} {best.value:.4f} at step {best.step}\n" if best else "")
            + ("the same command resumes from here" if stop_signal else f"the trained model is {exported}")
        )
        return Summary(self.step, self.loss, stop_signal, self.late_compilations, rates["data_wait"])

    def close(self) -> None:
        """Waits for a save in progress, and ends the threads that pack rows."""
        self.checkpoints.close()
        self.rows.close()
        self.log.close()


def _write_rows(file: Path, rows: list[PackedRow]) -> None:
    """Writes a .npz file array by array: the float32 patches of all rows would fill the memory."""
    with zipfile.ZipFile(file, "w") as archive:
        for i, row in enumerate(rows):
            for name, x in {**vars(row.batch), **row.extra}.items():
                with archive.open(f"{name}_{i}.npy", "w", force_zip64=True) as out:
                    np.lib.format.write_array(out, x.astype(np.float32) if name == "patches" else x)


class Terminator:
    """Handles SIGTERM and Ctrl-C: the run finishes and saves the current step. A second Ctrl-C exits at once.

    Attributes:
        signal: The first signal; 0 before.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints, self.signal = checkpoints, 0

    def requested(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self.signal != 0
        # Signals reach several processes at different times, so they agree on a step.
        stop = self._checkpoints.reached_preemption(step)
        if stop and not self.signal:
            self.signal = signal.SIGTERM
        return stop

    def __enter__(self) -> None:
        # With several processes, jax.distributed handles SIGTERM, and they agree on a step.
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,)
        self._former = {number: signal.signal(number, lambda *_: None) for number in numbers}
        # Python calls handlers only between bytecodes of the main thread, so not during compilation. A thread reads the
        # signals from a pipe without delay.
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer)
        self._listener = threading.Thread(target=self._listen, args=(reader,))
        self._listener.start()

    def _listen(self, reader: int) -> None:
        with os.fdopen(reader, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] == signal.SIGINT == self.signal:
                    os._exit(128 + signal.SIGINT)
                elif number[0] == signal.SIGINT:
                    self._interrupt()
                elif number[0] == signal.SIGTERM and not self.signal:
                    self.signal = signal.SIGTERM

    def _interrupt(self) -> None:
        self.signal = signal.SIGINT
        message = "interrupted: the step is finished and saved. Press Ctrl-C again to end at once."
        print(f"\n{message}", file=sys.stderr, flush=True)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # all processes then stop at the same step

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._writer)
        self._listener.join()
        for number, handler in self._former.items():
            signal.signal(number, handler)
