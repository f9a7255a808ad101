"""Annotations in tar, Parquet and Arrow files, which also contain the videos and images."""

import bisect
import dataclasses
import glob
import hashlib
import itertools
import os
from collections.abc import Mapping
from typing import Any, SupportsIndex

import grain

from tarsier_jax.errors import InputError
from tarsier_jax.processing.archives import Archive, find_archives, open_archive
from tarsier_jax.processing.formats import is_conversation
from tarsier_jax.processing.jsonl import to_json
from tarsier_jax.processing.processor import media_sample
from tarsier_jax.storage import local_source


@dataclasses.dataclass(frozen=True)
class ArchiveLine:
    """A sample of an archive, with the interface of an AnnotationLine.

    Attributes:
        file: Path of the archive.
        number: Number of the sample, from 1.
        archive: The archive.
    """

    file: str
    number: int
    archive: Archive

    @property
    def text(self) -> str:
        """The annotation as JSON, with absolute paths in the archive. It is read on access. Raises InputError."""
        return to_json(_chat(self.archive.sample(self.number - 1, os.path.abspath(self.file))))


class ArchiveAnnotations(grain.sources.RandomAccessDataSource):  # pyright: ignore[reportMissingTypeArgument]
    """The samples of archives, which are read in place on access.

    A sample is an annotation in any format that `normalize_sample` reads, or a video or image with a caption, which
    answers the prompt of the sample or a request for a detailed description.

    Args:
        source: An archive, a glob, or a directory, see `find_archives`.

    Raises:
        InputError: an archive cannot be read, or there are no samples.
    """

    def __init__(self, source: str):
        self._files = archives_of(source)
        self._archives = [open_archive(file) for file in self._files]
        self._ends = list(itertools.accumulate(map(len, self._archives)))
        if not len(self):
            raise InputError(f"The annotations {source} are empty. Check config.data.")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: SupportsIndex) -> ArchiveLine:
        i = bisect.bisect_right(self._ends, int(index))
        first = self._ends[i - 1] if i else 0
        return ArchiveLine(self._files[i], int(index) - first + 1, self._archives[i])

    def describe(self) -> str:
        """Returns number and hash of the annotations, without the content of the media and the path of the archives."""
        digest = hashlib.blake2b(digest_size=8)
        for file, archive in zip(self._files, self._archives, strict=True):
            for _, sample in archive.samples(os.path.basename(file)):
                digest.update(to_json(sample).encode() + b"\n")
        return f"{len(self)} samples, blake2b {digest.hexdigest()}"


def archives_of(source: str) -> list[str]:
    """Returns the archives of an archive, a directory or a glob; empty for an annotation file. Raises InputError.

    A directory or file in an object store is copied to this machine.
    """
    source = local_source(source)
    matches = sorted(glob.glob(source)) if glob.has_magic(source) and not os.path.exists(source) else [source]
    return [str(file) for match in matches for file in find_archives(match)]


def _chat(sample: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a sample with a caption as a conversation, and a conversation as it is."""
    if is_conversation(sample) or "input" not in sample:
        return sample
    caption = sample.get("caption")
    if not isinstance(caption, str):
        raise InputError(f"{sample['input']} has neither messages nor a caption. Add a .json or a .txt member.")
    question = media_sample(sample["input"], sample.get("prompt"))
    answer = {"role": "assistant", "content": [{"type": "text", "text": caption}]}
    return {**question, "messages": [*question["messages"], answer]}
