"""The tensors of a Hugging Face directory, read one at a time and in part."""

import dataclasses
import json
import math
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from tarsier_jax.errors import CheckpointError
from tarsier_jax.files import warn

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.")
_OTHERS = ("adapter_", "consolidated")  # safetensors that are not part of the model
_MAX_HEADER = 100 * 2**20  # the format's own limit


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor on disk.

    Attributes:
        file: The file that contains it.
        shape: Its shape.
        dtype: Its dtype.
        read: Start and stop -> that range of the flattened values.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def open_tensors(directory: Path, ignored: Sequence[str] = ()) -> dict[str, Tensor]:
    """Returns the tensors of a directory of safetensors, or of `.bin` shards, by name, without reading values.

    The files are those that transformers reads: `model.safetensors`, else the shards of its index, else all
    safetensors. `.bin` files follow in the same order.

    Args:
        directory: The directory.
        ignored: Regular expressions of whole names. Such tensors are omitted, and may have any dtype.

    Raises:
        CheckpointError: weights are missing, a shard is missing or damaged, a name is in two shards, shards of two
            checkpoints are mixed, or a dtype is not supported. One error lists all problems.
    """
    for single, pattern, opener in (
        ("model.safetensors", "*.safetensors", _open_safetensors),
        ("pytorch_model.bin", "pytorch_model*.bin", _open_torch),
    ):
        files, weight_map = _find_files(directory, single, pattern)
        if files:
            return _collect(files, opener, weight_map, lambda name: any(re.fullmatch(each, name) for each in ignored))
    raise CheckpointError(f"{directory} contains no *.safetensors and no pytorch_model*.bin. Download the weights too.")


