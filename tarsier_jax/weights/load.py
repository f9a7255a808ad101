"""Loads a Hugging Face directory into device arrays, one shard at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from tarsier_jax.config import ModelConfig
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.sharding import parameter_shardings
from tarsier_jax.weights.match import open_checkpoint
from tarsier_jax.weights.names import Parameter, abstract_state
from tarsier_jax.weights.safetensors import Tensor

# Path and value of a parameter -> the value that replaces it, such as a quantized one.
Change = Callable[[tuple[Any, ...], jax.Array], Any]


def load_hf(
    directory: Path, config: ModelConfig, mesh: Mesh | None = None, change: Change = lambda path, x: x
) -> Tarsier:
    """Returns the model with the weights of a Hugging Face checkpoint, in `config.param_dtype`, sharded over `mesh`.

    Host memory contains the shard of one parameter at a time. A process reads only the rows of its own devices. Each
    parameter is changed before the next one is read.

    Raises:
        CheckpointError: see `open_checkpoint`.
    """
    checkpoint = open_checkpoint(directory, config)
    graph, state = abstract_state(config)
    shardings = shardings_for(state, mesh)
    dtype = np.dtype(jax.numpy.dtype(config.param_dtype))
    arrays = {}
    for parameter, tensors in checkpoint.sources:
        array = jax.make_array_from_callback(
            parameter.shape,
            shardings[parameter.path],
            lambda index, p=parameter, t=tensors: read_block(p, t, index or ()).astype(dtype, copy=False),
        )
        array.block_until_ready()  # otherwise copies accumulate in host memory
        arrays[parameter.path] = change(parameter.path, array)
    return build(graph, state, arrays)


def shardings_for(state: nnx.State, mesh: Mesh | None) -> dict[tuple[Any, ...], Sharding]:
    """Returns the sharding of every parameter. Without a mesh, all are on the first device."""
    if mesh is not None:
        return dict(parameter_shardings(state, mesh))
    device = SingleDeviceSharding(jax.local_devices()[0])
    return {path: device for path, _ in nnx.to_flat_state(state)}


def build(graph: nnx.GraphDef, state: nnx.State, arrays: dict[tuple[Any, ...], Any]) -> Tarsier:
    """Returns the model with `arrays` as its parameters."""
    flat = {path: leaf.replace(arrays[path]) for path, leaf in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(flat))


def read_block(parameter: Parameter, tensors: Sequence[Tensor], index: tuple[Any, ...]) -> np.ndarray:
    """Returns the part of a parameter that `index` selects, in its dtype on disk."""
    if not parameter.stacked:
        return _read_part(tensors[0], parameter.shape, index)
    layers = range(*index[0].indices(parameter.shape[0]))
    blocks = (_read_part(tensors[i], parameter.shape[1:], index[1:]) for i in layers)
    first = next(blocks)
    out = np.empty((len(layers), *first.shape), first.dtype)
    out[0] = first
    for i, block in enumerate(blocks, 1):
        out[i] = block
    return out


def _read_part(tensor: Tensor, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """Reads the rows that the first dimension selects. The other dimensions are sliced in memory."""
    start, stop, _ = index[0].indices(shape[0])
    row = tensor.size // shape[0]
    values = tensor.read(start * row, stop * row).reshape(stop - start, *shape[1:])
    return values[(slice(None), *index[1:])]
