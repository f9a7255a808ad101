"""Weights: reads Hugging Face directories and Orbax checkpoints, and writes them bit for bit."""

import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.files import check_source
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.storage import local_source
from tarsier_jax.weights.adapter import read_adapter
from tarsier_jax.weights.export import convert_to_hf, export_hf, hf_tensors
from tarsier_jax.weights.kinds import check_kind
from tarsier_jax.weights.load import Change, load_hf
from tarsier_jax.weights.match import open_checkpoint
from tarsier_jax.weights.orbax import is_converted, load_checkpoint, open_array, save_checkpoint
from tarsier_jax.weights.quantize import Int8, check_int8, quantize_parameter, use_quantized

__all__ = [
    "EMBEDDED",
    "EMBEDDED_CLIP",
    "convert_to_hf",
    "export_hf",
    "hf_tensors",
    "load_weights",
    "resolve",
    "save_checkpoint",
    "stored_dtype",
]

# The name of the small Tarsier2 in the package, which describes moving shapes (see its model card in embedded/).
EMBEDDED = "tarsier2-micro"
_EMBEDDED_FILES = Path(__file__).parent.parent / "embedded"
EMBEDDED_CLIP = _EMBEDDED_FILES / "clip.mp4"
_DOWNLOADED = ["*.json", "*.txt", "*.jinja", "*.model", "*.safetensors"]


def resolve(path: str | Path) -> Path:
    """Returns the local directory of a checkpoint.

    Args:
        path: A local directory, EMBEDDED, a hub id ("omni-research/Tarsier2-Recap-7b"), or the URL of a directory in an
            object store (gs://, s3://, hf://). The weights and text files of a hub id, and all files of a URL, are
            downloaded once.

    Raises:
        CheckpointError: `path` is none of these, is a kind of checkpoint that cannot be loaded (see `check_kind`), or
            the download fails.
    """
    try:
        directory = Path(local_source(check_source("the checkpoint", str(path))))
    except InputError as error:
        raise CheckpointError(str(error)) from None
    if directory.is_dir():
        check_kind(directory)
        return directory
    if str(path) == EMBEDDED:
        return _EMBEDDED_FILES / EMBEDDED
    if directory.is_file():
        raise CheckpointError(f"{path} is a file. Pass the checkpoint directory that contains it.")
    if directory.exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise CheckpointError(
            f"The directory {path} does not exist. Pass a checkpoint directory, or a hub id like org/name."
        )
    from huggingface_hub import snapshot_download

    try:
        directory = Path(snapshot_download(str(path), allow_patterns=_DOWNLOADED))
    except Exception as e:  # the hub's client raises errors of its own, of the network and of the disk
        reason = str(e).strip().split("\n")[0]
        if os.path.expanduser("~") == "~" and "HF_HOME" not in os.environ:
            reason = "the user lacks a home directory for the download: set HF_HOME to a directory"
        raise CheckpointError(
            f"The directory {path} does not exist, and the download of it as a hub id failed ({reason}). Check the "
            "name and the network. For gated models, log in with `hf auth login`."
        ) from None
    check_kind(directory)
    return directory


def load_weights(
    directory: Path,
    config: ModelConfig,
    mesh: Mesh | None = None,
    int8: Int8 = False,
    adapter: str | Path | None = None,
) -> Tarsier:
    """Loads the model of a Hugging Face or converted directory, with stacked layers.

    Args:
        int8: Quantizes the decoder's layers; "w8a8" also the inputs of their products, see `weights.quantize`.
        adapter: Directory of a LoRA adapter that is merged into the weights, before they are quantized.

    Raises:
        CheckpointError: see `load_hf`, `load_checkpoint` and `read_adapter`.
        InputError: `int8` is unknown, or set and qwix is not installed.
    """
    changes: list[Change] = []
    if adapter is not None:
        changes.append(read_adapter(adapter, config).merge)
    if int8:
        check_int8(int8)
        changes.append(quantize_parameter)

    def change(path: tuple[Any, ...], x: jax.Array) -> Any:
        for each in changes:
            x = each(path, x)
        return x

    model = (load_checkpoint if is_converted(directory) else load_hf)(directory, config, mesh, change)
    return use_quantized(model, int8) if int8 else model


def stored_dtype(directory: Path, config: ModelConfig) -> str:
    """Returns the dtype of the token embeddings in a Hugging Face or converted directory. Raises CheckpointError."""
    if is_converted(directory):
        return open_array(directory, ("decoder", "embed", "weight")).dtype.name
    sources = open_checkpoint(directory, config).sources
    return next(t.dtype.name for parameter, (t, *_) in sources if parameter.path[:2] == ("decoder", "embed"))
