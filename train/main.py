"""What happens between the command line and the loop."""

import contextlib
import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags

import tarsier_jax
from eval.micro import score
from eval.shapes.clips import HELD_OUT
from tarsier_jax.errors import InputError
from tarsier_jax.files import check_local, locked
from tarsier_jax.programs import prepare_process
from train.config import TrainConfig, define_flags, read_flags
from train.loop import train
from train.processes import shared_failure
from train.run import Objective

_SIGNALLED = 128  # the exit status of a process that a signal ended is this and the signal's number


def launch(make_job: Callable[[TrainConfig], Objective]) -> int:
    """Runs what the command line asks for; gives the exit status. Raises TarsierError."""
    values = define_flags()
    flags.DEFINE_string("workdir", None, "Where checkpoints and logs go.", flag_values=values)
    flags.DEFINE_bool("distributed", False, "Find the other processes (TPU pod, Slurm, MPI).", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, elsewhere.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "With --coordinator.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "With --coordinator.", flag_values=values)
    config = read_flags(values)
    if not values.workdir:
        raise InputError("Give --workdir DIR, where checkpoints and logs go.")
    _keep_memory()
    prepare_process()
    if values.distributed or values.coordinator:
        _join(values.coordinator, values.num_processes, values.process_id)
    workdir = Path(check_local("--workdir", values.workdir)).resolve()
    # The lock is process 0's, as all processes of a run write the workdir together.
    lock = locked(workdir, inside=True) if jax.process_index() == 0 else contextlib.nullcontext()
    with shared_failure(), lock:
        summary = train(config, workdir, make_job)
    if config.score_clips and not summary.stopped and jax.process_index() == 0:
        score(*tarsier_jax.load(workdir / "model"), clips=config.score_clips, seed=HELD_OUT)
    return _SIGNALLED + summary.stopped if summary.stopped else 0


# Settings of glibc's mallopt, and a size beyond all arrays.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENAS = -1, -3, -8
_NEVER = 2**30  # bytes


def _keep_memory() -> None:
    """Has the allocator keep what is given back to it, and hand that out again.

    As it comes, glibc maps large arrays anew each time, and the kernel clears their pages: a third of a small model's
    training step on two cores. One arena only, as the others are made of parts too small for such arrays; so this
    comes before there are threads.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if mallopt is not None:
        for setting, value in ((_MMAP_THRESHOLD, _NEVER), (_TRIM_THRESHOLD, _NEVER), (_ARENAS, 1)):
            mallopt(setting, value)


def _join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Finds the other processes."""
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as e:
        raise InputError(
            f"The processes did not find each other ({str(e).splitlines()[0]}). --distributed works on TPU pods, under "
            "Slurm and under MPI; elsewhere give each process --coordinator=HOST:PORT, --num_processes=N and its own "
            "--process_id."
        ) from None
