"""Everything that a run needs, from its configuration: model, mesh, processor, data, spec."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import InputError
from tarsier_jax.families import family_of, load_config
from tarsier_jax.models.attention import default_implementation
from tarsier_jax.processing.processor import Processor
from tarsier_jax.processing.templates import training_template
from tarsier_jax.programs import resolve_dtype
from tarsier_jax.weights import resolve
from tarsier_jax.weights.digest import digest_weights
from train.config import TrainConfig
from train.data.annotations import describe_files
from train.data.packing import PackingConfig, PackUnit, fit_packing, make_rows
from train.mesh import build_mesh, check_rows, row_share
from train.processes import check_same_settings, from_first
from train.record import check_run_metadata, flatten, record_start
from train.state import LossFunction, StateSpec, make_state_spec


@dataclasses.dataclass(frozen=True)
class Objective:
    """The parts of a run that differ between SFT and DPO.

    Attributes:
        name: Name in logs and in run.json.
        loss: Loss of a batch.
        prepare: Returns the plain conversation of an annotation.
        load: Returns the unit that is packed of an annotation.
        extra: Shapes of extra arrays, see `PackingConfig`.
        with_reference: Whether the loss needs a frozen reference model.
        before: Called before the first step.
        answers: Sequences that share the frames of one sample.
    """

    name: str
    loss: LossFunction
    prepare: Callable[[Mapping[str, Any], np.random.Generator], dict[str, Any]]
    load: Callable[[Processor, Mapping[str, Any], np.random.Generator], PackUnit]
    extra: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    with_reference: bool = False
    before: Callable[["TrainRun"], None] | None = None
    answers: int = 1


@dataclasses.dataclass(frozen=True)
class TrainRun:
    """A run, ready to start.

    Attributes:
        config: Configuration, with the sizes of the bins set.
        workdir: Directory of checkpoints and logs.
        model_directory: Starting checkpoint.
        processor: The checkpoint's processor with the run's options.
        spec: Shapes, shardings and update of the state.
        objective: SFT or DPO.
        changes: Settings that differ from those of the previous start, as text.
    """

    config: TrainConfig
    workdir: Path
    model_directory: Path
    processor: Processor
    spec: StateSpec
    objective: Objective
    changes: tuple[str, ...] = ()

    @property
    def row_group(self) -> int:
        """Index of the share of a step's rows that this process loads."""
        return row_share(self.spec.mesh)[0]

    @property
    def row_groups(self) -> int:
        """Number of shares."""
        return row_share(self.spec.mesh)[1]

    def rows(self, lines: grain.MapDataset, rows: int, workers: int = 1) -> grain.IterDataset:
        """Returns this process's packed rows; `rows` counts those of a step over all processes."""
        data = self.config.data
        packer = PackingConfig(
            processor=self.processor,
            shape=data.row_shape,
            packing_buffer=data.packing_buffer,
            max_bad_fraction=data.max_bad_fraction,
            dtype=self.spec.config.dtype,
            extra=self.objective.extra,
        )
        return make_rows(
            lines,
            functools.partial(self.objective.load, self.processor),
            packer,
            seed=self.config.seed,
            media_root=data.media_root,
            rows=rows,
            process=self.row_group,
            processes=self.row_groups,
            workers=workers,
        )


