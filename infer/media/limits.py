"""The limits of media files and of the processes that decode them."""

import dataclasses

from tarsier_jax.processing.clip import ClipLimits


@dataclasses.dataclass(frozen=True)
class MediaLimits(ClipLimits):
    """Limits of the media of one sample.

    Attributes:
        max_sample_bytes: Largest size of all media of a sample that are not local files.
        max_files: Largest number of files, including single frames.
        timeout: Seconds to fetch the media of a sample, and seconds to decode them.
        memory_bytes: Address space of a child process.
        cache_bytes: Size of the decoded media that are stored for a later request with the same media and options.
    """

    max_sample_bytes: int = 1 << 30
    max_files: int = 200
    timeout: float = 60.0
    memory_bytes: int = 4 << 30
    cache_bytes: int = 1 << 30
