"""Orbax checkpoints: saves and restores a model shard by shard, and converts checkpoints larger than memory.

A converted directory contains `params/` (Orbax, plain zarr3 without compression: random bits do not compress), the
files that came with the weights (config, tokenizer, processor), and a manifest, `tarsier_jax.json`, which is written
last.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import CheckpointError
from tarsier_jax.families import load_config
from tarsier_jax.files import hidden, is_remote, new_directory
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.templates import save_chat_template
from tarsier_jax.sharding import parameter_path
from tarsier_jax.storage import store_errors
from tarsier_jax.weights.load import Change, build, shardings_for
from tarsier_jax.weights.match import open_checkpoint
from tarsier_jax.weights.names import abstract_state

MANIFEST = "tarsier_jax.json"
PARAMS = "params"
_FORMAT = 1
_ASSETS = {".json", ".txt", ".jinja", ".model"}

ProgressCallback = Callable[[int, int], None]  # bytes done, total bytes


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The properties of the original checkpoint that a converted directory stores.

    Attributes:
        layout: Key of `Family.layouts`.
        tied_head: Whether the original contains an output head although it is tied to the embedding.
        format: Version of the format of converted directories.
    """

    layout: str
    tied_head: bool = False
    format: int = _FORMAT


def is_converted(directory: Path) -> bool:
    return (directory / MANIFEST).exists()


def read_manifest(directory: Path) -> Manifest:
    """Reads the manifest of a converted directory.

    Raises:
        CheckpointError: the directory was not written by this project, or by a newer version of it.
    """
    try:
        raw = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        manifest = Manifest(raw["layout"], raw["tied_head"], raw["format"])
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} is not a converted directory: {MANIFEST} is missing. Use the output of convert.hf_to_orbax, "
            "or the directory `model` of a training run."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{directory / MANIFEST} cannot be read ({e!r}). Convert the checkpoint again.") from None
    if manifest.format != _FORMAT:
        raise CheckpointError(f"{directory} has format {manifest.format}; this version reads {_FORMAT}. Update it.")
    return manifest


def write_converted(out: Path | epath.Path, model: Tarsier, source: Path, chat_template: str) -> None:
    """Writes a trained model as a converted directory, with the other files of the original checkpoint.

    All processes must call it; each writes the shards of its own devices.

    Args:
        out: A local path or a gs:// URL. The latter is complete when it has the manifest.

    Raises:
        CheckpointError: `out` exists, or the disk is full.
        InputError: the store cannot be written.
    """
    if is_converted(source):
        manifest = read_manifest(source)
    else:
        checkpoint = open_checkpoint(source, load_config(source))
        manifest = Manifest(checkpoint.layout, checkpoint.tied_head)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    with _new_output(out, nbytes) as partial:
        _wait_for_all(f"{out} is there")
        save_checkpoint(partial / PARAMS, model)
        if jax.process_index() == 0:
            with tempfile.TemporaryDirectory() as name:
                copy_assets(source, Path(name))
                save_chat_template(Path(name), chat_template)
                for file in Path(name).iterdir():
                    (partial / file.name).write_bytes(file.read_bytes())
            (partial / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest), indent=2), encoding="utf-8")
    _wait_for_all(f"{out} is whole")


@contextlib.contextmanager
def _new_output(out: Path | epath.Path, nbytes: int) -> Iterator[epath.Path]:
    """Yields the directory that all processes write, which becomes `out`. Objects in gs:// cannot be renamed."""
    if is_remote(out):
        if jax.process_index() == 0:
            with store_errors(str(out)):
                is_whole = (epath.Path(out) / MANIFEST).exists()
            if is_whole:
                raise CheckpointError(f"{out} exists already. Remove it, or choose another name.")
            remove_converted(out)  # of an interrupted run
        with store_errors(str(out), "written"):
            yield epath.Path(out)
    elif jax.process_index() == 0:
        with new_directory(Path(out), nbytes) as partial:
            yield epath.Path(partial)
    else:
        yield epath.Path(hidden(Path(out), "partial"))


def remove_converted(directory: Path | epath.Path) -> None:
    """Removes a converted directory, the manifest first. A directory that does not exist is no error."""
    with store_errors(str(directory), "written"):
        (epath.Path(directory) / MANIFEST).unlink(missing_ok=True)
        epath.Path(directory).rmtree(missing_ok=True)


