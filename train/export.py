"""Export of a run's state: a converted checkpoint, which all programs load, or an adapter of LoRA."""

import shutil
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tarsier_jax.weights.adapter import write_adapter
from tarsier_jax.weights.orbax import write_converted
from train.lora import lora_matrices
from train.run import TrainRun
from train.state import TrainState, build_model


def export_trained(run: TrainRun, state: TrainState) -> Path:
    """Writes WORKDIR/model, a converted directory in the model's dtype, or with LoRA WORKDIR/adapter.

    An earlier one is replaced.

    Raises:
        CheckpointError: the disk is full.
    """
    if run.config.lora.rank:
        return _export_adapter(run, state)
    out = run.workdir / "model"
    if jax.process_index() == 0:
        shutil.rmtree(out, ignore_errors=True)  # of an earlier, shorter run
    dtype = run.spec.config.dtype
    cast = jax.jit(lambda state: {p: x.astype(dtype) for p, x in {**state.params, **state.frozen}.items()})
    model = build_model(run.spec.graph, cast(state), dtype)
    write_converted(out, model, run.model_directory, run.processor.chat_template)
    return out


def _export_adapter(run: TrainRun, state: TrainState) -> Path:
    out = run.workdir / "adapter"
    everywhere = NamedSharding(run.spec.mesh, P())
    params = jax.jit(lambda params: params, out_shardings=everywhere)(state.params)
    if jax.process_index() == 0:
        shutil.rmtree(out, ignore_errors=True)
        matrices = lora_matrices({path: np.asarray(x) for path, x in params.items()})
        write_adapter(out, run.spec.config, matrices, run.config.lora.alpha, run.config.model)
    return out
