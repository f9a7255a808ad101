"""Reads tar files in the layout of WebDataset in place: samples, and the range of bytes of each member."""

import array
import dataclasses
import io
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tarsier_jax.errors import InputError
from tarsier_jax.processing.formats import is_conversation
from tarsier_jax.processing.jsonl import parse_json
from tarsier_jax.processing.media_types import MEDIA_SUFFIXES, kind_of_suffix

PLAIN_KEYS = ("idx", "prompt", "caption")  # of a sample without a conversation; others describe the origin of a clip
_TEXTS = (".json", ".txt")
_COMPRESSIONS = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_LISTS = ("video", "videos", "image", "images")
_MESSAGES = ("messages", "conversations", "prompt")
_SOURCE_KEYS = frozenset((*_LISTS, "video_file", "image_file", "frames", "path", "url", "video_url", "image_url"))


@dataclasses.dataclass(frozen=True)
class FileRange:
    """A part of a file.

    Attributes:
        path: The file.
        offset: First byte.
        size: Number of bytes.
    """

    path: str
    offset: int
    size: int

    def open(self) -> io.BufferedReader:
        """Opens the part as if it was a file. Raises OSError."""
        return io.BufferedReader(_RangeReader(self))

    def read(self) -> bytes:
        with self.open() as file:
            return file.read()


class _RangeReader(io.RawIOBase):
    def __init__(self, part: FileRange):
        self._part, self._position = part, 0
        self._descriptor = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._part.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), max(0, self._part.size - self._position))
        count = os.preadv(self._descriptor, [memoryview(buffer)[:size]], self._part.offset + self._position)
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


class TarArchive:
    """A tar file. The members with one key are a sample, as in WebDataset.

    The key is the name up to the first dot after the last slash. A sample has videos, animations or images, an
    annotation (.json) and a caption (.txt). Other members and hidden files are not read. The headers of all members are
    read once; a member takes about 180 bytes of memory.

    Raises:
        InputError: the file cannot be read, is compressed, cut off, or not a tar file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._rows: dict[str, int] = {}
        offsets, sizes = array.array("q"), array.array("q")
        for name, link, offset, size in _members(path):
            target = self._rows.get(link, -1)
            if link and target < 0:
                continue
            self._rows[name] = len(offsets)  # of two members with one name the last one counts, as in tar
            offsets.append(offsets[target] if link else offset)
            sizes.append(sizes[target] if link else size)
        self._offsets, self._sizes = np.frombuffer(offsets, np.int64), np.frombuffer(sizes, np.int64)
        self._names = list(self._rows)
        self._order, self._starts = _group(self._names)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def sample(self, index: int, name: str) -> dict[str, Any]:
        """Returns a sample.

        An annotation with a conversation is returned with its media as paths in the archive. Another sample is
        {"input": path, "caption": content of the .txt member}, with `PLAIN_KEYS` of its annotation.

        Args:
            index: Number of the sample.
            name: Name of the archive in the paths.

        Raises:
            InputError: the annotation is not a JSON object, or the archive lacks a file of it.
        """
        members = [self._names[i] for i in self._order[self._starts[index] : self._starts[index + 1]]]
        media = sorted(member for member in members if kind_of_suffix(member))
        members.sort(key=len, reverse=True)  # 0.json counts, not 0.old.json
        texts = {PurePosixPath(member).suffix.lower(): member for member in members if not kind_of_suffix(member)}
        annotation: Any = {}
        if ".json" in texts:
            where = f"{name}/{texts['.json']}"
            annotation = parse_json(self._text(texts[".json"]), where)
            if not isinstance(annotation, dict):
                raise InputError(f"{where} is not a JSON object. An annotation is one object per sample.")
        if is_conversation(annotation):
            return self._with_media(annotation, media, name)
        if len(media) != 1:
            names = ", ".join(media) or "none"
            raise InputError(
                f"{name}/{members[0]}: a sample without a conversation needs one video or image, but has {names}. Add "
                'a .json member with "messages".'
            )
        if ".txt" in texts:
            annotation["caption"] = self._text(texts[".txt"]).strip()
        return plain_sample(f"{name}/{media[0]}", annotation)

    def samples(self, name: str) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
        """Yields a name for every sample, and the sample or the reason why it cannot be used."""
        for index in range(len(self)):
            place = f"{name}/{self._names[self._order[self._starts[index]]]}"
            try:
                yield place, self.sample(index, name)
            except InputError as error:
                yield place, error

    def content(self, member: str) -> FileRange:
        """Returns the bytes of a member. Raises KeyError."""
        row = self._rows[member]
        return FileRange(str(self.path), int(self._offsets[row]), int(self._sizes[row]))

    def _text(self, member: str) -> str:
        try:
            return self.content(member).read().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise InputError(f"{self.path}/{member} is not UTF-8. Convert it.") from None

    def _with_media(self, annotation: Mapping[str, Any], media: Sequence[str], name: str) -> dict[str, Any]:
        """Returns an annotation whose media are paths in the archive.

        A file that the annotation names is a member, next to the annotation or from the top of the archive. If the
        sample has one medium, it is the only file that the annotation names, under any name.
        """
        parts = {key: annotation[key] for key in (*_LISTS, *_MESSAGES) if key in annotation}
        sources = set(_sources(parts))
        if not sources:
            images = [f"{name}/{member}" for member in media if kind_of_suffix(member) == "image"]
            videos = [f"{name}/{member}" for member in media if kind_of_suffix(member) != "image"]
            lists = {"videos": videos, "images": images}
            return {**annotation, **{key: paths for key, paths in lists.items() if paths}}
        directory = PurePosixPath(media[0]).parent if media else PurePosixPath()
        paths = {}
        for source in sources:
            places = (_normal(source), str(directory / _normal(source)))
            member = next((place for place in places if place in self._rows), None)
            if member is None and len(sources) == len(media) == 1:
                member = media[0]
            if member is None and media:
                raise InputError(
                    f"{name}: an annotation names {source}, which is not a member. The media of its sample are "
                    f"{', '.join(media)}."
                )
            paths[source] = source if member is None else f"{name}/{member}"
        return {**annotation, **_replaced(parts, paths)}


def plain_sample(path: str, annotation: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a sample of one video or image."""
    return {"input": path, **{key: annotation[key] for key in PLAIN_KEYS if annotation.get(key) is not None}}


