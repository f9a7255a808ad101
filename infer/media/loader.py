"""`MediaLoader`: a processor for samples whose images and videos are not trusted."""

import dataclasses
import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from infer.media.cache import VisualCache
from infer.media.children import ChildPool
from infer.media.fetch import Fetcher
from infer.media.limits import MediaLimits
from infer.media.sources import SourcePolicy, Sources
from tarsier_jax.errors import InputError
from tarsier_jax.processing.visuals import VisualInputs, VisualStage

if TYPE_CHECKING:
    from tarsier_jax.processing.batch import Example
    from tarsier_jax.processing.processor import Processor


class MediaLoader:
    """Returns the example of a sample, as the processor does. Thread-safe. `close` it, or use it in a `with` statement.

    Args:
        processor: Tokenizes the sample.
        limits: Limits of the media of a sample.
        workers: Number of child processes.
        root: The directory below which local files may be read; "/" allows all files, None allows none. A relative
            path starts at `root`, or at the current directory if `root` is "/".
        hosts: Hosts that may be fetched from: names such as "example.com", with a port other than 80 and 443 as
            "example.com:8443". An address, such as "127.0.0.1:8000", allows exactly this address.
    """

    def __init__(
        self,
        processor: "Processor",
        limits: MediaLimits = MediaLimits(),
        *,
        workers: int = 2,
        root: str | Path | None = None,
        hosts: Sequence[str] = (),
    ):
        if workers < 1:
            raise InputError(f"A media loader needs at least 1 child process, not {workers}.")
        self._processor = processor
        self._policy = SourcePolicy(None if root is None else Path(root).resolve(), Fetcher(hosts), limits)
        self._cache = VisualCache(limits.cache_bytes)
        self._children = ChildPool(limits, workers)

    def __call__(self, sample: Mapping[str, Any], **options: Any) -> "Example":
        """Returns the example of a sample.

        Args:
            sample: In the annotation format (see docs/design.md). The source of an image, a video or a frame is a path,
                bytes, a data URL or an http(s) URL.
            options: Fields of ProcessorOptions, such as n_frames.

        Raises:
            MediaError: an image or video cannot be used.
            InputError: an option or another part of the sample cannot be used.
        """
        processor = self._processor.replace(**options)
        messages, pixel_limits = processor.read(sample)
        return processor.encode(messages, self._load(processor.visual_stage, messages, pixel_limits))

    def close(self) -> None:
        """Ends the child processes. Calls in progress raise MediaError."""
        self._children.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, stage: VisualStage, messages: Sequence[Mapping[str, Any]], pixel_limits: Any) -> VisualInputs:
        """Runs the visual stage in a child process, unless the cache contains its result."""
        with Sources(messages, self._policy) as sources:
            if not sources.fetch_seconds:
                return stage(sources.messages, pixel_limits)  # only text
            key = _cache_key(stage, sources, pixel_limits)
            visuals = None if key is None else self._cache.get(key)
            if visuals is not None:
                return _with_seconds(visuals, sources.fetch_seconds, is_cached=True)
            visuals = self._children.decode(stage, sources.messages, pixel_limits, sources.descriptors)
        if key is not None:
            self._cache.put(key, visuals)
        return _with_seconds(visuals, sources.fetch_seconds)


def _cache_key(stage: VisualStage, sources: Sources, pixel_limits: Any) -> bytes | None:
    """Returns a digest of the content and the options, or None for content that cannot be identified."""
    if sources.identities is None:
        return None
    return hashlib.sha256(pickle.dumps((stage, sources.messages, sources.identities, pixel_limits))).digest()


def _with_seconds(visuals: VisualInputs, fetch_seconds: Sequence[float], is_cached: bool = False) -> VisualInputs:
    """Returns the visuals with the seconds of this call."""
    selections = tuple(
        dataclasses.replace(
            selection, fetch_seconds=seconds, decode_seconds=0.0 if is_cached else selection.decode_seconds
        )
        for selection, seconds in zip(visuals.selections, fetch_seconds, strict=True)
    )
    return dataclasses.replace(visuals, selections=selections)
