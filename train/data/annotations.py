"""Annotation files: their lines, read in place, mixed and shuffled (grain), and the sample of a line."""

import codecs
import dataclasses
import hashlib
import math
import posixpath
from pathlib import Path
from typing import Any, SupportsIndex

import grain
import numpy as np

from tarsier_jax.errors import InputError
from tarsier_jax.files import is_remote, is_url
from tarsier_jax.processing.formats import normalize_sample
from tarsier_jax.processing.jsonl import check_line, parse_json
from tarsier_jax.storage import local_source
from train.data.archives import ArchiveAnnotations, archives_of


@dataclasses.dataclass(frozen=True)
class AnnotationLine:
    """One line of an annotation file.

    Attributes:
        file: Path of the file.
        number: Line number, from 1.
        text: The line.
    """

    file: str
    number: int
    text: str


class AnnotationFile(grain.sources.RandomAccessDataSource):  # pyright: ignore[reportMissingTypeArgument]
    """The lines of a JSON lines file in UTF-8, read from the disk on access. Takes 16 bytes of memory per line.

    A file in an object store is copied to this machine.

    Raises:
        InputError: the file does not exist, is empty, has another encoding, or is a JSON array.
    """

    def __init__(self, path: str):
        self.path, self._local = path, local_source(path)
        try:
            with open(self._local, "rb") as file:
                starts, numbers, at = [], [], 0
                for number, line in enumerate(file, 1):
                    if line.removeprefix(codecs.BOM_UTF8).strip():
                        check_line(path, number, line, first=not starts)
                        starts.append(at)
                        numbers.append(number)
                    at += len(line)
        except OSError as e:
            raise InputError(f"The annotations {path} cannot be read ({e.strerror}). Check config.data.") from None
        if not starts:
            raise InputError(f"The annotations {path} are empty. Check config.data.")
        self._starts, self._numbers = np.array(starts, np.int64), np.array(numbers, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: SupportsIndex) -> AnnotationLine:
        i = int(index)
        with open(self._local, "rb") as file:
            file.seek(int(self._starts[i]))
            line = file.readline().removeprefix(codecs.BOM_UTF8)
            return AnnotationLine(
                self.path, int(self._numbers[i]), line.decode(errors="replace")
            )  # the file may have changed


def parse_files(files: str) -> list[tuple[str, float | None]]:
    """ "a.jsonl=3,b.jsonl" -> [("a.jsonl", 3.0), ("b.jsonl", None)]. Raises InputError."""
    parsed = []
    for part in filter(None, (part.strip() for part in files.split(","))):
        path, equals, weight = part.rpartition("=")
        try:
            parsed.append((path, float(weight)) if equals and not Path(part).exists() else (part, None))
        except ValueError:
            raise InputError(f"{part!r} in config.data should be FILE or FILE=WEIGHT.") from None
    weights = [weight for _, weight in parsed if weight is not None]
    if len(weights) not in (0, len(parsed)) or not all(0 < weight < math.inf for weight in weights):
        raise InputError(f"{files!r} in config.data: set a weight above 0 for every file, or for none.")
    if not parsed:
        raise InputError("config.data.train is empty. Set --config.data.train=annotations.jsonl.")
    return parsed


def describe_files(files: str) -> list[str]:
    """Returns size, hash and weight of every annotation file, which identify it independently of its path.

    Raises:
        InputError: a file cannot be read.
    """
    descriptions = []
    for path, weight in parse_files(files):
        suffix = f", weight {weight:g}" if weight else ""
        if archives_of(path):
            descriptions.append(ArchiveAnnotations(path).describe() + suffix)
            continue
        try:
            with open(local_source(path), "rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
                size = file.tell()
        except OSError as e:
            raise InputError(f"The annotations {path} cannot be read ({e.strerror}). Check config.data.") from None
        descriptions.append(f"{size} bytes, blake2b {digest}{suffix}")
    return descriptions


def open_annotations(path: str) -> ArchiveAnnotations | AnnotationFile:
    """Returns the samples of an annotation file, or of archives. Raises InputError."""
    return ArchiveAnnotations(path) if archives_of(path) else AnnotationFile(path)


def num_lines(files: str) -> int:
    """Returns the number of lines of all files that are not empty, or of samples of archives. Raises InputError."""
    return sum(len(open_annotations(path)) for path, _ in parse_files(files))


def mix_files(files: str, seed: int, repeat: bool, shuffle: bool = True) -> grain.MapDataset:
    """Returns the mixture of the files.

    Args:
        files: Files with optional weights, as in `DataConfig.train`.
        seed: Seed of the order.
        repeat: Endless and mixed by weight; otherwise every line once, in order.
        shuffle: Shuffle each file at each pass if `repeat`.
    """
    parsed = parse_files(files)
    sources = [open_annotations(path) for path, _ in parsed]
    if not repeat:
        return grain.MapDataset.concatenate([grain.MapDataset.source(source) for source in sources])
    datasets = [grain.MapDataset.source(s).seed(seed + i) for i, s in enumerate(sources)]
    datasets = [(dataset.shuffle() if shuffle else dataset).repeat() for dataset in datasets]
    weights = [weight or float(len(source)) for (_, weight), source in zip(parsed, sources, strict=True)]
    return grain.MapDataset.mix(datasets, [w / sum(weights) for w in weights])


def read_sample(text: str, media_root: str) -> dict[str, Any]:
    """Returns the sample of a line in the annotation format, with relative paths of media below `media_root`.

    Raises:
        InputError: the line is not JSON, or `normalize_sample` cannot read it.
    """
    sample = parse_json(text, "The line")
    if not isinstance(sample, dict):
        raise InputError("The line is not a JSON object.")
    return with_root(dict(normalize_sample(sample)), media_root)


def with_root(value: Any, root: str) -> Any:
    """Returns the sample with relative paths of media below `root`."""
    if not root:
        return value
    if isinstance(value, list):
        return [with_root(v, root) for v in value]
    if not isinstance(value, dict):
        return value
    media = ("video_file", "image_file", "frames")
    return {key: _join(v, root) if key in media else with_root(v, root) for key, v in value.items()}


def _join(source: Any, root: str) -> Any:
    if isinstance(source, list):
        return [_join(frame, root) for frame in source]
    if not isinstance(source, str) or not source or is_url(source):
        return source
    if is_remote(root) and not source.startswith("/"):
        return f"{root.rstrip('/')}/{posixpath.normpath(source)}"
    return str(Path(root, source))