def _members(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """Yields name, target of a hard link, offset and size of every member of a sample. Raises InputError."""
    try:
        _check_uncompressed(path)
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it stores every header
                name = _normal(member.name)
                is_file = member.islnk() or (member.isreg() and not member.issparse())
                if is_file and _is_part_of_sample(name):
                    yield name, _normal(member.linkname) if member.islnk() else "", member.offset_data, member.size
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}). Check the path.") from None
    except tarfile.TarError as error:
        raise InputError(f"{path} is cut off, damaged or not a tar file ({error}). Copy it again.") from None


def _check_uncompressed(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(8)
    for magic, program in _COMPRESSIONS.items():
        if head.startswith(magic):
            raise InputError(
                f"{path} is compressed, so its members cannot be read in place. Decompress it: `{program} {path}`."
            )


def _normal(name: str) -> str:
    return str(PurePosixPath(name.removeprefix("file://").lstrip("/")))


def _is_part_of_sample(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in (*MEDIA_SUFFIXES, *_TEXTS) and not path.name.startswith(".")


def _group(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Groups members by key.

    Returns:
        The numbers of the members, ordered by sample, and the position in them where each sample starts, with the end.
        A group of only a .txt member is not a sample.
    """
    numbers: dict[str, int] = {}
    samples = np.array([numbers.setdefault(_key(name), len(numbers)) for name in names], np.int64)
    is_text = np.array([name.lower().endswith(".txt") for name in names], bool)
    is_sample = np.zeros(len(numbers), bool)
    is_sample[samples[~is_text]] = True
    order = np.argsort(samples, kind="stable")
    order = order[is_sample[samples[order]]]
    firsts = np.flatnonzero(np.diff(samples[order], prepend=-1))
    return order, np.append(firsts, len(order))


def _key(name: str) -> str:
    directory, slash, base = name.rpartition("/")
    return directory + slash + base.partition(".")[0]


def _sources(value: Any) -> Iterator[str]:
    """Yields the values that name media."""
    if isinstance(value, list):
        for each in value:
            yield from _sources(each)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            if key in _SOURCE_KEYS:
                yield from (
                    source for source in (each if isinstance(each, list) else [each]) if isinstance(source, str)
                )
            yield from _sources(each)


def _replaced(value: Any, paths: Mapping[str, str]) -> Any:
    """Returns the value with other names of media."""
    if isinstance(value, list):
        return [_replaced(each, paths) for each in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: _renamed(each, paths) if key in _SOURCE_KEYS else _replaced(each, paths) for key, each in value.items()
    }


def _renamed(source: Any, paths: Mapping[str, str]) -> Any:
    if isinstance(source, list):
        return [_renamed(each, paths) for each in source]
    return paths.get(source, source) if isinstance(source, str) else _replaced(source, paths)
