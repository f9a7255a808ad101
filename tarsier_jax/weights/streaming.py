"""Converts Hugging Face directories to Orbax's format, without a complete copy of any tensor in memory."""

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from tarsier_jax.families import load_config
from tarsier_jax.files import new_directory
from tarsier_jax.weights.match import Checkpoint, open_checkpoint
from tarsier_jax.weights.names import Parameter
from tarsier_jax.weights.orbax import MANIFEST, PARAMS, Manifest, ProgressCallback, copy_assets, save_leaves
from tarsier_jax.weights.safetensors import Tensor

_PIECE = 16 * 2**20  # maximum bytes per chunk
_PENDING = 2  # chunks that are written while the next one is read


def convert_hf(source: Path, out: Path, progress: ProgressCallback | None = None) -> Checkpoint:
    """Writes the converted form of a Hugging Face directory to `out`, which appears only when it is complete.

    Memory stays near four chunks for every size of the model and of its tensors.

    Raises:
        CheckpointError: the source does not fit (see `open_checkpoint`), `out` exists, or the disk is full.
    """
    checkpoint = open_checkpoint(source, load_config(source))
    with new_directory(out, checkpoint.nbytes) as partial:
        _save_streaming(partial / PARAMS, checkpoint, progress)
        copy_assets(source, partial)
        manifest = Manifest(checkpoint.layout, checkpoint.tied_head)
        (partial / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest), indent=2), encoding="utf-8")
    return checkpoint


@dataclasses.dataclass(frozen=True)
class _Streamed:
    """A leaf that Orbax saves chunk by chunk, without a complete copy in memory.

    Attributes:
        parameter: The parameter.
        tensors: Its tensors on disk, one per layer.
        wrote: Called with the number of bytes of each chunk after it is written.
    """

    parameter: Parameter
    tensors: tuple[Tensor, ...]
    wrote: Callable[[int], None]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parameter.shape

    @property
    def chunk(self) -> tuple[int, ...]:
        """Shape of a chunk: complete rows of one layer, as many as divide it evenly and stay below _PIECE."""
        rows, *rest = self.shape[1:] if self.parameter.stacked else self.shape
        most = max(1, _PIECE // (math.prod(rest) * self.tensors[0].dtype.itemsize))
        height = next(n for n in range(min(rows, most), 0, -1) if rows % n == 0)
        return (*((1,) if self.parameter.stacked else ()), height, *rest)

    def pieces(self) -> Iterator[tuple[Any, np.ndarray]]:
        """Yields (index, values) of every chunk."""
        size, height = math.prod(self.chunk), self.chunk[1 if self.parameter.stacked else 0]
        for layer, tensor in enumerate(self.tensors):
            for i in range(tensor.size // size):
                rows = slice(i * height, (i + 1) * height)
                index = (slice(layer, layer + 1), rows) if self.parameter.stacked else (rows,)
                yield index, tensor.read(i * size, (i + 1) * size).reshape(self.chunk)


class _StreamedHandler(ocp.type_handlers.TypeHandler):
    """Writes streamed leaves in the format of a jax.Array, which Orbax restores as usual."""

    def typestr(self) -> str:
        return "jax.Array"

    async def metadata(self, infos: Any) -> Any:
        raise TypeError("streamed leaves are saved only")

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        raise TypeError("streamed leaves are saved only")

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            store = _create_array(Path(info.parent_dir) / info.name, value.shape, value.chunk, value.tensors[0].dtype)
            pending: collections.deque[Any] = collections.deque()
            for index, piece in value.pieces():
                pending.append(store[index].write(piece, can_reference_source_data_indefinitely=True))
                if len(pending) > _PENDING:
                    pending.popleft().result()
                value.wrote(piece.nbytes)
            for writing in pending:
                writing.result()
        return []


def _create_array(path: Path, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype) -> ts.TensorStore:
    metadata = {
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "metadata": metadata,
        "context": {"file_io_sync": False},  # `new_directory` syncs once at the end
        "store_data_equal_to_fill_value": True,  # Orbax reports an absent chunk of zeros as lost
    }
    return ts.open(spec, create=True, delete_existing=True).result()


def _save_streaming(path: Path, checkpoint: Checkpoint, progress: ProgressCallback | None) -> None:
    """Saves the parameters of a checkpoint chunk by chunk, and reports the bytes to `progress`."""
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, checkpoint.nbytes)

    leaves = {parameter.path: _Streamed(parameter, tensors, wrote) for parameter, tensors in checkpoint.sources}
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Streamed, _StreamedHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    save_leaves(path, leaves, type_handler_registry=registry)
