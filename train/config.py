"""The configuration of a run: ml_collections at the command line, frozen dataclasses everywhere else."""

import dataclasses
import difflib
import itertools
import math
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from tarsier_jax.errors import InputError
from tarsier_jax.files import check_source
from tarsier_jax.models.attention import IMPLEMENTATIONS
from tarsier_jax.processing.options import ProcessorOptions
from train.checks import check, check_at_least, check_choice, check_dtype
from train.data.packing import DataConfig
from train.lora import LoraConfig
from train.optimizer import OptimizerConfig, make_schedule
from train.writers import SERVICES

# Keys of earlier versions and their names in this one.
FORMER_KEYS = {
    "steps": "num_train_steps",
    "parts": "grad_accum_steps",
    "keep": "max_to_keep",
    "profile_at": "profile_step",
    "data.rows": "data.global_batch_size",
    "data.tokens": "data.seq_len",
    "data.samples": "data.max_samples_per_seq",
    "data.lookahead": "data.packing_buffer",
    "data.bins": "data.vision_bins",
    "data.patches": "data.patches_per_bin",
    "data.frames": "data.frames_per_bin",
    "data.workers": "data.num_workers",
    "data.max_bad_share": "data.max_bad_fraction",
    "optimizer.muon": "optimizer.muon_params",
}
# Keys of earlier versions without a successor, and the remedy.
REMOVED_KEYS = {"score_clips": "`python -m train.micro` scores the model that it trains: see its flag --score_clips."}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis. One axis may be -1: it takes the devices that remain.

    Attributes:
        data: Replicas of the parameters; rows are split over them.
        fsdp: Devices that split parameters, optimizer state and rows.
        tensor: Devices that split each layer.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    """Options of `train.dpo`.

    Attributes:
        beta: Factor of the log-probability margin in the loss.
        reference: "weights" keeps the starting model in memory; a file or URL stores its log-probabilities instead.

    Raises:
        InputError: beta is not above 0, or reference is empty.
    """

    beta: float = 0.1
    reference: str = "weights"

    def __post_init__(self) -> None:
        check(self, ["beta"], lambda beta: 0 < beta < math.inf, "above 0")
        check(self, ["reference"], bool, '"weights" or the name of a file')


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """A benchmark of `eval.run` on which each evaluation scores the model.

    Attributes:
        name: Its name, such as shapes or tvbench; empty for none.
        annotations: Directory of the annotation files, or its URL in an object store.
        data_root: Directory of the videos, or its URL.
        limit: Number of videos.

    Raises:
        InputError: limit is below 1.
    """

    name: str = ""
    annotations: str = ""
    data_root: str = ""
    limit: int = 100

    def __post_init__(self) -> None:
        check_at_least(self, 1, "limit")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run.

    Attributes:
        model: Starting checkpoint: a Hugging Face directory, hub id, converted directory or key of debug_data.MODELS.
        num_train_steps: Optimizer steps; num_epochs replaces them if it is above 0.
        num_epochs: Passes over data.train, from which the number of steps follows; 0 for num_train_steps.
        seed: Seed of the data order and of every random choice.
        grad_accum_steps: Parts of a step's rows that are computed one after the other; their gradients are summed.
        dtype: Dtype of matrix products: float32, bfloat16, or auto (bfloat16 on accelerators).
        attention: auto, xla, cudnn or splash.
        remat: Activations that the backward pass recomputes: none, dots or full.
        log_every: Steps between two log lines; 0 never logs.
        save_every: Steps between two checkpoints; 0 saves only at the end.
        max_to_keep: Checkpoints that are kept.
        eval_every: Steps between two evaluations on data.eval; 0 never evaluates.
        eval_captions: Held-out samples that are captioned at each evaluation.
        best_metric: Metric of the evaluation, such as eval_loss, whose best checkpoint is kept besides the newest ones.
        writers: Services that receive the metrics besides the files of the workdir: wandb, mlflow, trackio.
        profile_step: First of the three steps that are traced; 0 traces none.
        mesh: Devices.
        data: Annotations and packing.
        optimizer: Optimizer and learning rates.
        lora: Training of low-rank updates.
        dpo: Preference optimisation, `train.dpo` only.
        benchmark: Benchmark that scores the model at each evaluation.
        processor: Frames, pixels and tokens per sample.

    Raises:
        InputError: a value is out of its range, or is not one of its choices.
    """

    model: str = ""
    num_train_steps: int = 1000
    num_epochs: float = 0.0
    seed: int = 0
    grad_accum_steps: int = 1
    dtype: str = "auto"
    attention: str = "auto"
    remat: str = "full"
    log_every: int = 10
    save_every: int = 500
    max_to_keep: int = 2
    eval_every: int = 500
    eval_captions: int = 2
    best_metric: str = ""
    writers: tuple[str, ...] = ()
    profile_step: int = 0
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    dpo: DpoConfig = DpoConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    processor: ProcessorOptions = ProcessorOptions()

    def __post_init__(self) -> None:
        check_dtype(self, "dtype", "auto")
        check_choice(self, "attention", ("auto", *IMPLEMENTATIONS))
        check_choice(self, "remat", ("none", "dots", "full"))
        check_at_least(self, 0, "num_train_steps", "seed", "log_every", "save_every", "eval_every", "eval_captions")
        check_at_least(self, 0, "profile_step", "num_epochs")
        check_at_least(self, 1, "max_to_keep")
        check(self, ["writers"], lambda names: set(names) <= SERVICES.keys(), f"a tuple of {', '.join(SERVICES)}")
        if not self.num_epochs:
            make_schedule(self.optimizer, self.num_train_steps)  # checks the warm-up


def default_config() -> ConfigDict:
    """Returns every key with its default, from which the recipes in configs/ start."""
    return ConfigDict(dataclasses.asdict(TrainConfig()))


def read_config(config: ConfigDict) -> TrainConfig:
    """Returns the dataclass of a `ConfigDict`.

    Raises:
        InputError: a key does not exist, or its value has another type or is not accepted; the message names it.
    """
    return _build(TrainConfig, config.to_dict(), "config")


def _build(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            _check_former(f"{where}.{key}")
            close = difflib.get_close_matches(key, hints, 1)
            hint = f"Did you mean {close[0]}?" if close else f"It has {', '.join(hints)}."
            raise InputError(f"{where}.{key} does not exist. {hint}")
        arguments[key] = _value(hints[key], value, f"{where}.{key}")
    try:
        return cls(**arguments)
    except InputError as e:  # starts with the field's name
        raise InputError(f"{where}.{e}") from None


def _check_former(key: str) -> None:
    """Raises InputError for a key of an earlier version, such as "config.parts"."""
    name = key.removeprefix("config.")
    if former := FORMER_KEYS.get(name):
        raise InputError(f"{key} is now config.{former}. Use the new name on the command line and in recipes.")
    if name in REMOVED_KEYS:
        raise InputError(f"{key} no longer exists. {REMOVED_KEYS[name]}")


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} must contain keys, but is {value!r}.")
        return _build(hint, value, where)
    if typing.get_origin(hint) is tuple:
        return _tuple(typing.get_args(hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise InputError(f"{where} must be of type {hint.__name__}, but is {value!r}.")
    return value


def _tuple(hints: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """`hints`: of each item, or (hint, ...)."""
    if not isinstance(value, list | tuple) or (... not in hints and len(value) != len(hints)):
        raise InputError(f"{where} must be a tuple{f' of {len(hints)}' if ... not in hints else ''}, not {value!r}.")
    each = hints[:1] * len(value) if ... in hints else hints
    return tuple(_value(hint, v, f"{where}[{i}]") for i, (hint, v) in enumerate(zip(each, value, strict=True)))


def define_flags() -> flags.FlagValues:
    """Returns the flags --config FILE[:debug] and --config.KEY=VALUE, to which a program adds its own."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", help_string="A recipe in configs/.", flag_values=values)
    return values


