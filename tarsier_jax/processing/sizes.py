"""Examples without pixels, whose sizes equal those of the processor: for planning rows without decoding videos."""

import dataclasses

import numpy as np

from tarsier_jax.processing.frame_sampling import FrameSelection
from tarsier_jax.processing.image import temporal_patches
from tarsier_jax.processing.processor import Processor
from tarsier_jax.processing.sample import Visual
from tarsier_jax.processing.visuals import VisualStage


class SizeProcessor(Processor):
    """A processor whose examples have no pixels: pixel_values is float32 (patches, 0).

    It opens every file and decodes the first selected frame of each visual. An error in a later frame is not noticed.
    """

    @property
    def visual_stage(self) -> VisualStage:
        return _SizeStage(self.image, self.config.vision, self.options, self.sampling)


def without_pixels(processor: Processor) -> SizeProcessor:
    """Returns the processor that measures the samples of another one."""
    return SizeProcessor(**{field.name: getattr(processor, field.name) for field in dataclasses.fields(processor)})


class _SizeStage(VisualStage):
    def _patchify(self, visual: Visual, limits: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, FrameSelection]:
        double = self.double_frames or visual.kind == "image"
        first = dataclasses.replace(visual, indices=visual.indices[:1], blanks=0)
        _, grid, selection = super()._patchify(first, limits)
        grid[0] = temporal_patches(visual.count, self.vision.temporal_patch_size, double)
        selection = dataclasses.replace(selection, indices=tuple(visual.indices), times=visual.times)
        return np.zeros((int(grid.prod()), 0), np.float32), grid, selection