def open_run(config: TrainConfig, workdir: Path, objective: Objective) -> TrainRun:
    """Checks everything that can be checked before the first batch.

    Raises:
        TarsierError: the checkpoint, the mesh, the annotations or the workdir do not fit.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--workdir {workdir} cannot be made ({e.strerror}). Choose another one.") from None
    check_same_settings("configuration", {"--workdir": str(workdir), **_common(config)})
    if not config.model:
        raise InputError("config.model is empty. Set --config.model=DIRECTORY or a hub id.")
    mesh = build_mesh(config.mesh)
    check_rows(config, mesh)
    directory = resolve(config.model)
    model_config = load_config(directory)
    recorded = dataclasses.asdict(config)
    packing = fit_packing(config.data, config.processor, model_config.vision, objective.answers)
    config = dataclasses.replace(config, data=packing)
    model_config = run_config(model_config, config, mesh.devices.flat[0])
    processor = training_processor(directory, model_config, config)
    try:
        spec = make_state_spec(
            model_config, config.optimizer, config.num_train_steps, mesh, objective.with_reference, config.lora
        )
    except ValueError as e:
        raise InputError(f"{e} Choose other sizes in config.mesh.") from None
    facts = _facts(config, objective, processor, directory, mesh)
    check_same_settings("data", {**facts, "data.eval": describe_files(config.data.eval) if config.data.eval else []})
    changes = []
    if jax.process_index() == 0:
        check_run_metadata(workdir, facts)
        changes = record_start(workdir, recorded)
    return TrainRun(config, workdir, directory, processor, spec, objective, tuple(changes))


# Settings that may differ between processes: paths and reading of a host's files.
_OF_A_HOST = ("model", "data.train", "data.eval", "data.media_root", "data.num_workers")
# Settings of the data that must not change on resume. The others affect only the speed.
_OF_ROWS = (
    *("seq_len", "max_samples_per_seq"),
    *("vision_bins", "patches_per_bin", "frames_per_bin"),  # may follow from others, so these come after them
    *("shuffle", "global_batch_size", "packing_buffer"),
)
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")


def _common(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings that must be equal in all processes."""
    flat = flatten(dataclasses.asdict(config), "config.")
    return {key: value for key, value in flat.items() if key.removeprefix("config.") not in _OF_A_HOST}


def _facts(
    config: TrainConfig, objective: Objective, processor: Processor, directory: Path, mesh: Mesh
) -> dict[str, Any]:
    """Returns the facts that must not change on resume: those of the checkpoints' content and of the data order."""
    model, optimizer = processor.config, config.optimizer
    facts = {
        "program": objective.name,
        "text": dataclasses.asdict(model.text),
        "vision": dataclasses.asdict(model.vision),
        "image": dataclasses.asdict(processor.image),
        "tokenizer": [
            _digest(file.read_bytes()) for file in map(directory.joinpath, _TOKENIZER_FILES) if file.exists()
        ],
        "chat_template": _digest(processor.chat_template.encode()),
        "processes": jax.process_count(),
        "row_groups": row_share(mesh)[1],
        "seed": config.seed,
        "data.train": describe_files(config.data.train),
        **flatten(dataclasses.asdict(config.processor), "processor."),
        **{f"data.{key}": getattr(config.data, key) for key in _OF_ROWS},
        **{f"optimizer.{key}": getattr(optimizer, key) for key in ("freeze", "muon_params", "mu_dtype")},
    }
    if objective.name == "dpo":  # the reference is the starting model, or a file of its log-probabilities
        facts |= {"model": config.model, **flatten(dataclasses.asdict(config.dpo), "dpo.")}
    if config.lora.rank:  # checkpoints do not contain the frozen weights
        facts |= {"weights": from_first(lambda: digest_weights(directory)).hex()}
        facts |= flatten(dataclasses.asdict(config.lora), "lora.")
    return facts


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def run_config(model: ModelConfig, config: TrainConfig, device: Any) -> ModelConfig:
    """Returns the model's configuration with the run's dtype, attention and remat.

    Raises:
        InputError: the attention does not run on the device, a `jax.Device`.
    """
    dtype = resolve_dtype(config.dtype, device.platform)
    attention = default_implementation(device, dtype) if config.attention == "auto" else config.attention
    if attention not in ("xla", default_implementation(device, dtype)):
        needs = {"cudnn": "an NVIDIA GPU from Ampere on and bfloat16", "splash": "a TPU"}[attention]
        raise InputError(f"config.attention={attention} needs {needs}, not {device.platform} and {dtype}. Choose auto.")
    return dataclasses.replace(model, dtype=dtype, attention=attention, remat=config.remat)


def training_processor(directory: Path, model: ModelConfig, config: TrainConfig) -> Processor:
    """Returns the checkpoint's processor with the run's options.

    A template that does not mark answers, such as Qwen2-VL's, is replaced by ChatML; see `training_template`.
    """
    processor = family_of(model).load_processor(directory, model)
    template = training_template(processor.chat_template)
    return dataclasses.replace(processor, chat_template=template, options=config.processor)
