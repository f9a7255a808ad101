"""`MediaLoader`: a processor for samples whose images and videos are not trusted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from infer.media.limits import MediaLimits

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
        self._processor, self._limits = processor, limits

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
        return processor.encode(messages, processor.visual_stage(messages, pixel_limits))

    def close(self) -> None:
        """Ends the child processes. Calls in progress raise MediaError."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
