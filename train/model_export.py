"""Export of a run's model: a converted directory, which all programs load, or an adapter of LoRA."""

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.families import load_config
from tarsier_jax.files import is_remote
from tarsier_jax.mirror import last_upload
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.programs import resolve_dtype
from tarsier_jax.sharding import parameter_path
from tarsier_jax.weights import resolve
from tarsier_jax.weights.adapter import write_adapter
from tarsier_jax.weights.names import abstract_state
from tarsier_jax.weights.orbax import remove_converted, write_converted
from train.best import read_best
from train.checkpoints import load_parameters
from train.checks import first_difference
from train.config import TrainConfig, read_config
from train.lora import lora_matrices
from train.optimizer import Params
from train.record import last_start
from train.run import TrainRun, training_processor
from train.state import StateSpec, TrainState, build_model
from train.workdir import saved_steps


def export_trained(run: TrainRun, state: TrainState) -> Path | epath.Path:
    """Writes WORKDIR/model, a converted directory in the model's dtype, or with LoRA WORKDIR/adapter.

    An earlier one is replaced.

    Raises:
        CheckpointError: the disk is full.
    """
    if run.config.lora.rank:
        return _export_adapter(run, state)
    out = run.root / "model"
    if jax.process_index() == 0:
        remove_converted(out)  # of an earlier, shorter run
    write_converted(out, trained_model(run.spec, state), run.model_directory, run.processor.chat_template)
    return out


def _export_adapter(run: TrainRun, state: TrainState) -> Path:
    out = run.workdir / "adapter"
    everywhere = NamedSharding(run.spec.mesh, P())
    params = jax.jit(lambda params: params, out_shardings=everywhere)(state.params)
    if jax.process_index() == 0:
        shutil.rmtree(out, ignore_errors=True)
        _write_adapter(out, params, run.spec.config, run.config)
    return out


def _write_adapter(out: Path, params: Params, model: ModelConfig, config: TrainConfig) -> None:
    matrices = lora_matrices({path: np.asarray(x) for path, x in params.items()})
    write_adapter(out, model, matrices, config.lora.alpha, config.model)


def trained_model(spec: StateSpec, state: TrainState) -> Tarsier:
    """Returns the model of a state. Trained parameters have the model's dtype, and all arrays are copies."""
    dtype = spec.config.dtype
    cast = jax.jit(lambda state: {p: x.astype(dtype) for p, x in state.params.items()} | state.frozen)
    return build_model(spec.graph, cast(state), dtype)


def export_checkpoint(
    workdir: str | os.PathLike[str], step: str = "latest", output: str | os.PathLike[str] | None = None
) -> epath.Path:
    """Writes a checkpoint of a run as a converted directory in the dtype of the run, or with LoRA as an adapter.

    Args:
        workdir: Directory of the run, local or gs://.
        step: A number, "latest" or "best".
        output: The directory to write; None for WORKDIR/model-STEP, or WORKDIR/adapter-STEP. An adapter cannot be
            written to gs://.

    Returns:
        The directory.

    Raises:
        InputError: the workdir is not that of a run, or has no such checkpoint.
        CheckpointError: the checkpoint is damaged, or of another model than the run's; `output` exists; the disk is
            full.
    """
    workdir = epath.Path(workdir)
    start, number = _read_start(workdir), find_step(workdir, step)
    config = read_config(ConfigDict(start["config"]))
    source = resolve(config.model)
    if config.lora.rank:
        out = epath.Path(output or workdir / f"adapter-{number}")
        if is_remote(out):
            raise InputError(f"The adapter cannot be written to {out}. Pass a local directory as --output.")
        _write_adapter(Path(out), load_parameters(workdir, number, "float32"), load_config(source), config)
        return out
    dtype = resolve_dtype(config.dtype, start.get("platform"))
    out = epath.Path(output or workdir / f"model-{number}")
    model, template = _load(workdir, number, config, source, dtype)
    write_converted(out, model, source, template)
    return out


def _read_start(workdir: epath.Path) -> dict[str, Any]:
    """Returns `last_start` of a local or gs:// workdir, which a run may be writing. Raises InputError."""
    if not is_remote(workdir):
        return last_start(Path(workdir))
    with last_upload(str(workdir), "runs.jsonl") as directory:
        return last_start(directory)


def find_step(workdir: epath.Path, step: str) -> int:
    """Returns the step of a checkpoint, for a number, "latest" or "best". Raises InputError."""
    steps = saved_steps(workdir)
    if not steps:
        raise InputError(f"{workdir} has no complete checkpoint yet. Wait for the run's next save.")
    if step == "latest":
        return steps[-1]
    listed = f"It has the steps {', '.join(map(str, steps))}."
    if step == "best":
        best = read_best(workdir)
        if best is None:
            raise InputError(f"{workdir} has no best checkpoint: the run has no --config.best_metric. {listed}")
        step = str(best.step)
    if not step.isdecimal() or int(step) not in steps:
        raise InputError(f"{workdir} has no checkpoint of step {step}. {listed}")
    return int(step)


def _load(workdir: epath.Path, step: int, config: TrainConfig, source: Path, dtype: str) -> tuple[Tarsier, str]:
    """Returns the model of a checkpoint, and the chat template of the run."""
    model_config = load_config(source)
    template = training_processor(source, model_config, config).chat_template
    params = load_parameters(workdir, step, dtype)
    graph, abstract = abstract_state(model_config)
    _check_shapes(params, abstract, workdir, step)
    return build_model(graph, params, dtype), template


def _check_shapes(params: Params, abstract: nnx.State, workdir: epath.Path, step: int) -> None:
    """Raises CheckpointError if the parameters are not those of the model."""
    shapes = {parameter_path(path): leaf.shape for path, leaf in nnx.to_flat_state(abstract)}
    theirs = {path: x.shape for path, x in params.items()}
    unlike = first_difference(shapes, theirs)
    if unlike is not None:
        raise CheckpointError(
            f"Step {step} of {workdir} is of another model than the run's starting checkpoint: {unlike} has the shape "
            f"{theirs.get(unlike, 'absent')} instead of {shapes.get(unlike, 'absent')}. Restore the files of the "
            "starting checkpoint."
        )
