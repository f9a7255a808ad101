"""Finds the videos of samples in a directory, without downloading any.

A row that names a file uses it, relative to the directory. Otherwise the path is that of the benchmark's record, such
as TVBench/action_antonym/1.avi for the `vid` "action_antonym/1.avi", or that path without the name of the benchmark. If
there is no such file, it is the file in the same directory with the same stem and another ending.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.annotations import video_files_of, with_video_files
from eval.benchmarks.benchmark import Benchmark
from eval.predictions import PLACEHOLDER, AnnotatedSample, Prediction
from tarsier_jax.errors import InputError
from tarsier_jax.processing.media_types import MEDIA_SUFFIXES


def find_videos(
    benchmark: Benchmark, rows: Sequence[AnnotatedSample], data_root: Path | None
) -> tuple[list[AnnotatedSample], list[Path]]:
    """Returns the rows whose videos exist, with the paths of these, and the missing paths, each once.

    Raises:
        InputError: the benchmark needs files, but `data_root` is None; or several files have the stem of one video.
    """
    if callable(benchmark.video):
        return list(rows), []
    if data_root is None:
        raise InputError(f"{benchmark.name} needs video files. Pass the directory with them as --data_root.")
    files_by_stem = functools.cache(_files_by_stem)
    complete: list[AnnotatedSample] = []
    missing: dict[Path, None] = {}
    for row in rows:
        default = benchmark.video.format(vid=Prediction.of(row).vid)
        sources = [_source(data_root, file or PLACEHOLDER, default, files_by_stem) for file in video_files_of(row)]
        absent = [path for source in sources for path in _paths(source) if not path.exists()]
        missing.update(dict.fromkeys(absent))
        if not absent:
            complete.append(with_video_files(row, map(_text, sources)))
    return complete, list(missing)


def _source(
    data_root: Path, file: Any, default: str, files_by_stem: Callable[[Path], Mapping[str, Sequence[Path]]]
) -> Path | list[Path]:
    """Returns the path of a video, which may be missing, or the paths of its frames."""
    if isinstance(file, list):
        return [data_root / name for name in file]
    if file != PLACEHOLDER:
        return data_root / file
    path = data_root / default
    paths = [path, data_root.joinpath(*Path(default).parts[1:])]  # the second in a directory of one benchmark
    files = [each for each in paths if each.exists()] or [
        file for each in paths for file in _same_stem(each, files_by_stem)
    ]
    return files[0] if files else path


def _same_stem(path: Path, files_by_stem: Callable[[Path], Mapping[str, Sequence[Path]]]) -> Sequence[Path]:
    """Returns the media file in the directory of `path` with its stem, if there is one. Raises InputError for two."""
    stem = path.stem if path.suffix.lower() in MEDIA_SUFFIXES else path.name
    files = files_by_stem(path.parent).get(stem, [])
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(f"{path} does not exist, and {names} could replace it. Keep one of them.")
    return files


def _files_by_stem(directory: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.suffix.lower() in MEDIA_SUFFIXES:
            files.setdefault(path.stem, []).append(path)
    return files


def _paths(source: Path | list[Path]) -> list[Path]:
    return source if isinstance(source, list) else [source]


def _text(source: Path | list[Path]) -> str | list[str]:
    return [str(path) for path in source] if isinstance(source, list) else str(source)