def read_flags(values: flags.FlagValues) -> TrainConfig:
    """Parses the process's command line (ml_collections looks there for --config.KEY) into `values` and the config.

    Raises:
        InputError: a flag or key does not exist, has an invalid value, or is without effect.
    """
    names = ", ".join(f"--{name}" for name in values if name != "config")
    if {"-h", "--help"} & set(sys.argv):
        print(f"{sys.modules['__main__'].__doc__}\nFlags: --config FILE[:debug], --config.KEY=VALUE, {names}\n")
        print("\n".join(help_lines()))
        raise SystemExit(0)
    try:
        rest = values(list(sys.argv))[1:]
        if not isinstance(values.config, ConfigDict):  # None, or another type for a missing file
            problem = f"{config_flags.get_config_filename(values['config'])} does not exist. " if values.config else ""
            raise InputError(f"{problem}Give a recipe: --config configs/recap_7b.py, or configs/recap_7b.py:debug.")
    except flags.UnrecognizedFlagError as e:
        raise InputError(f"--{e.flagname} does not exist. {_hint(e.flagname, values)} Other flags: {names}.") from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as e:
        unknown = [key for key in _given_keys() if key not in _keys()]
        for key in (*unknown, *_recipe_keys(e)):
            _check_former(key)
        reason = str(e).strip().splitlines()[-1].strip()  # ml_collections quotes a recipe's whole traceback
        problem = f"--{unknown[0]} does not exist. {_hint(unknown[0])}" if unknown else reason
        raise InputError(f"{problem} Recipes are in configs/; every key is explained in train/config.py.") from None
    if rest:
        raise InputError(f"{rest[0]!r} is not a flag. Flags are --config, --config.KEY=VALUE, {names}.")
    config = read_config(values.config)
    if config.num_epochs and "config.num_train_steps" in _given_keys():
        raise InputError(
            f"--config.num_train_steps is without effect, since config.num_epochs is {config.num_epochs:g}. Leave it "
            "out, or add --config.num_epochs=0."
        )
    return with_local_paths(config)


