"""The limits of media files and of the processes that decode them."""

import dataclasses

from tarsier_jax.processing.clip import ClipLimits


@dataclasses.dataclass(frozen=True)
class MediaLimits(ClipLimits):
    """Limits of the media of one sample.

    Attributes:
        max_files: Largest number of files, including single frames.
        timeout: Seconds to fetch the media of a sample, and seconds to decode them.
        memory_bytes: Address space of a child process.
    """

    max_files: int = 200
    timeout: float = 60.0
    memory_bytes: int = 4 << 30
