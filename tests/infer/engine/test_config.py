"""Sizes of an engine for models whose frames have one size."""

import pytest
from jax.sharding import AbstractMesh

from infer.engine import fit_config
from tarsier_jax.config import ClipVisionConfig, ModelConfig
from tarsier_jax.processing.processor import Processor, ProcessorOptions
from tarsier_jax.processing.square_image import ClipImageProcessor


@pytest.mark.parametrize(("image_size", "merge", "frame_tokens"), [(336, 1, 601), (336, 2, 157), (224, 1, 273)])
def test_bins_contain_whole_frames(image_size: int, merge: int, frame_tokens: int) -> None:
    vision = ClipVisionConfig(image_size=image_size, spatial_merge_size=merge)
    image, options = ClipImageProcessor(image_size=image_size), ProcessorOptions(n_frames=8)
    processor = Processor(
        None, ModelConfig(vision=vision, image_newline_id=1, image_new_id=2), image=image, options=options
    )
    config = fit_config(processor, slots=8, new_tokens=512)
    assert 8 * frame_tokens + 256 <= config.prompt_tokens < 8 * frame_tokens + 256 + 64
    (row,) = config.buckets
    assert (row.patches, row.frames) == (vision.num_patches, 1)
    assert row.bins >= row.tokens // frame_tokens  # as many frames as fit into the tokens of a row


@pytest.mark.parametrize(("data", "tensor"), [(1, 1), (2, 4), (1, 8), (4, 2)])
def test_devices_of_a_group_run_equally_many_bins(data: int, tensor: int) -> None:
    """Otherwise some of them run empty bins in each call of the vision tower."""
    processor = Processor(None, ModelConfig())  # pyright: ignore[reportArgumentType]
    mesh = AbstractMesh((data, 1, tensor), ("data", "fsdp", "tensor"))
    config, plain = (fit_config(processor, 32, 512, each) for each in (mesh, None))
    assert (config.groups, config.devices) == (data, tensor)
    for i, (row, needed) in enumerate(zip(config.buckets, plain.buckets, strict=True)):
        step = config.step(i)
        assert step % tensor == 0 and row.bins % step == 0
        assert row.bins < needed.bins + max(step, plain.step(i))  # at most one call more
