"""Export to a Hugging Face directory: the same names, dtypes and bits, in safetensors shards."""

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import CheckpointError
from tarsier_jax.families import family_of, load_config
from tarsier_jax.families.family import Layout
from tarsier_jax.files import new_directory
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.chat import load_chat_template
from tarsier_jax.processing.templates import save_chat_template
from tarsier_jax.weights.match import open_checkpoint
from tarsier_jax.weights.names import abstract_state, parameters
from tarsier_jax.weights.orbax import (
    ProgressCallback,
    check_arrays,
    copy_assets,
    is_converted,
    open_array,
    read_manifest,
)
from tarsier_jax.weights.safetensors import DTYPES

_SHARD = 5 * 10**9  # maximum bytes per file
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to write.

    Attributes:
        name: Name in the checkpoint.
        shape: Shape in the checkpoint.
        dtype: Dtype in the checkpoint.
        read: Returns the values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def convert_to_hf(
    source: Path,
    out: Path,
    layout: str | None = None,
    dtype: str | None = None,
    progress: ProgressCallback | None = None,
) -> list[str]:
    """Writes a converted directory back as a Hugging Face directory. Memory stays near one tensor.

    Args:
        layout: A key of `Family.layouts`; the source's own when None. config.json is rewritten for another layout.
        dtype: Dtype that values are rounded to; the source's own when None.

    Returns:
        The names of the tensors written.

    Raises:
        CheckpointError: the source is damaged, its family has other layouts, `out` exists, or the disk is full.
    """
    manifest, config = read_manifest(source), load_config(source)
    layout, family = layout or manifest.layout, family_of(config)
    if layout not in family.layouts:
        raise CheckpointError(
            f"{source} is a {family.name} checkpoint, which has no layout {layout}. Choose one of "
            f"{', '.join(family.layouts)}, or none for its own."
        )
    check_arrays(source, abstract_state(config)[1])
    entries = []
    for parameter in parameters(config, layout):
        store = open_array(source, parameter.path)
        for i, name in enumerate(parameter.names):
            part = store[i] if parameter.stacked else store
            target = np.dtype(dtype or store.dtype.numpy_dtype)
            read = lambda part=part, target=target: part.read().result().astype(target, copy=False)  # noqa: E731
            entries.append(Entry(name, parameter.tensor_shape, target, read))
    if manifest.tied_head:
        entries.append(_tied_head(entries, family.layouts[layout]))
    with new_directory(out, sum(entry.nbytes for entry in entries)) as partial:
        write_shards(partial, entries, progress)
        copy_assets(source, partial)
        if layout != manifest.layout:
            _rewrite_configs(partial, config, layout)
            save_chat_template(partial, load_chat_template(partial))
    return [entry.name for entry in entries]


def export_hf(model: Tarsier, out: Path, layout: str) -> None:
    """Writes the weights of a model with stacked layers as safetensors into the existing directory `out`."""
    state = dict(nnx.to_flat_state(nnx.state(model)))
    entries = []
    for parameter in parameters(model.config, layout):
        values = np.asarray(state[parameter.path][...])
        for i, name in enumerate(parameter.names):
            part = values[i] if parameter.stacked else values
            entries.append(Entry(name, parameter.tensor_shape, values.dtype, lambda part=part: part))
    write_shards(out, entries)


def hf_tensors(directory: Path, layout: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, values) of every tensor of a Hugging Face or converted directory, with the names of `layout`."""
    config = load_config(directory)
    renamed = parameters(config, layout)
    if is_converted(directory):
        for parameter in renamed:
            store = open_array(directory, parameter.path)
            for i, name in enumerate(parameter.names):
                values = (store[i] if parameter.stacked else store).read().result()
                yield name, values.reshape(parameter.tensor_shape)
        return
    for parameter, (_, tensors) in zip(renamed, open_checkpoint(directory, config).sources, strict=True):
        for name, tensor in zip(parameter.names, tensors, strict=True):
            yield name, tensor.read(0, tensor.size).reshape(tensor.shape)


def _tied_head(entries: list[Entry], layout: Layout) -> Entry:
    embedding = next(entry for entry in entries if entry.name == layout.decoder + "embed_tokens.weight")
    return dataclasses.replace(embedding, name=layout.lm_head)


def write_shards(out: Path, entries: list[Entry], progress: ProgressCallback | None = None) -> None:
    """Writes safetensors files of at most 5 GB, and an index if there are several."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > _SHARD:
            shards.append([])
        shards[-1].append(entry)
    total, done, weight_map = sum(entry.nbytes for entry in entries), 0, {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for count in _write_safetensors(out / name, shard):
            done += count
            if progress:
                progress(done, total)
        weight_map |= {entry.name: name for entry in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_safetensors(path: Path, entries: list[Entry]) -> Iterator[int]:
    """Writes one file with one tensor in memory at a time, and yields the number of bytes of each tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        span = [offset, offset + entry.nbytes]
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            values = np.ascontiguousarray(entry.read())
            if values.size != math.prod(entry.shape):
                raise CheckpointError(f"{entry.name} has {values.size} values instead of those of {entry.shape}.")
            file.write(values.reshape(-1).view(np.uint8).data)
            yield entry.nbytes


def _rewrite_configs(directory: Path, config: ModelConfig, layout: str) -> None:
    """Rewrites config.json and preprocessor_config.json for the loaders of another layout."""
    family = family_of(config)
    path = directory / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    common = {key: raw[key] for key in ("torch_dtype", "dtype", "bos_token_id", "eos_token_id") if key in raw}
    path.write_text(json.dumps({**common, **family.config_json(config, layout)}, indent=2), encoding="utf-8")
    path = directory / "preprocessor_config.json"
    if path.exists():
        raw = json.loads(path.read_text(encoding="utf-8"))
        rewritten = family.preprocessor_json(raw, layout)
        if rewritten != raw:
            path.write_text(json.dumps(rewritten, indent=2), encoding="utf-8")
