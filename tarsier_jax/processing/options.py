"""The options of the processor that users set."""

import dataclasses

from tarsier_jax.errors import InputError
from tarsier_jax.processing.frame_sampling import SAMPLERS


@dataclasses.dataclass(frozen=True)
class ProcessorOptions:
    """Options of the user. The defaults are those of Tarsier2's default configuration.

    Attributes:
        n_frames: Frames per sample, shared by its videos.
        max_n_frames: Largest number of frames per sample if `fps` selects more than n_frames.
        max_pixels: Largest number of pixels of a frame or image, before rounding to whole patches.
        min_pixels: Smallest number of pixels of a frame or image, before rounding to whole patches.
        max_pixels_per_sample: Largest number of pixels of all frames together. A doubled frame counts twice.
        max_seq_len: Largest number of tokens per sample, including visual tokens.
        video_sampler: "v1" samples evenly with both ends, "v2" samples the middle of equal segments.
        force_frames_n_divisible: Divisor of the number of frames per video; black frames are added.
        double_frames: Whether every frame fills its own temporal patch, unless the checkpoint pairs frames
            (`Qwen2ImageProcessor`).
    """

    n_frames: int = 16
    max_n_frames: int = 256
    max_pixels: int = 460_800
    min_pixels: int = 0
    max_pixels_per_sample: int = 128 * 384 * 384
    max_seq_len: int = 16_384
    video_sampler: str = "v1"
    force_frames_n_divisible: int = 1
    double_frames: bool = True

    def __post_init__(self) -> None:
        for name in ("n_frames", "max_pixels", "max_pixels_per_sample", "max_seq_len", "force_frames_n_divisible"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.n_frames > self.max_n_frames:
            raise InputError(f"n_frames {self.n_frames} is above max_n_frames {self.max_n_frames}. Raise max_n_frames.")
        if not 0 <= self.min_pixels <= self.max_pixels:
            raise InputError(f"min_pixels {self.min_pixels} must be between 0 and max_pixels {self.max_pixels}.")
        if self.video_sampler not in SAMPLERS:
            raise InputError(f"video_sampler is {self.video_sampler!r}, but must be one of {', '.join(SAMPLERS)}.")
