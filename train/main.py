"""Helpers of the training programs: flags, processes, and the lock of the workdir."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags

from tarsier_jax.errors import InputError
from tarsier_jax.files import check_source, is_remote, locked
from tarsier_jax.mirror import output_directory
from tarsier_jax.programs import prepare_process
from train.config import TrainConfig, define_flags, read_flags
from train.processes import shared_failure


def define_run_flags() -> flags.FlagValues:
    """Returns the flags of a training run, to which a program adds its own."""
    values = define_flags()
    flags.DEFINE_string("workdir", None, "Directory of checkpoints and logs.", flag_values=values)
    flags.DEFINE_bool("distributed", False, "Find the other processes (TPU pod, Slurm, MPI).", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, elsewhere.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "With --coordinator.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "With --coordinator.", flag_values=values)
    return values


def read_run(values: flags.FlagValues) -> tuple[TrainConfig, str]:
    """Parses the command line, joins the other processes, and returns the configuration and the workdir.

    Raises:
        InputError: a flag or key is wrong, or the processes do not find each other.
    """
    config = read_flags(values)
    if not values.workdir:
        raise InputError("Give --workdir DIR, the directory of checkpoints and logs.")
    prepare_process()
    if values.distributed or values.coordinator:
        _join(values.coordinator, values.num_processes, values.process_id)
    workdir = check_source("--workdir", values.workdir)
    if is_remote(workdir) and jax.process_count() > 1:
        raise InputError(
            f"--workdir {workdir} is in an object store, which a run of several processes cannot write. Choose a "
            "directory on a file system that all hosts share, such as a mounted store."
        )
    return config, workdir


@contextlib.contextmanager
def open_workdir(workdir: str) -> Iterator[Path]:
    """Yields the directory of the run. Refuses a second run in it, and ends all processes when any fails.

    Raises:
        InputError: another run writes the workdir, or it is in an object store that cannot be used.
    """
    with shared_failure(), output_directory(workdir) as directory:
        directory = directory.resolve()
        # Process 0 has the lock for all, since all processes of a run write the workdir.
        with locked(directory, inside=True) if jax.process_index() == 0 else contextlib.nullcontext():
            yield directory


def _join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as e:
        raise InputError(
            f"The processes did not find each other ({str(e).splitlines()[0]}). --distributed works on TPU pods, under "
            "Slurm and under MPI; elsewhere give each process --coordinator=HOST:PORT, --num_processes=N and its own "
            "--process_id."
        ) from None
