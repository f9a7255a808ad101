"""The configuration of a run: ml_collections at the command line, frozen dataclasses everywhere else."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from tarsier_jax.errors import InputError
from tarsier_jax.processing.processor import ProcessorOptions
from train.data import DataConfig
from train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 (for one of them) takes what the others leave."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    """beta: of the loss. reference: "weights" keeps the starting model beside the trained one; a file name holds the
    reference's log-probabilities, which are computed before the first step if the file does not hold them all."""

    beta: float = 0.1
    reference: str = "weights"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    model: the checkpoint to start from: a Hugging Face directory, a hub id, a converted directory; "random" makes a
    tiny one in the workdir.  parts: in how many parts the rows of a step are computed, one after the other.
    dtype: of matrix products, "auto" for bfloat16 on accelerators.  attention: "auto" or one of
    `tarsier_jax.models.attention.IMPLEMENTATIONS`.  remat: "none", "dots" or "full".
    log_every, save_every, eval_every: steps; 0 never.  keep: checkpoints.  eval_captions: held-out samples that are
    captioned at each evaluation.  profile_at: the step whose following three are traced; 0 none.
    """

    model: str = ""
    steps: int = 1000
    seed: int = 0
    parts: int = 1
    dtype: str = "auto"
    attention: str = "auto"
    remat: str = "full"
    log_every: int = 10
    save_every: int = 500
    keep: int = 2
    eval_every: int = 500
    eval_captions: int = 2
    profile_at: int = 0
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    dpo: DpoConfig = DpoConfig()
    processor: ProcessorOptions = ProcessorOptions()


def default_config() -> ConfigDict:
    """Every key with its default: what the recipes in configs/ start from."""
    return ConfigDict(dataclasses.asdict(TrainConfig()))


def parse_config(config: ConfigDict) -> TrainConfig:
    """The dataclass of a `ConfigDict`.

    Raises:
        InputError: a key does not exist, or its value has another type; the message names it.
    """
    return _build(TrainConfig, config.to_dict(), "config")


def _build(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    built = {}
    for key, value in values.items():
        if key not in hints:
            close = difflib.get_close_matches(key, hints, 1)
            hint = f"Did you mean {close[0]}?" if close else f"It has {', '.join(hints)}."
            raise InputError(f"{where}.{key} does not exist. {hint}")
        built[key] = _value(hints[key], value, f"{where}.{key}")
    return cls(**built)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if typing.get_origin(hint) is tuple:
        return tuple(tuple(v) if isinstance(v, list | tuple) else v for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and not isinstance(value, hint):
        raise InputError(f"{where} has to be of type {hint.__name__}, but is {value!r}.")
    return value


_NAMES = "--workdir, --distributed, --coordinator, --num_processes, --process_id"


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """What was asked for at the command line."""

    config: TrainConfig
    workdir: str
    distributed: bool
    coordinator: str | None
    num_processes: int | None
    process_id: int | None


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """`--config FILE[:debug] --config.KEY=VALUE --workdir DIR`, and how processes find each other.

    Raises:
        InputError: a flag or key does not exist or has an unfit value.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", help_string="A recipe in configs/.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Where checkpoints and logs go.", flag_values=values)
    flags.DEFINE_bool("distributed", False, "Find the other processes (TPU pod, Slurm, MPI).", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, elsewhere.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "With --coordinator.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "With --coordinator.", flag_values=values)
    try:
        rest = values(list(argv))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as e:
        raise InputError(f"{_reason(e)} Recipes are in configs/; every key is listed in train/config.py.") from None
    if len(rest) > 1:
        raise InputError(f"{rest[1]!r} is no flag. Flags are --config, --config.KEY=VALUE, {_NAMES}.")
    if not isinstance(values.config, ConfigDict) or not values.workdir:
        raise InputError("Give --config configs/RECIPE.py and --workdir DIR.")
    return CommandLine(
        parse_config(values.config),
        values.workdir,
        values.distributed or values.coordinator is not None,
        values.coordinator,
        values.num_processes,
        values.process_id,
    )


def _reason(error: Exception) -> str:
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip().rstrip(".") + "."
