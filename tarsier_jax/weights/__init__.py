"""Weights: Hugging Face directories and Orbax checkpoints in, and out again bit for bit."""

import os
from pathlib import Path

from jax.sharding import Mesh

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.files import check_local
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.weights.export import convert_to_hf, export_hf, hf_tensors
from tarsier_jax.weights.kinds import check_kind
from tarsier_jax.weights.load import load_hf
from tarsier_jax.weights.orbax import convert_hf, is_converted, load_checkpoint, save_checkpoint
from tarsier_jax.weights.quantize import check_qwix, use_quantized

__all__ = [
    "EMBEDDED",
    "EMBEDDED_CLIP",
    "convert_hf",
    "convert_to_hf",
    "export_hf",
    "hf_tensors",
    "load_weights",
    "resolve",
    "save_checkpoint",
]

# The name of the small Tarsier2 in the package, which describes moving shapes (see the card beside it).
EMBEDDED = "tarsier2-micro"
_EMBEDDED_FILES = Path(__file__).parent.parent / "embedded"
EMBEDDED_CLIP = _EMBEDDED_FILES / "clip.mp4"
_DOWNLOADED = ["*.json", "*.txt", "*.jinja", "*.model", "*.safetensors"]


def resolve(path: str | Path) -> Path:
    """A local directory as it is; EMBEDDED as the package has it; a hub id ("omni-research/Tarsier2-Recap-7b")
    downloaded, weights and texts only.

    Raises:
        CheckpointError: it is none of these, or a kind of checkpoint that cannot be loaded (see `check_kind`), or the
            download fails.
    """
    try:
        directory = Path(check_local("the checkpoint", str(path)))
    except InputError as error:
        raise CheckpointError(str(error)) from None
    if directory.is_dir():
        check_kind(directory)
        return directory
    if str(path) == EMBEDDED:
        return _EMBEDDED_FILES / EMBEDDED
    if directory.is_file():
        raise CheckpointError(f"{path} is a file. Give the checkpoint directory that it is in.")
    if directory.exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise CheckpointError(f"There is no directory {path}. Give a checkpoint directory, or a hub id like org/name.")
    from huggingface_hub import snapshot_download

    try:
        directory = Path(snapshot_download(str(path), allow_patterns=_DOWNLOADED))
    except Exception as e:  # the hub's client raises its own, the network's and the disk's errors
        reason = str(e).strip().split("\n")[0]
        if os.path.expanduser("~") == "~" and "HF_HOME" not in os.environ:
            reason = "there is no home directory to keep it in: set HF_HOME to a directory"
        raise CheckpointError(
            f"There is no directory {path}, and it could not be downloaded as a hub id ({reason}). Check the name and "
            "the network, and for gated models log in with `hf auth login`."
        ) from None
    check_kind(directory)
    return directory


def load_weights(directory: Path, config: ModelConfig, mesh: Mesh | None = None, int8: bool = False) -> Tarsier:
    """The model of a Hugging Face or converted directory, with stacked layers.

    int8: quantizes the decoder's layers, see weights.quantize.

    Raises:
        CheckpointError: see `load_hf` and `load_checkpoint`.
        InputError: int8 without qwix.
    """
    load = load_checkpoint if is_converted(directory) else load_hf
    if not int8:
        return load(directory, config, mesh)
    check_qwix()
    return use_quantized(load(directory, config, mesh, int8))
