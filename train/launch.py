"""What happens between the command line and the loop."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from infer.runtime import prepare_process
from tarsier_jax.errors import InputError
from tarsier_jax.processing.processor import Processor
from train.config import CommandLine, TrainConfig, parse_command_line
from train.loop import train
from train.setup import Job

TERMINATED = 143  # the exit status of a process that SIGTERM ended


def launch(argv: Sequence[str], make_job: Callable[[TrainConfig, Processor], Job]) -> int:
    """Runs what the flags ask for; gives the exit status. Raises TarsierError."""
    flags = parse_command_line(argv)
    prepare_process()
    if flags.distributed:
        _join(flags)
    summary = train(flags.config, Path(flags.workdir).absolute(), make_job)
    return TERMINATED if summary.stopped else 0


def _join(flags: CommandLine) -> None:
    """Finds the other processes."""
    try:
        jax.distributed.initialize(flags.coordinator, flags.num_processes, flags.process_id)
    except (ValueError, RuntimeError) as e:
        raise InputError(
            f"The processes did not find each other ({str(e).splitlines()[0]}). --distributed works on TPU pods, under "
            "Slurm and under MPI; elsewhere give each process --coordinator=HOST:PORT, --num_processes=N and its own "
            "--process_id."
        ) from None
    if jax.process_index() > 0:
        sys.stdout.flush()
