"""Videos and images inside tar (WebDataset), Parquet and Arrow files, which are read in place.

Such a file has a path as if the archive was a directory: `shards/00.tar/0001.mp4` is a member of a tar file,
`data.parquet/12/video` the column "video" of row 12 (from 0), and `data.parquet/12/images/0` the first value of a list.
"""

import collections
import io
import json
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from tarsier_jax.errors import InputError, MediaError
from tarsier_jax.processing.media_types import HEAD, kind_of_content, kind_of_suffix
from tarsier_jax.processing.table_archive import TableArchive, kind_of_column
from tarsier_jax.processing.tar_archive import FileRange, TarArchive
from tarsier_jax.storage import FetchedFile

TAR_SUFFIXES = (".tar",)
TABLE_SUFFIXES = (".parquet", ".arrow")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

Archive = TarArchive | TableArchive
Content = bytes | FileRange | FetchedFile

_RECENT = 4  # archives whose index stays in memory although nothing refers to it
_MUTEX = threading.Lock()
_archives: weakref.WeakValueDictionary[tuple[Any, ...], Archive] = weakref.WeakValueDictionary()
_recent: collections.deque[Archive] = collections.deque(maxlen=_RECENT)


def is_archive(path: str | Path) -> bool:
    """Returns whether a file is an archive according to its ending."""
    return Path(path).suffix.lower() in (*TAR_SUFFIXES, *TABLE_SUFFIXES)


def open_archive(path: str | Path) -> Archive:
    """Returns an archive, with the index of its samples. Archives that are in use are opened once.

    Raises:
        InputError: the file cannot be read.
    """
    path = Path(path)
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"The archive {path} cannot be read ({error.strerror}). Check the path.") from None
    key = str(path), status.st_size, status.st_mtime_ns
    with _MUTEX:
        archive = _archives.get(key)
        if archive is None:
            kind = TarArchive if path.suffix.lower() in TAR_SUFFIXES else TableArchive
            archive = _archives[key] = kind(path)
        if archive not in _recent:
            _recent.append(archive)
    return archive


def find_archives(source: str | Path) -> list[Path]:
    """Returns the archives that a file or a directory contains; empty if there are none.

    A directory of `datasets.Dataset.save_to_disk` has a list of its Arrow files. Any other directory contains tar files
    or, if there are none, Parquet files, in it and below.

    Raises:
        InputError: the file is a compressed tar file, or the directory has several splits.
    """
    path = Path(source)
    _check_uncompressed(path)
    if not os.path.isdir(path):
        return [path] if is_archive(path) else []
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(str(each.parent) for each in sorted(path.glob("*/state.json")))
        raise InputError(f"{path} is a dataset with several splits. Choose one of them: {splits}.")
    if (path / "state.json").is_file():
        return _saved_files(path)
    for suffixes in (TAR_SUFFIXES, (".parquet",)):
        files = [file for file in path.rglob("*") if file.suffix.lower() in suffixes and not file.name.startswith(".")]
        if files:
            return sorted(files)
    for file in path.rglob("*"):
        _check_uncompressed(file)
    return []


def _check_uncompressed(path: Path) -> None:
    """Raises InputError for a compressed tar file."""
    if path.name.lower().endswith(_COMPRESSED):
        raise InputError(f"{path} is compressed, so its members cannot be read in place. Decompress it to a .tar file.")


def split_archive(path: str | Path) -> tuple[Path, str] | None:
    """Returns the archive of a path and the place in it, or None for a path that is not below an archive."""
    for parent in Path(path).parents:
        if is_archive(parent) and os.path.isfile(parent):
            return parent, Path(path).relative_to(parent).as_posix()
    return None


def content_of(path: str | Path) -> tuple[Content, str, int]:
    """Returns the content of a path in an archive, its kind ("video", "gif" or "image") and its size in bytes.

    Raises:
        InputError: the archive does not contain it, or it is empty or of an unknown type.
    """
    split = split_archive(path)
    assert split is not None
    archive, place = split
    try:
        content = open_archive(archive).content(place)
        if isinstance(content, Path):
            content = FileRange(str(content), 0, content.stat().st_size)
    except (KeyError, OSError):
        raise MediaError(f"{path} does not exist: {archive} has no {place}. Check the path.", "not_found") from None
    size = content.size if isinstance(content, FileRange) else len(content)
    if not size:
        raise MediaError(f"{path} is empty. Check the path, or copy the file again.", "undecodable")
    kind = kind_of_suffix(place) or kind_of_content(_head(content), str(path))
    return content, kind, size


def open_content(content: Content) -> BinaryIO:
    return io.BytesIO(content) if isinstance(content, bytes) else content.open()


def kind_of_place(path: str | Path) -> str | None:
    """Returns "video" or "image" for a value in a table, according to its column; None for any other path."""
    split = split_archive(path)
    if split is None or split[0].suffix.lower() in TAR_SUFFIXES:
        return None
    parts: Sequence[str] = PurePosixPath(split[1]).parts
    return kind_of_column(parts[1]) if len(parts) > 1 else None


def _head(content: Content) -> bytes:
    with open_content(content) as file:
        return file.read(HEAD)


def _saved_files(directory: Path) -> list[Path]:
    """Returns the Arrow files of a directory that `datasets` saved. Raises InputError."""
    try:
        state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        files = [directory / Path(str(file["filename"])).name for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{directory / 'state.json'} is not the state of a saved dataset. Save it again.") from None
    if state.get("_indices_files"):
        raise InputError(f"{directory} has an indices mapping. Save it again with `dataset.flatten_indices()`.")
    return files
