"""Export of a run's state to a converted checkpoint, which all programs load and `convert.orbax_to_hf` exports."""

import shutil
from pathlib import Path

import jax

from tarsier_jax.weights.orbax import write_converted
from train.run import TrainRun
from train.state import TrainState, build_model


def export_trained(run: TrainRun, state: TrainState) -> Path:
    """Writes WORKDIR/model, a converted directory in the model's dtype, and replaces an earlier one.

    Raises:
        CheckpointError: the disk is full.
    """
    out = run.workdir / "model"
    if jax.process_index() == 0:
        shutil.rmtree(out, ignore_errors=True)  # of an earlier, shorter run
    dtype = run.spec.config.dtype
    cast = jax.jit(lambda state: {p: x.astype(dtype) for p, x in {**state.params, **state.frozen}.items()})
    model = build_model(run.spec.graph, cast(state), dtype)
    write_converted(out, model, run.model_directory, run.processor.chat_template)
    return out