def open_file(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of one safetensors or `.bin` file by name, without reading values. Raises CheckpointError."""
    opener = _open_torch if path.suffix == ".bin" else _open_safetensors
    return opener(path, lambda name: False)


def _find_files(directory: Path, single: str, pattern: str) -> tuple[list[Path], dict[str, Path]]:
    """Returns the files to read, and the file of each tensor according to the index, {} without an index."""
    index = directory / f"{single}.index.json"
    if (directory / single).is_file():
        if index.exists():
            warn(f"{directory / single} is read and {index} is not, as in transformers. Remove the stale one.")
        return [directory / single], {}
    present = [path for path in sorted(directory.glob(pattern)) if not path.name.startswith(_OTHERS)]
    if not index.exists():
        _check_numbers(present)
        return present, {}
    weight_map = _read_index(index)
    files = sorted(set(weight_map.values()))
    if unnamed := [path.name for path in present if _SHARD.search(path.name) and path not in files]:
        warn(f"{index} does not name {', '.join(unnamed[:3])}; such files are not read. Remove the stale files.")
    return files, weight_map


def _check_numbers(files: list[Path]) -> None:
    """Checks that the shards, "model-00001-of-00002" and so on, form one complete checkpoint.

    Raises:
        CheckpointError: a shard is missing, or shards belong to different checkpoints.
    """
    matches = [match for file in files if (match := _SHARD.search(file.name))]
    if not matches:
        return
    directory, totals = files[0].parent, {match[2] for match in matches}
    if len(totals) > 1:
        raise CheckpointError(
            f"{directory} contains shards of different checkpoints (-of-{', -of-'.join(sorted(totals))}) and no "
            "index. Remove those of one."
        )
    if absent := sorted(set(range(1, int(totals.pop()) + 1)) - {int(match[1]) for match in matches}):
        name = matches[0].string.replace(matches[0][1], f"{absent[0]:0{len(matches[0][1])}d}", 1)
        raise CheckpointError(f"The shard {directory / name} is missing. Download it too.")


def _read_index(path: Path) -> dict[str, Path]:
    """Returns the file of each tensor.

    Raises:
        CheckpointError: the index is damaged, or names files in another directory.
    """
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        weight_map = {name: path.parent / PurePosixPath(file) for name, file in files.items()}
        if not weight_map:
            raise ValueError("it names no file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path} is damaged ({e!r}). Download the file again.") from None
    outside = [file for file in weight_map.values() if ".." in file.parts or not file.is_relative_to(path.parent)]
    if outside:
        raise CheckpointError(
            f"{path} names {outside[0]}, which is not in its directory. Download the checkpoint again."
        )
    return weight_map


def _collect(
    files: list[Path],
    opener: Callable[[Path, Callable[[str], bool]], dict[str, Tensor]],
    weight_map: dict[str, Path],
    is_ignored: Callable[[str], bool],
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    problems = []
    for file in files:
        try:
            shard = opener(file, is_ignored)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for name, tensor in shard.items():
            if name in tensors:
                problems.append(f"{name} is in both {tensors[name].file} and {file}; remove one of the files.")
            tensors[name] = tensor
        absent = [
            name for name, place in weight_map.items() if place == file and name not in shard and not is_ignored(name)
        ]
        if absent:
            problems.append(f"{absent[0]} is not in {file}, although the index says so. Download it again.")
    if problems:
        raise CheckpointError(" ".join(problems))
    return tensors


def _open_safetensors(path: Path, is_ignored: Callable[[str], bool]) -> dict[str, Tensor]:
    """Returns the tensors of one file. The format is 8 bytes of header length, a JSON header, and the values."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER:
                raise ValueError("the header's length is impossible")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {
            name: _safetensor(path, 8 + length, name, entry) for name, entry in header.items() if not is_ignored(name)
        }
    except FileNotFoundError:
        raise CheckpointError(f"The shard {path} is missing. Download it too.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as e:
        raise CheckpointError(f"{path} is not a valid safetensors file ({e}). Download it again.") from None
    return tensors


def _safetensor(path: Path, base: int, name: str, entry: dict[str, Any]) -> Tensor:
    dtype, shape, (start, end) = DTYPES.get(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    if dtype is None:
        raise CheckpointError(
            f"{path}: {name} has dtype {entry['dtype']}; supported are {', '.join(DTYPES)}. Use an unquantised one."
        )
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has another size than its shape says")
    if base + end > path.stat().st_size:
        raise ValueError(f"it is cut short within {name}")

    def read(first: int, last: int) -> np.ndarray:
        values = np.empty(last - first, dtype)
        with path.open("rb", buffering=0) as file:
            file.seek(base + start + first * dtype.itemsize)
            view, done = values.view(np.uint8).data, 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{path} ended within {name}. Download it again.")
                done += count
        return values

    return Tensor(path, shape, dtype, read)


def _open_torch(path: Path, is_ignored: Callable[[str], bool]) -> dict[str, Tensor]:
    """Returns the tensors of one `.bin` shard. Pickled code in it is never run (weights_only)."""
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path} needs torch to be read. Install torch, or convert the checkpoint to safetensors elsewhere."
        ) from None
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"The shard {path} is missing. Download it too.") from None
    except Exception as e:  # torch raises errors of many types for damaged files
        reason = str(e).split("\n")[0]
        raise CheckpointError(f"{path} cannot be read ({reason}). Download it again.") from None
    tensors = {}
    for name, value in state.items():
        if is_ignored(name):
            continue
        if value.dtype not in names:
            raise CheckpointError(f"{path}: {name} has dtype {value.dtype}; {', '.join(DTYPES)} are supported.")
        dtype = DTYPES[names[value.dtype]]

        def read(first: int, last: int, value: Any = value, dtype: np.dtype = dtype) -> np.ndarray:
            integers = torch.int32 if dtype.itemsize == 4 else torch.int16
            return value.flatten()[first:last].contiguous().view(integers).numpy().view(dtype)

        tensors[name] = Tensor(path, tuple(value.shape), dtype, read)
    return tensors
