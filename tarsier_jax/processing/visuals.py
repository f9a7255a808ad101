"""The visual stage of the processor: from the images and videos of a sample to patches.

It needs neither JAX nor a tokenizer, and a small process can run it (see `infer.media`).
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tarsier_jax.config import VisionConfig
from tarsier_jax.errors import InputError
from tarsier_jax.processing.clip import ClipLimits
from tarsier_jax.processing.frame_sampling import FrameSelection, SamplingRules
from tarsier_jax.processing.image import Qwen2ImageProcessor
from tarsier_jax.processing.options import ProcessorOptions
from tarsier_jax.processing.sample import Visual, is_number, open_visuals
from tarsier_jax.processing.square_image import ClipImageProcessor

_UNSUPPORTED_STEPS = ("do_crop", "do_padding", "do_resize")


@dataclasses.dataclass(frozen=True)
class VisualInputs:
    """The images and videos of a sample, ready for the model.

    Attributes:
        pixel_values: float32 (patches, C), in the order of the image processor.
        grid_thw: int32 (visuals, 3), time, height and width in patches.
        frames: Number of frames and images, including black frames.
        selections: The frames of each image and video, in the order of `grid_thw`.
    """

    pixel_values: np.ndarray
    grid_thw: np.ndarray
    frames: int
    selections: tuple[FrameSelection, ...]


@dataclasses.dataclass(frozen=True)
class VisualStage:
    """Decodes, resizes and patchifies the images and videos of a sample. It can be pickled.

    Attributes:
        image: Converts frames to patches.
        vision: Sizes of the vision tower.
        options: Options of the user.
        sampling: Rules of the videos that the model was trained on.
    """

    image: Qwen2ImageProcessor | ClipImageProcessor
    vision: VisionConfig
    options: ProcessorOptions
    sampling: SamplingRules

    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        pixel_limits: Any = None,
        rng: np.random.Generator | None = None,
        clip_limits: ClipLimits | None = None,
    ) -> VisualInputs:
        """Returns the inputs of all images and videos of checked messages.

        Args:
            messages: Output of `read_messages`.
            pixel_limits: The image_processing_config of the sample.
            rng: Random generator of sampler v2; None takes the middle of each segment.
            clip_limits: Limits of each clip; None for trusted files.

        Raises:
            InputError: a file cannot be used, or the sample's limits are invalid.
        """
        options = self.options
        visuals = open_visuals(
            messages,
            options.n_frames,
            options.max_n_frames,
            options.video_sampler,
            options.force_frames_n_divisible,
            rng,
            self.sampling,
            clip_limits,
        )
        limits = self._limits_per_frame(pixel_limits, visuals)
        if not visuals:
            return VisualInputs(np.zeros((0, self.vision.patch_dim), np.float32), np.zeros((0, 3), np.int32), 0, ())
        patches, grids, selections = zip(*(self._patchify(visual, limits) for visual in visuals), strict=True)
        pixel_values = patches[0] if len(patches) == 1 else np.concatenate(patches)
        return VisualInputs(pixel_values, np.stack(grids), sum(visual.count for visual in visuals), selections)

    @property
    def double_frames(self) -> bool:
        """Whether every frame of a video fills its own temporal patch."""
        return self.options.double_frames and self.image.double_frames

    def _limits_per_frame(self, config: Any, visuals: Sequence[Visual]) -> tuple[int, int]:
        """Returns min_pixels and max_pixels per frame, from the sample or the options, within the sample's budget."""
        own = _check_pixel_limits({} if config is None else config)
        low, high = own.get("min_pixels", self.options.min_pixels), own.get("max_pixels", self.options.max_pixels)
        if not 0 <= low <= high:
            raise InputError(f"image_processing_config: min_pixels {low} is not between 0 and max_pixels {high}.")
        T = self.vision.temporal_patch_size
        times = {"image": T, "video": T if self.double_frames else 1}
        num_frames = sum(visual.count * times[visual.kind] for visual in visuals)
        high = min(int(high), self.options.max_pixels_per_sample // max(num_frames, 1))
        return min(int(low), high), high

    def _patchify(self, visual: Visual, limits: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, FrameSelection]:
        """Returns the patches of a visual, its grid, int32 (3,), and its selection."""
        start = time.perf_counter()
        double = self.double_frames or visual.kind == "image"
        patches, grid = self.image.patch(visual.frames(), visual.count, limits, double, visual.clip.name)
        _, height, width = (grid * self.vision.patch_size).tolist()
        seconds = visual.open_seconds + time.perf_counter() - start
        return patches, grid, FrameSelection(tuple(visual.indices), visual.times, (height, width), 0.0, seconds)


def _check_pixel_limits(config: Any) -> dict[str, Any]:
    """Returns the limits in an image_processing_config.

    Raises:
        InputError: a value is invalid, or a step is not supported.
    """
    if not isinstance(config, Mapping):
        raise InputError(f'image_processing_config must be like {{"max_pixels": 100000}}, not {config!r:.200}.')
    unsupported = [key for key in _UNSUPPORTED_STEPS if config.get(key)]
    if unsupported:
        raise InputError(f"image_processing_config: {', '.join(unsupported)} is not supported. Remove it.")
    limits = {key: config[key] for key in ("min_pixels", "max_pixels") if config.get(key) is not None}
    for key, limit in limits.items():
        if not is_number(limit):
            raise InputError(f"image_processing_config: {key} must be a number, not {limit!r:.200}.")
    if limits.get("max_pixels", 1) < 1:
        raise InputError(f"image_processing_config: max_pixels must be at least 1, not {limits['max_pixels']}.")
    return limits
