"""Finds the videos of samples in a directory, or below a URL of an object store, without downloading any.

A row that names a file uses it, relative to the directory. Otherwise the path is that of the benchmark's record, such
as TVBench/action_antonym/1.avi for the `vid` "action_antonym/1.avi", or that path without the name of the benchmark. If
there is no such file, it is the file in the same directory with the same stem and another ending.
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.annotations import video_files_of, with_video_files
from eval.benchmarks.benchmark import Benchmark
from eval.predictions import PLACEHOLDER, AnnotatedSample, Prediction
from tarsier_jax.errors import InputError
from tarsier_jax.files import is_remote
from tarsier_jax.processing.media_types import MEDIA_SUFFIXES
from tarsier_jax.storage import list_files

FilesByStem = Callable[[str], Mapping[str, Sequence[str]]]


def find_videos(
    benchmark: Benchmark, rows: Sequence[AnnotatedSample], data_root: str | Path | None
) -> tuple[list[AnnotatedSample], list[str]]:
    """Returns the rows whose videos exist, with the paths of these, and the missing paths, each once.

    Raises:
        InputError: the benchmark needs files, but `data_root` is None or a URL that cannot be read; or several files
            have the stem of one video.
    """
    if callable(benchmark.video):
        return list(rows), []
    if data_root is None:
        raise InputError(f"{benchmark.name} needs video files. Pass the directory with them as --data_root.")
    root = str(data_root).rstrip("/") or "/"
    exists, files_by_stem = _lookups(root)
    complete: list[AnnotatedSample] = []
    missing: dict[str, None] = {}
    for row in rows:
        default = benchmark.video.format(vid=Prediction.of(row).vid)
        sources = [_source(root, file or PLACEHOLDER, default, exists, files_by_stem) for file in video_files_of(row)]
        absent = [path for source in sources for path in _paths(source) if not exists(path)]
        missing.update(dict.fromkeys(absent))
        if not absent:
            complete.append(with_video_files(row, sources))
    return complete, list(missing)


def _lookups(root: str) -> tuple[Callable[[str], bool], FilesByStem]:
    """Returns whether a path below `root` exists, and the media files of a directory by their stem."""
    if not is_remote(root):
        return os.path.exists, functools.cache(lambda directory: _by_stem(_files_in(directory)))
    urls = list_files(root)  # one request, instead of several per sample
    by_directory: dict[str, list[str]] = {}
    for url in urls:
        by_directory.setdefault(os.path.dirname(url), []).append(url)
    return set(urls).__contains__, functools.cache(lambda directory: _by_stem(by_directory.get(directory, ())))


def _source(
    root: str, file: Any, default: str, exists: Callable[[str], bool], files_by_stem: FilesByStem
) -> str | list[str]:
    """Returns the path of a video, which may be missing, or the paths of its frames."""
    if isinstance(file, list):
        return [os.path.join(root, name) for name in file]
    if file != PLACEHOLDER:
        return os.path.join(root, file)
    # The second path is in a directory of one benchmark.
    paths = [os.path.join(root, name) for name in (default, default.partition("/")[2])]
    files = [path for path in paths if exists(path)] or [
        file for path in paths for file in _same_stem(path, files_by_stem)
    ]
    return files[0] if files else paths[0]


def _same_stem(path: str, files_by_stem: FilesByStem) -> Sequence[str]:
    """Returns the media file in the directory of `path` with its stem, if there is one. Raises InputError for two."""
    directory, name = os.path.split(path)
    stem, suffix = os.path.splitext(name)
    files = files_by_stem(directory).get(stem if suffix.lower() in MEDIA_SUFFIXES else name, [])
    if len(files) > 1:
        names = ", ".join(map(os.path.basename, files))
        raise InputError(f"{path} does not exist, and {names} could replace it. Keep one of them.")
    return files


def _files_in(directory: str) -> list[str]:
    names = os.listdir(directory) if os.path.isdir(directory) else []
    return [os.path.join(directory, name) for name in names]


def _by_stem(paths: Iterable[str]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for path in sorted(paths):
        stem, suffix = os.path.splitext(os.path.basename(path))
        if suffix.lower() in MEDIA_SUFFIXES:
            files.setdefault(stem, []).append(path)
    return files


def _paths(source: str | list[str]) -> list[str]:
    return source if isinstance(source, list) else [source]