def help_lines(config: Any = TrainConfig(), prefix: str = "--config") -> Iterator[str]:
    """Yields every key with its default and its description in the `Attributes:` of the dataclasses."""
    for field in dataclasses.fields(config):
        key, value = f"{prefix}.{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from help_lines(value, key)
        else:
            yield f"{key}={value!r}\n    {describe_field(type(config), field.name)}"


def describe_field(cls: type, name: str) -> str:
    """Returns the description of a field in the `Attributes:` of its class, or an empty string."""
    match = re.search(rf"^        {name}: (.+)$", cls.__doc__ or "", re.MULTILINE)
    return match[1] if match else ""


def with_local_paths(config: TrainConfig) -> TrainConfig:
    """Returns the configuration with a leading ~ expanded in all paths except those of annotations.

    Raises:
        InputError: a path is a URL that is not read.
    """

    def checked(name: str, path: str) -> str:
        return check_source(f"config.{name}", path) if path else path

    data = dataclasses.replace(config.data, media_root=checked("data.media_root", config.data.media_root))
    for name in ("train", "eval"):
        for path in getattr(data, name).split(","):
            checked(f"data.{name}", path.strip())
    dpo = dataclasses.replace(config.dpo, reference=checked("dpo.reference", config.dpo.reference))
    paths = {key: getattr(config.benchmark, key) for key in ("annotations", "data_root")}
    benchmark = {key: checked(f"benchmark.{key}", path) for key, path in paths.items()}
    return dataclasses.replace(
        config,
        model=checked("model", config.model),
        data=data,
        dpo=dpo,
        benchmark=dataclasses.replace(config.benchmark, **benchmark),
    )


def _recipe_keys(error: Exception) -> list[str]:
    """Returns the former keys that the error may be about; ml_collections names only the last part of a key."""
    name = re.search(r"""Key ["'](\w+)["'] does not exist""", str(error))
    return [f"config.{key}" for key in (*FORMER_KEYS, *REMOVED_KEYS) if name and key.rpartition(".")[2] == name[1]]


def _given_keys() -> list[str]:
    """Returns the keys on the command line, such as "config.data.seq_len"."""
    names = (argument.lstrip("-").partition("=")[0] for argument in sys.argv[1:])
    return [name for name in names if name.startswith("config.")]


def _keys(prefix: str = "config", cls: Any = TrainConfig) -> list[str]:
    """Returns every key, sections included."""
    fields = {f"{prefix}.{name}": hint for name, hint in typing.get_type_hints(cls).items()}
    below = [_keys(name, hint) for name, hint in fields.items() if dataclasses.is_dataclass(hint)]
    return [*fields, *itertools.chain(*below)]


def _hint(flag: str, others: Iterable[str] = ()) -> str:
    close = difflib.get_close_matches(flag, [*_keys(), *others], 1, cutoff=0.5)
    return f"Did you mean --{close[0]}?" if close else ""