def _wait_for_all(moment: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(moment)


def copy_assets(source: Path, out: Path) -> None:
    """Copies config, tokenizer, template and processor files, but not weights or code."""
    for file in sorted(source.iterdir()):
        if file.suffix in _ASSETS and not file.name.endswith(".index.json") and file.name != MANIFEST:
            shutil.copyfile(file, out / file.name)


def save_checkpoint(path: Path | epath.Path, model: Tarsier) -> None:
    """Saves the parameters of a model with stacked layers; each process writes its own shards."""
    save_leaves(path, {p: leaf[...] for p, leaf in nnx.to_flat_state(nnx.state(model))})


def save_leaves(path: Path | epath.Path, leaves: dict[tuple[Any, ...], Any], **options: Any) -> None:
    """Saves leaves in Orbax's format. `options` are those of its PyTreeCheckpointHandler."""
    import orbax.checkpoint as ocp  # takes a third of a second, and Hugging Face directories need none of it

    # One file per chunk instead of OCDBT's database: conversion and export address arrays by name.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, **options)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            path if is_remote(path) else path.resolve(),
            args=ocp.args.PyTreeSave(nnx.traversals.unflatten_mapping(leaves)),
        )


def load_checkpoint(
    directory: Path, config: ModelConfig, mesh: Mesh | None = None, change: Change = lambda path, x: x
) -> Tarsier:
    """Restores a converted directory in `config.param_dtype`. Each process reads only the shards of its devices.

    All parameters are restored and then changed.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not fit the directory's config.json.
    """
    import orbax.checkpoint as ocp

    read_manifest(directory)
    graph, state = abstract_state(config)
    shardings, dtype = shardings_for(state, mesh), jax.numpy.dtype(config.param_dtype)
    check_arrays(directory, state)
    shapes = {p: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=shardings[p]) for p, leaf in nnx.to_flat_state(state)}
    item = nnx.traversals.unflatten_mapping(shapes)
    arguments = ocp.checkpoint_utils.construct_restore_args(item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)) as checkpointer:
        restore = ocp.args.PyTreeRestore(item, restore_args=arguments)
        try:
            restored = checkpointer.restore((directory / PARAMS).resolve(), args=restore)
        except Exception as e:  # Orbax raises bare exceptions
            reason = str(e).split("\n")[0]
            raise CheckpointError(f"{directory} cannot be restored ({reason}). Convert the checkpoint again.") from None
    arrays = {path: change(path, array) for path, array in nnx.traversals.flatten_mapping(restored).items()}
    return build(graph, state, arrays)


def check_arrays(directory: Path, state: nnx.State) -> None:
    """Checks every parameter of a converted directory without reading its values.

    Orbax would report the same problems late and at length.

    Raises:
        CheckpointError: a parameter is missing, has another shape, or lacks a part of its values.
    """
    problems = []
    for path, leaf in nnx.to_flat_state(state):
        try:
            store = open_array(directory, path)
        except (ValueError, OSError):
            problems.append(f"{parameter_path(path)} is missing")
            continue
        if tuple(store.shape) != leaf.shape:
            problems.append(f"{parameter_path(path)} has shape {tuple(store.shape)} instead of {leaf.shape}")
        elif not _is_whole(store):
            problems.append(f"{parameter_path(path)} is damaged")
    if problems:
        raise CheckpointError(f"{directory} does not fit its config.json: {'; '.join(problems)}. Convert it again.")


def _is_whole(store: ts.TensorStore) -> bool:
    """Returns whether the files of all chunks exist with the correct number of bytes."""
    spec = store.spec().to_json()
    chunk = spec["metadata"]["chunk_grid"]["configuration"]["chunk_shape"]
    plain = [codec["name"] for codec in spec["metadata"]["codecs"]] == ["bytes"]
    nbytes = math.prod(chunk) * np.dtype(store.dtype.numpy_dtype).itemsize
    for index in np.ndindex(*(-(-size // part) for size, part in zip(store.shape, chunk, strict=True))):
        file = Path(spec["kvstore"]["path"], "c", *map(str, index))
        if not file.exists() or (plain and file.stat().st_size != nbytes):
            return False
    return True


def open_array(directory: Path, path: tuple[Any, ...]) -> ts.TensorStore:
    """Opens one parameter of a converted directory without reading its values."""
    file = (directory / PARAMS / ".".join(map(str, path))).resolve()  # tensorstore refuses "." and ".." in paths
    return ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(file)}}, open=True, read=True).result()
