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
from etils import epath
from jax.experimental import multihost_utils

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
from train.data.annotations import describe_files, num_lines
from train.data.loading import RowLoader
from train.data.packing import PackingConfig, PackUnit, fit_packing
from train.data.planning import collect, estimate_rows, lines_per_row, measure_samples, steps_of_epochs
from train.mesh import build_mesh, check_rows, find_local_rows
from train.processes import check_same_settings, from_first
from train.record import check_run_metadata, flatten, read_run_metadata, record_start
from train.state import LossFunction, StateSpec, make_state_spec
from train.workdir import RunStore


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
        load_plain: `load` without extra arrays, where those exist only after `before`.
    """

    name: str
    loss: LossFunction
    prepare: Callable[[Mapping[str, Any], np.random.Generator], dict[str, Any]]
    load: Callable[[Processor, Mapping[str, Any], np.random.Generator], PackUnit]
    extra: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    with_reference: bool = False
    before: Callable[["TrainRun"], None] | None = None
    answers: int = 1
    load_plain: Callable[[Processor, Mapping[str, Any], np.random.Generator], PackUnit] | None = None


@dataclasses.dataclass(frozen=True)
class TrainRun:
    """A run, ready to start.

    Attributes:
        config: Configuration, with the sizes of the bins and the number of steps set.
        workdir: Local directory of logs, and of the checkpoints if `store` is None.
        model_directory: Starting checkpoint.
        processor: The checkpoint's processor with the run's options.
        spec: Shapes, shardings and update of the state.
        objective: SFT or DPO.
        changes: Settings that differ from those of the previous start, as text.
        store: The gs:// workdir, if the run has one.
    """

    config: TrainConfig
    workdir: Path
    model_directory: Path
    processor: Processor
    spec: StateSpec
    objective: Objective
    changes: tuple[str, ...] = ()
    store: RunStore | None = None

    @property
    def root(self) -> epath.Path:
        """Directory of the checkpoints and of the trained model, local or gs://."""
        return epath.Path(self.store.url if self.store else self.workdir)

    def rows(self, lines: grain.MapDataset, num_rows: int, parts: int = 1) -> RowLoader:
        """Returns the loader of this process's rows.

        Args:
            lines: Mixture of the annotations.
            num_rows: Rows per step over all processes.
            parts: Parts of a step whose gradients are summed.
        """
        data = self.config.data
        packing = PackingConfig(
            processor=self.processor,
            shape=data.row_shape,
            packing_buffer=data.packing_buffer,
            max_bad_fraction=data.max_bad_fraction,
            dtype=self.spec.config.dtype,
            extra=self.objective.extra,
        )
        return RowLoader(
            lines,
            functools.partial(self.objective.load, self.processor),
            packing,
            seed=self.config.seed,
            media_root=data.media_root,
            num_rows=num_rows,
            local_rows=find_local_rows(self.spec.mesh, num_rows, parts),
            num_workers=data.num_workers,
        )


def open_run(config: TrainConfig, workdir: Path, objective: Objective, store: RunStore | None = None) -> TrainRun:
    """Checks everything that can be checked before the first batch.

    Raises:
        TarsierError: the checkpoint, the mesh, the annotations or the workdir do not fit.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--workdir {workdir} cannot be made ({e.strerror}). Choose another one.") from None
    root = store.url if store else str(workdir)
    check_same_settings("configuration", {"--workdir": root, **_common(config)})
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
    pace = {"lines_per_row": _lines_per_row(config, workdir, root, objective, processor)} if config.num_epochs else {}
    if pace:
        steps = steps_of_epochs(config, config.num_epochs, **pace, num_lines=num_lines(config.data.train))
        config = dataclasses.replace(config, num_train_steps=steps)
    try:
        spec = make_state_spec(
            model_config, config.optimizer, config.num_train_steps, mesh, objective.with_reference, config.lora
        )
    except ValueError as e:
        raise InputError(f"{e} Choose other sizes in config.mesh.") from None
    facts = {**_facts(config, objective, processor, directory), **pace}
    check_same_settings("data", {**facts, "data.eval": describe_files(config.data.eval) if config.data.eval else []})
    changes = []
    if jax.process_index() == 0:
        check_run_metadata(workdir, facts, root)
        changes = record_start(workdir, recorded)
    return TrainRun(config, workdir, directory, processor, spec, objective, tuple(changes), store)


def _lines_per_row(config: TrainConfig, workdir: Path, root: str, objective: Objective, processor: Processor) -> float:
    """Returns the lines of annotations that a row takes: of run.json on resume, else measured by process 0."""
    value = 0.0
    if jax.process_index() == 0:
        recorded = read_run_metadata(workdir, root).get("lines_per_row")
        value = _measure_lines_per_row(config, objective, processor) if recorded is None else float(recorded)
    if jax.process_count() > 1:
        content = np.frombuffer(np.float64(value).tobytes(), np.uint8)  # JAX would round it to float32
        value = float(np.frombuffer(multihost_utils.broadcast_one_to_all(content).tobytes(), np.float64)[0])
    return value


def _measure_lines_per_row(config: TrainConfig, objective: Objective, processor: Processor) -> float:
    material = collect(measure_samples(config, processor, objective.load_plain or objective.load))
    rows = estimate_rows(material.sizes, config.data.row_shape, config.data.packing_buffer)
    lines, num_all = lines_per_row(material, rows), num_lines(config.data.train)
    steps = steps_of_epochs(config, config.num_epochs, lines, num_all)
    print(
        f"{config.num_epochs:g} epochs of {num_all:,} lines are {steps:,} steps: a row takes {lines:.2f} lines on "
        f"average, estimated from {material.num_lines} lines",
        flush=True,
    )
    return lines


# Settings that may differ between processes: paths and reading of a host's files.
_OF_A_HOST = ("model", "data.train", "data.eval", "data.media_root", "data.num_workers")
# Settings of the data that must not change on resume. The others affect only the speed.
_OF_ROWS = (
    *("seq_len", "max_samples_per_seq"),
    *("patches_per_bin", "frames_per_bin", "vision_bins"),  # may follow from others, so these come after them
    *("shuffle", "global_batch_size", "packing_buffer"),
)
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")


def _common(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings that must be equal in all processes."""
    flat = flatten(dataclasses.asdict(config), "config.")
    return {key: value for key, value in flat.items() if key.removeprefix("config.") not in _OF_A_HOST}


def _facts(config: TrainConfig, objective: Objective, processor: Processor, directory: Path) -> dict[str, Any]:
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
