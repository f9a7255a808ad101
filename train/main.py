"""Helpers of the training programs: flags and processes."""

import jax
from absl import flags

from tarsier_jax.errors import InputError
from tarsier_jax.files import check_source, is_remote
from tarsier_jax.programs import prepare_process
from train.config import TrainConfig, define_flags, read_flags
from train.workdir import is_direct


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
    if is_remote(workdir) and not is_direct(workdir) and jax.process_count() > 1:
        raise InputError(
            f"--workdir {workdir} is in an object store that a run of several processes cannot write. Choose a gs:// "
            "URL, or a directory on a file system that all hosts share, such as a mounted store."
        )
    return config, workdir


def _join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as e:
        raise InputError(
            f"The processes did not find each other ({str(e).splitlines()[0]}). --distributed works on TPU pods, under "
            "Slurm and under MPI; elsewhere give each process --coordinator=HOST:PORT, --num_processes=N and its own "
            "--process_id."
        ) from None
