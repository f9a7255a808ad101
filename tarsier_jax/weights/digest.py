"""A digest of the files of a checkpoint, which detects other weights at the same path."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tarsier_jax.storage import local_source
from tarsier_jax.weights.orbax import PARAMS, is_converted
from tarsier_jax.weights.safetensors import open_tensors


def digest_weights(directory: Path) -> bytes:
    """Returns the SHA-256 of all weights of a checkpoint and of their file names; takes a second per few GiB."""
    if is_converted(directory):
        files = [path for path in (directory / PARAMS).glob("*/**/*") if path.is_file()]
    else:
        files = list({tensor.file for tensor in open_tensors(directory).values()})
    return digest_files(directory, files)


def digest_adapter(directory: str | Path) -> bytes:
    """Returns the SHA-256 of the options and the weights of a LoRA adapter, or of its URL, and of their file names."""
    directory = Path(local_source(str(directory)))
    return digest_files(directory, directory.glob("adapter_*"))


def digest_files(directory: Path, files: Iterable[Path]) -> bytes:
    """Returns the SHA-256 of the contents of files, and of their names in `directory`; takes a second per few GiB."""
    files, total = sorted(files), hashlib.sha256()
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        for file, digest in zip(files, pool.map(_digest, files), strict=True):
            total.update(str(file.relative_to(directory)).encode() + digest)
    return total.digest()


def _digest(file: Path) -> bytes:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()
